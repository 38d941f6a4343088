from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.nodes.classify_ops import PRODUCTS
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.products.scan_products import scan_products
from sparsify.passes.products.unify_products import unify_products
from tests.models.looped_models import ROLLED_WHOLE, W0, W1, W2, WEIGHTS, B, H, lif, zeros
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import prepared, scans_of, with_regions
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

Model = Callable[[Tape, Tensor], Any]
aten = torch.ops.aten
BIAS = WEIGHTS["bias"]


def layer(tape: Tape, current: Tensor) -> Tensor:
    v, out = torch.zeros(current.shape[1:]), []
    for t in tape.loop(range(current.size(0))):
        v, z = lif(v, current[t])
        out.append(z)
    return torch.stack(out)


def layers(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    z = layer(tape, F.linear(x, W0))
    z = layer(tape, F.linear(z, W1, BIAS))
    return F.linear(z, W2), F.linear(z[-1], W2)


def batch_first_layers(tape: Tape, x: Tensor) -> Tensor:
    z = layer(tape, F.linear(x, W0)).transpose(0, 1)
    current = F.linear(z, W1, BIAS)
    return layer(tape, current.transpose(0, 1))


def perceptron(tape: Tape, x: Tensor) -> Tensor:
    h = F.relu(F.linear(x, W0))
    return F.relu(F.linear(h, W1, BIAS)) @ W2


def read_twice(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    current = F.linear(layer(tape, F.linear(x, W0)), W1)
    return layer(tape, current), current


def moved(model: Model, x: Tensor) -> tuple[Unrolled, PassResult]:
    recorded = record_unrolled(model, [x], WEIGHTS)
    graph = find_events(roll_loops(unify_products(recorded.graph).graph).graph).graph
    return recorded, scan_products(split_time(graph).graph)


def products(graph: fx.GraphModule) -> int:
    return sum(node.target in PRODUCTS for node in graph.graph.nodes)


MODELS = (layers, batch_first_layers, perceptron, read_twice)


@pytest.mark.parametrize("model", [*MODELS, *ROLLED_WHOLE], ids=lambda model: model.__name__)
def test_results_stay_the_same_and_the_second_time_nothing_is_done(model: Model) -> None:
    recorded, once = moved(model, dyadic(3, B, H))
    assert_same(once.graph(*recorded.operands), recorded.results)

    annotated = find_events(once.graph).graph
    twice = scan_products(annotated)
    assert twice.graph is annotated
    assert twice.done == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_new_loops_become_kernels(model: Model) -> None:
    recorded = record_unrolled(model, [dyadic(3, B, H)], WEIGHTS)
    graph = prepared(recorded)
    launchables = with_regions(graph)
    assert_same(graph(*recorded.operands), recorded.results)
    assert all(launchable.calls for launchable in launchables.values())


def test_a_current_that_feeds_only_a_loop_is_computed_inside_of_it() -> None:
    _, result = moved(layers, dyadic(3, B, H))
    fused, whole, last = result.done
    assert "moved into the loop" in fused
    assert "made a loop of its own" in whole
    assert "made a loop of its own" in last
    assert products(result.graph) == 1  # of the input
    bodies = [s for s in scans_of(result.graph).values() if s.carries and products(s.body)]
    [body] = bodies
    assert [x.meta["val"].shape for x in body.placeholders] == [(B, H), (B, H), (H,), (H, H)] or [
        x.meta["val"].shape for x in body.placeholders
    ] == [(B, H), (B, H), (H, H), (H,)]


def test_batch_first_currents_are_fused_too() -> None:
    _, result = moved(batch_first_layers, dyadic(3, B, H))
    assert ["moved into the loop" in sentence for sentence in result.done] == [True]


def test_a_current_that_others_read_is_a_loop_of_its_own() -> None:
    _, result = moved(read_twice, dyadic(3, B, H))
    assert ["made a loop of its own" in sentence for sentence in result.done] == [True]
    [alone] = [s for s in scans_of(result.graph).values() if not s.carries]
    assert alone.placeholders[0].meta["val"].shape == (3 * B, H)


def test_products_of_values_without_threshold_stay() -> None:
    _, result = moved(layers, dyadic(3, B, H))
    [refusal] = result.declined
    assert refusal.code == "no-event"
    assert refusal.location is not None
    assert refusal.location.file == "model.py"


@pytest.mark.parametrize(("activity", "loops"), [(0.5, 0), (0.05, 1)])
def test_an_input_that_was_mostly_zeros_counts_as_events(activity: float, loops: int) -> None:
    recorded = record_unrolled(lambda tape, x: F.linear(x, W0), [dyadic(4, B, H)], WEIGHTS)
    for node in recorded.graph.graph.nodes:
        if node.target in PRODUCTS:
            node.meta["activity"] = activity
    result = scan_products(find_events(recorded.graph).graph)
    assert len(scans_of(result.graph)) == loops
    assert_same(result.graph(*recorded.operands), recorded.results)


def test_a_product_of_two_activations_stays() -> None:
    def attention(tape: Tape, x: Tensor) -> Tensor:
        z = F.relu(x[0])
        return z @ x[1].t()

    _, result = moved(attention, dyadic(2, B, H))
    [refusal] = result.declined
    assert refusal.code == "unsupported-layout"
    assert "both depend on the input" in refusal.reason
    assert result.done == []


def test_a_convolution_of_events_gets_a_loop_of_its_own() -> None:
    kernel, bias, x = dyadic(2, 1, 3, 3), dyadic(2), dyadic(2, 1, 4, 4)
    recorded = record_unrolled(
        lambda tape, x: F.conv2d((x > 0).float(), kernel, bias), [x], {"kernel": kernel, "b": bias}
    )
    annotated = find_events(recorded.graph).graph
    result = scan_products(annotated)
    assert (len(result.done), result.declined) == (1, [])
    assert any(node.op == "call_module" for node in result.graph.graph.nodes)
    stays = scan_products(annotated, convolutions=False)
    [refusal] = stays.declined
    assert (stays.done, refusal.code) == ([], "unsupported-layout")
    assert "for the CPU" in refusal.reason


@pytest.mark.parametrize(
    ("convolve", "shape", "weight", "said"),
    [
        (F.conv_transpose2d, (2, 1, 4, 4), (1, 2, 3, 3), "Transposed convolutions"),
        (partial(F.conv2d, groups=2), (2, 2, 4, 4), (2, 1, 3, 3), "in 2 groups"),
        (F.conv3d, (2, 1, 4, 4, 4), (2, 1, 3, 3, 3), "along 3 dims"),
    ],
)
def test_convolutions_without_a_kernel_stay(
    convolve: Any, shape: tuple[int, ...], weight: tuple[int, ...], said: str
) -> None:
    kernel = dyadic(*weight)
    recorded = record_unrolled(
        lambda tape, x: convolve((x > 0).float(), kernel), [dyadic(*shape)], {"kernel": kernel}
    )
    result = scan_products(find_events(recorded.graph).graph)
    [refusal] = result.declined
    assert (result.done, refusal.code) == ([], "unsupported-layout")
    assert said in refusal.reason


def test_zeros_before_any_event_are_no_events() -> None:
    recorded = record_unrolled(
        lambda tape, x: F.linear(torch.zeros(B, H), W0) + x, [dyadic(B, H)], WEIGHTS
    )
    [refusal] = scan_products(find_events(recorded.graph).graph).declined
    assert refusal.code == "no-event"
    assert "zeros" in refusal.reason


def test_a_current_of_a_loop_that_cannot_be_a_kernel_is_not_moved_into_it() -> None:
    def normalised(tape: Tape, x: Tensor) -> Tensor:
        current = F.linear((x > 0).float(), W0)
        v, out = zeros(x), []
        for t in tape.loop(range(x.size(0))):
            v = torch.softmax(v + current[t], 1)
            out.append(v)
        return torch.stack(out)

    recorded, result = moved(normalised, dyadic(3, B, H))
    assert ["made a loop of its own" in sentence for sentence in result.done] == [True]
    for got, wanted in zip(result.graph(*recorded.operands), recorded.results, strict=True):
        assert torch.equal(got, wanted)
