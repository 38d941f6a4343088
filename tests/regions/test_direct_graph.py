"""Compiled graphs run without fx: same results, and values that are made once are never given."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.graphs.direct_graph import MOST_ELEMENTS, MOST_SIZES, SharedValue, direct
from sparsify.serving.engine import Engine
from tests.models.small_nets import HIDDEN, RecurrentNet, fill_dyadic, spikes

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


class WithStates(nn.Module):
    """Returns its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        fill_dyadic(self)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        s = v = torch.zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.5 * v + x_t + self.rec(s)
            s = (v > 0.5).to(v.dtype)
            out.append(s)
        return torch.stack(out), v, s


def inputs() -> Tensor:
    return (torch.rand(6, 3, HIDDEN) > 0.5).float()


def compiled(model: nn.Module, *examples: Tensor) -> tuple[Any, Engine]:
    fast = cast(Any, model).sparsify(examples[0], timing=False)
    for example in examples[1:]:
        fast(example)
    return fast, cast(Engine, fast.compiled)


def shared_values(engine: Engine) -> list[SharedValue]:
    run: Any = engine.entries[0].forward
    return [value for value in vars(run.__self__).values() if isinstance(value, SharedValue)]


@torch.no_grad()
def test_states_that_are_made_once_are_not_given_away() -> None:
    model, x = WithStates().eval(), inputs()
    fast, engine = compiled(model, x)
    [shared] = shared_values(engine)
    expected = model(x)
    for _ in range(3):
        results = fast(x)
        for result, wanted in zip(results, expected, strict=True):
            assert torch.equal(result, wanted)
            result.fill_(7.0)
    [made] = shared._made.values()
    assert not made.any()


@torch.no_grad()
def test_a_kernel_that_cannot_run_gives_copies_away() -> None:
    """The Scan returns the states that it begins with when there are no steps."""
    _, engine = compiled(WithStates().eval(), inputs())
    [region] = engine.compiled.regions.values()
    given = torch.zeros(3, HIDDEN)
    carries, xs = [given] * region.scan.carries, [inputs()[:0]]
    consts = [torch.rand(HIDDEN, HIDDEN)] * region.scan.consts
    for result in region(0, carries, xs, consts)[: region.scan.carries]:
        assert torch.equal(result, given)
        assert result.data_ptr() != given.data_ptr()


@torch.no_grad()
def test_one_graph_for_all_sizes_makes_a_value_for_each() -> None:
    model = RecurrentNet().eval()
    fast, engine = compiled(model, spikes(6, 3), spikes(5, 4))
    for steps, batch in ((6, 3), (5, 4), (9, 2), (9, 2), (9, 3), (1, 1)):
        x = spikes(steps, batch)
        assert torch.equal(fast(x), model(x))
    assert engine.entries[0].is_general
    values = shared_values(engine)
    assert values
    assert all({(3, HIDDEN), (2, HIDDEN)} <= shared._made.keys() for shared in values)


@torch.no_grad()
def test_a_direct_graph_computes_what_the_graph_does() -> None:
    model, x = RecurrentNet().eval(), spikes(6, 3)
    _, engine = compiled(model, x)
    [entry] = engine.entries
    operands = entry.calling.operands((x,), {})
    wanted = entry.compiled.graph.forward(*operands)
    for result, expected in zip(entry.forward(*operands), wanted, strict=True):
        assert torch.equal(result, expected)


def test_values_that_others_read_are_made_anew() -> None:
    graph = fx.Graph()
    device = torch.device("cpu")
    made = graph.call_function(
        torch.ops.aten.full.default, ([2, 3], 0), {"dtype": torch.float32, "device": device}
    )
    graph.output((made,))
    run = direct(fx.GraphModule(nn.Module(), graph))
    run()[0].fill_(1.0)
    assert not run()[0].any()


def test_few_and_small_values_are_kept() -> None:
    shared = SharedValue(0, torch.float32)
    for size in range(3 * MOST_SIZES):
        shared([size, 2])
    assert len(shared._made) <= MOST_SIZES
    assert shared([1, MOST_ELEMENTS + 1]) is not shared([1, MOST_ELEMENTS + 1])
    with torch.inference_mode():
        assert not SharedValue(0, torch.float32)([4]).is_inference()


class Spikes(WithStates):
    """Returns its spikes alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x)[:1]


@torch.no_grad()
@pytest.mark.parametrize("kind", [Spikes, WithStates])
def test_last_states_that_nobody_reads_are_not_made_anew(kind: type[WithStates]) -> None:
    model, x = kind().eval(), inputs()
    _, engine = compiled(model, x)
    [entry], [region] = engine.entries, engine.compiled.regions.values()
    operands = entry.calling.operands((x,), {})
    repeat: Any = region.launchable
    asked = []

    def watched(*call: Any) -> Any:
        asked.append(call[4])
        return type(repeat).repeat(repeat, *call)

    repeat.repeat = watched
    kept = [entry.forward(*operands) for _ in range(3)]
    ends = {i for i, o in enumerate(region.lowered.kernel.outputs) if "T" not in o.axes}
    assert len(ends) == 2
    assert set(asked) == {frozenset(ends if kind is Spikes else ())}
    assert len({id(result) for results in kept for result in results}) == 3 * len(model(x))
    for results in kept:
        for result, wanted in zip(results, model(x), strict=True):
            assert torch.equal(result, wanted)
