from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify.errors import Refusal
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.sizes.generalize import Generalized, generalize
from sparsify.scans.scan import Scan
from tests.models.looped_models import W0, W1, WEIGHTS, H, lif
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

Model = Callable[[Tape, Tensor], Any]


def same_body(first: nn.Module, second: nn.Module) -> bool:
    assert isinstance(first, Scan)
    assert isinstance(second, Scan)
    return bool(first.body.code == second.body.code)


def record(model: Model, steps: int, batch: int) -> Unrolled:
    return record_unrolled(model, [dyadic(steps, batch, H, seed=7)], WEIGHTS)


def compiled(model: Model, steps: int, batch: int) -> fx.GraphModule:
    return split_time(roll_loops(record(model, steps, batch).graph).graph).graph


def recurrent(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    steps, batch = x.size(0), x.size(1)
    v, z, out = torch.zeros(batch, H), torch.zeros(batch, H), []
    record = torch.zeros(batch, steps + 2, H)
    for t in tape.loop(range(steps)):
        v, z = lif(v, F.linear(x[t], W0) + F.linear(z, W1))
        out.append(z)
        record[:, t + 1] = v
    rows = record.view(batch * (steps + 2), H)
    return torch.stack(out, 1), rows, torch.cat(out), z, torch.stack(out).view(-1, H)


def generalized(model: Model) -> Generalized:
    found = generalize(compiled(model, 5, 3), compiled(model, 18, 8), same_body)
    assert isinstance(found, Generalized), found
    return found


@pytest.mark.parametrize(("steps", "batch"), [(5, 3), (18, 8), (1, 1), (2, 6), (9, 2)])
def test_one_graph_serves_all_sizes(steps: int, batch: int) -> None:
    found = generalized(recurrent)
    recorded = record(recurrent, steps, batch)
    assert found.why_miss([t.shape for t in recorded.operands]) is None
    assert_same(found.graph(*recorded.operands), recorded.results)


def test_the_dims_that_vary_are_reported() -> None:
    found = generalized(recurrent)
    x = len(WEIGHTS)  # x is the placeholder behind the weights
    assert found.varying == {(x, 0), (x, 1)}


def test_sizes_that_were_not_varied_are_guarded() -> None:
    found = generalize(compiled(recurrent, 5, 3), compiled(recurrent, 5, 4), same_body)
    assert isinstance(found, Generalized)
    shapes = [t.shape for t in record(recurrent, 6, 3).operands]
    assert "has size 6 in dim 0, it had 5" in (found.why_miss(shapes) or "")


def test_dims_that_were_equal_must_stay_equal() -> None:
    def added(tape: Tape, x: Tensor) -> Tensor:
        return x + x.transpose(0, 1)

    found = generalize(compiled(added, 3, 3), compiled(added, 5, 5), same_body)
    assert isinstance(found, Generalized)
    shapes = [t.shape for t in record(recurrent, 4, 6).operands]
    assert "must be equal" in (found.why_miss(shapes) or "")


def test_empty_and_reshaped_operands_miss() -> None:
    found = generalized(recurrent)
    weights = [w.shape for w in WEIGHTS.values()]
    assert "not zero" in (found.why_miss([*weights, (5, 0, H)]) or "")
    assert "2 dims" in (found.why_miss([*weights, (5, H)]) or "")
    assert "operands were given" in (found.why_miss(weights) or "")


def refusal(model: Model, sizes: tuple[tuple[int, int], tuple[int, int]]) -> Refusal:
    found = generalize(compiled(model, *sizes[0]), compiled(model, *sizes[1]), same_body)
    assert isinstance(found, Refusal)
    assert found.code == "unsupported-layout"
    return found


def test_a_float_of_the_size_is_refused() -> None:
    def mean(tape: Tape, x: Tensor) -> Tensor:
        return x.sum(0) * (1 / x.size(0))

    found = refusal(mean, ((5, 3), (7, 4)))
    assert "0.2" in found.reason
    assert found.location is not None


def test_an_integer_that_does_not_follow_from_the_sizes_is_refused() -> None:
    def half(tape: Tape, x: Tensor) -> Tensor:
        return x[x.size(0) ** 2 // 8]

    assert "in no simple way" in refusal(half, ((5, 3), (7, 4))).reason


def test_an_integer_that_follows_in_two_ways_is_refused() -> None:
    def shifted(tape: Tape, x: Tensor) -> Tensor:
        return torch.zeros(x.size(0) + 7)

    assert "more than one way" in refusal(shifted, ((5, 3), (6, 4))).reason


def test_a_size_that_may_be_the_last_index_is_refused() -> None:
    def last(tape: Tape, x: Tensor) -> Tensor:
        return x[x.size(0) - 1]

    assert "more than one way" in refusal(last, ((4, 3), (6, 5))).reason


@pytest.mark.parametrize("lengths", [(9, 10), (5, 6), (100, 103)])
@pytest.mark.parametrize(
    "cut",
    [
        lambda x, n: x[n // 2 :],
        lambda x, n: x[: (n + 1) // 2],
        lambda x, n: x[n - n // 4 :],
        lambda x, n: x[-(n // 2) :],
        lambda x, n: x.transpose(0, 1)[:, n // 2],
    ],
)
def test_lengths_that_are_too_alike_to_tell_what_a_part_is_are_refused(
    cut: Callable[[Tensor, int], Tensor], lengths: tuple[int, int]
) -> None:
    def part(tape: Tape, x: Tensor) -> Tensor:
        return cut(x, x.size(0)).sum(0)

    first, second = (compiled(part, n, batch) for n, batch in zip(lengths, (3, 3), strict=True))
    found = generalize(first, second, same_body)
    if isinstance(found, Generalized):  # a formula of the part itself is right as well
        for steps in (4, 7, 20):
            recorded = record(part, steps, 3)
            assert_same(found.graph(*recorded.operands), recorded.results)
    else:
        assert "parts of the sizes" in found.reason or "in no simple way" in found.reason


def test_how_many_every_second_step_makes_is_no_other_size() -> None:
    """5 of 9 and 7 of 14 steps are 2 more than batches of 3 and 5: by chance."""

    def thinned(tape: Tape, x: Tensor) -> Tensor:
        even = x[3:][::2] * 2
        return even.reshape(even.size(0), even.size(1) * even.size(2))

    assert "every k-th" in refusal(thinned, ((12, 3), (17, 5))).reason

    def without_number(tape: Tape, x: Tensor) -> Tensor:
        return x[::2].sum(0)

    found = generalize(compiled(without_number, 9, 3), compiled(without_number, 14, 5), same_body)
    assert isinstance(found, Generalized)
    recorded = record(without_number, 16, 4)
    assert_same(found.graph(*recorded.operands), recorded.results)


def test_a_part_of_a_length_is_no_batch_and_a_constant() -> None:
    """4 of 12 and 6 of 18 steps are 2 more than batches of 2 and 4: by chance."""

    def thirds(tape: Tape, x: Tensor) -> Tensor:
        return torch.ones(x.size(0) // 3) * 2

    assert "more than one way" in refusal(thirds, ((12, 2), (18, 4))).reason


def test_the_last_step_is_no_part_of_a_length() -> None:
    def ends(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
        return x[-1].sin(), x[1].sin(), x[1:].sin()

    found = generalize(compiled(ends, 9, 3), compiled(ends, 10, 3), same_body)
    assert isinstance(found, Generalized), found


def test_sizes_of_the_same_product_are_refused() -> None:
    def rows(tape: Tape, x: Tensor) -> Tensor:
        return x.view(x.size(0) * x.size(1), -1)

    assert "the same product" in refusal(rows, ((4, 3), (6, 2))).reason


def test_other_operations_are_refused() -> None:
    def branching(tape: Tape, x: Tensor) -> Tensor:
        return x.sin() if x.size(0) > 6 else x.cos()

    assert "aten.sin" in refusal(branching, ((5, 3), (7, 4))).reason


def test_another_number_of_operations_is_refused() -> None:
    def longer(tape: Tape, x: Tensor) -> Tensor:
        return x.sin().cos() if x.size(0) > 6 else x.cos()

    assert "operations" in refusal(longer, ((5, 3), (7, 4))).reason


def test_another_kernel_is_refused() -> None:
    first, second = compiled(recurrent, 5, 3), compiled(recurrent, 7, 4)
    found = generalize(first, second, lambda a, b: False)
    assert isinstance(found, Refusal)
    assert "another kernel" in found.reason


def test_other_dtypes_are_refused() -> None:
    first, second = compiled(recurrent, 5, 3), compiled(recurrent, 7, 4)
    [*_, x] = second.graph.find_nodes(op="placeholder")
    object.__setattr__(x.meta["val"], "dtype", torch.float64)
    found = generalize(first, second, same_body)
    assert isinstance(found, Refusal)
    assert "dtype" in found.reason


def test_generalizing_a_general_graph_keeps_it() -> None:
    found = generalized(recurrent)
    again = generalize(found.graph, found.graph, same_body)
    assert isinstance(again, Generalized)
    assert again.graph.code == found.graph.code
    assert again.varying == frozenset()


@pytest.mark.parametrize("reads", [False, True])
def test_how_often_a_loop_runs_is_no_other_size_that_may_be_a_part_of_the_length(
    reads: bool,
) -> None:
    """Of 13 and 19 steps, every third one of the seventh on: 3 and 5, as many as there are rows."""

    def settled(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        for t in tape.loop(range(6, x.size(0), 3)):
            v, _ = lif(v, F.linear(x[t // 3 - 2 if reads else 0], W0))
        return v

    found = refusal(settled, ((13, 3), (19, 5)))
    assert ("may be parts of" if reads else "may follow from") in found.reason
    assert isinstance(
        generalize(compiled(settled, 13, 3), compiled(settled, 13, 5), same_body), Generalized
    )


def test_a_loop_over_the_next_steps_follows_from_the_length() -> None:
    def ahead(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        for t in tape.loop(range(x.size(0) - 1)):
            v, _ = lif(v, F.linear(x[t + 1], W0))
        return v

    found = generalize(compiled(ahead, 12, 3), compiled(ahead, 14, 8), same_body)
    assert isinstance(found, Generalized)
    recorded = record(ahead, 13, 5)
    assert_same(found.graph(*recorded.operands), recorded.results)


def test_in_a_graph_that_is_called_a_size_may_be_a_part_of_another() -> None:
    """Rows are so many times as many as there are steps, where the batch stays what it was."""
    first, second = (compiled(counted, steps, steps // 3) for steps in (9, 15))
    assert isinstance(generalize(first, second, same_body), Refusal)
    assert isinstance(generalize(first, second, same_body, is_called=True), Generalized)


def counted(tape: Tape, x: Tensor) -> Tensor:
    return torch.zeros(x.size(1), H) + 1
