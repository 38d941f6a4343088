"""How much Python runs a recorded operation: calls are counted, as times are not to be trusted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.api import sparsify
from sparsify.checking.check_recording import why_not_repeated
from sparsify.passes.pipeline import PIPELINE
from sparsify.recording import recorder
from sparsify.recording.guard import Seen
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.recording.unwritten_graph import UnwrittenGraph
from sparsify.recording.values import Values
from sparsify.serving.engine import Engine

# Long enough that a loop has the rounds that a short one spends on its ends.
FEW, MANY = 50, 150
MOST_OF_PASSES = 50  # measured: 38 and 46
MOST_OF_CHECKS = 12  # measured: 9
MOST_FOLLOWED = 12  # calls and returns of an operation that is recorded; measured: 10


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = w = x.new_zeros(x.shape[1], 6)
        votes = []
        for t in range(x.shape[0]):
            v = 0.9 * v + self.first(x[t])
            spikes = (v > 1).to(v.dtype)
            v = v - spikes
            w = 0.9 * w + self.second(spikes)
            fired = (w > 1).to(w.dtype)
            w = w - fired
            votes.append(self.out(fired))
        return torch.stack(votes).mean(0)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(5, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], 6)
        for x_t in x:
            v = 0.9 * v + self.inp(x_t) + self.rec(spikes)
            spikes = (v > 1).to(v.dtype)
            v = v - spikes
        return spikes


def count_calls(work: Callable[[], object], of: CodeType | None = None) -> int:
    """How often ``work`` calls Python functions, or the one whose code is ``of``."""
    counted = 0

    def count(frame: FrameType, event: str, arg: object) -> None:
        nonlocal counted
        counted += event == "call" and of in (None, frame.f_code)

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


@torch.no_grad()
def recorded(model: nn.Module, steps: int) -> tuple[Recording, Tensor]:
    x = (torch.rand(steps, 2, 5) < 0.5).float()
    found = record(model, (x,), {}, restore=True)
    assert isinstance(found, Recording)
    return found, x


def run_passes(graph: fx.GraphModule) -> fx.GraphModule:
    for each in PIPELINE:
        graph = each(graph).graph
    return graph


def growth(work: Callable[[Recording, Tensor], object], model: nn.Module) -> tuple[float, float]:
    """Calls a node that come with more steps, and the same for the next steps: equal if linear."""
    found = [recorded(model, steps) for steps in (FEW, MANY, 2 * MANY - FEW)]
    calls = [count_calls(lambda f=f, x=x: work(f, x)) for f, x in found]  # type: ignore[misc]
    nodes = [len(f.graph.graph.nodes) for f, _ in found]
    first, second = (
        (calls[i + 1] - calls[i]) / (nodes[i + 1] - nodes[i]) for i in range(len(calls) - 1)
    )
    return first, second


@pytest.mark.parametrize("model", [TwoLayers(), Recurrent()], ids=lambda m: type(m).__name__)
def test_passes_call_a_bounded_number_of_functions_a_recorded_operation(model: nn.Module) -> None:
    first, second = growth(lambda found, x: run_passes(found.graph), model.eval())
    assert 0 < first < MOST_OF_PASSES
    assert second == pytest.approx(first, rel=0.02)  # lookups of dicts that grow, now and then


@pytest.mark.parametrize("model", [TwoLayers(), Recurrent()], ids=lambda m: type(m).__name__)
def test_the_check_calls_a_bounded_number_of_functions_a_recorded_operation(
    model: nn.Module,
) -> None:
    def check(found: Recording, x: Tensor) -> None:
        with torch.no_grad():
            assert why_not_repeated(model, found, (x,), {}) == ""

    first, second = growth(check, model.eval())
    assert 0 < first < MOST_OF_CHECKS
    assert second == pytest.approx(first, rel=0.02)


def test_no_python_is_written_for_the_unrolled_stages() -> None:
    found, _ = recorded(TwoLayers().eval(), FEW)
    graph = run_passes(found.graph)
    assert any(node.op == "call_module" for node in graph.graph.nodes)
    assert isinstance(found.graph, UnwrittenGraph)
    assert "_code" not in vars(found.graph)


@pytest.mark.parametrize("trains", [False, True])
def test_beside_the_recorded_run_the_model_runs_once(trains: bool) -> None:
    """Profilers do not see the recorded one."""
    model = Recurrent().train(trains)
    x = (torch.rand(FEW, 2, 5) < 0.5).float()
    made: list[nn.Module] = []
    runs = count_calls(
        lambda: made.append(sparsify(model, x, timing=False)), of=Recurrent.forward.__code__
    )
    assert runs == 1
    assert isinstance(made[0].compiled, Engine) and made[0].compiled.is_compiled


@torch.no_grad()
def test_what_torch_does_in_its_operations_is_not_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = 0
    profiler = Seen.profiler

    def counted(seen: Seen) -> Callable[[FrameType, str, Any], bool]:
        follow = profiler(seen)

        def count(frame: FrameType, event: str, arg: object) -> bool:
            nonlocal told
            told += 1
            return follow(frame, event, arg)

        return count

    monkeypatch.setattr(Seen, "profiler", counted)
    found, _ = recorded(Recurrent().eval(), MANY)
    assert 0 < told < MOST_FOLLOWED * len(found.graph.graph.nodes)


def test_results_that_are_gone_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch keeps of each would lie in the hole that it has left, so that none fits others."""
    made: list[Values] = []

    class Noted(Values):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(recorder, "Values", Noted)
    for steps in (FEW, MANY):
        recorded(Recurrent().eval(), steps)
    few, many = (len(values._memories) for values in made)
    # Those that are left are of weights, results, and steps of the input, of which no more is made.
    assert 0 < few == many


def test_a_tensor_that_is_where_another_one_was_has_no_value_of_its() -> None:
    values, node = Values(), fx.Graph().placeholder("x")
    gone = torch.zeros(3)
    values.add_root(gone, node)
    place = id(gone)
    del gone
    others = [torch.zeros(3) for _ in range(100)]
    found = [tensor for tensor in others if id(tensor) == place]
    assert found, "Python gave its place to none of them, so nothing is tested"
    assert values.get(found[0]) is None
