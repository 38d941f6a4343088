"""Recordings with gradients go through the passes as others do, and keep their gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.compiling.compiled import Stage
from sparsify.compiling.lower_scans import lower_forward
from sparsify.compiling.stages import run_pipeline
from sparsify.errors import Refusal
from sparsify.ir import Let
from sparsify.passes.events.find_events import find_events
from sparsify.passes.events.without_gradients import is_application, without_gradients
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.sizes.generalize import Generalized, generalize
from sparsify.recording.application import Application
from sparsify.recording.recording import Recording
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan, retyped
from sparsify.serving.general_modules import GeneralModules
from tests.models.surrogates import SURROGATES, ATan, CapturedApply
from tests.models.zoo import ENTRIES, EXACT_STEPS, Entry
from tests.recorded import recorded as recorded_without
from tests.recorded_gradients import (
    Gradients,
    Weighted,
    gradients_of,
    leaves_of,
    recorded,
    tensors_in,
)
from tests.recording.test_recording_training import LIF, STEPS

aten = torch.ops.aten
NAMES = {
    *("delayed reset", "graded spikes", "exponential decay", "feedback"),
    *("first step differs", "adaptive threshold", "straight-through sums", "graded recurrent"),
    *("EGRU, two exchanges", "EGRU, joined operands", "resets itself", "tuple state"),
    *("nn.RNN relu, two layers", "soft-threshold video"),
}
CHOSEN = [entry for entry in ENTRIES if entry.name in NAMES]
named = pytest.mark.parametrize("entry", CHOSEN, ids=lambda entry: entry.name)


def training(entry: Entry, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    x = entry.inputs(dtype=dtype)
    return entry.model(dtype), x.requires_grad_(x.is_floating_point())


def executed(stage: Stage, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    values: tuple[Tensor, ...] = fx.Interpreter(stage.graph).run(*operands)
    return values


def assert_close(got: Gradients, wanted: Gradients) -> None:
    """In float64. Passes move products out of loops, so sums are rounded in another order.

    A gradient sums at most a few thousand products and passes a dozen steps whose factors are of
    order one: 1e5 roundings of 1.1e-16 of what is summed, which is taken to be within a hundred
    times the largest gradient.
    """
    assert [g is None for g in got] == [g is None for g in wanted]
    for one, other in zip(got, wanted, strict=True):
        if one is not None and other is not None:
            bound = 1e5 * 2.0**-53 * 100 * float(other.abs().max())
            assert float((one - other).abs().max()) <= bound


def kernels(recording: Recording) -> dict[str, object]:
    """What each Scan is lowered to: the operations of its phases, or the code of the refusal.

    The names of values are the user's, and may be those of other values of the same line.
    """
    graph = run_pipeline(recording.graph)[-1].graph
    scans = {name: m for name, m in graph.named_children() if isinstance(m, Scan)}
    found = {name: lower_forward(scan, name) for name, scan in scans.items()}
    return {n: f.code if isinstance(f, Refusal) else _operations(f) for n, f in found.items()}


def _operations(lowered: Lowered) -> list[list[str]]:
    phases = lowered.kernel.phases
    return [[s.op if isinstance(s, Let) else type(s).__name__ for s in p.body] for p in phases]


@named
def test_gradients_survive_the_pipeline(entry: Entry) -> None:
    model, x = training(entry, torch.float64)
    eager = copy.deepcopy(model)
    recording = recorded(model, x)
    wanted = gradients_of(eager(x), leaves_of(eager, (x,)))
    first, *_, last = run_pipeline(recording.graph)
    operands = recording.calling.operands((x,), {})
    for stage in (first, last):
        assert list(stage.graph.named_children()) or stage is first
        results = executed(stage, operands)[: len(tensors_in(recording.result))]
        leaves = [operand for operand in operands if operand.requires_grad]
        assert_close(gradients_of(list(results), leaves), ordered(recording, wanted, eager))


def ordered(recording: Recording, gradients: Gradients, eager: nn.Module) -> Gradients:
    """Eager's gradients in the order of the graph's operands."""
    names = [name for name, p in eager.named_parameters() if p.requires_grad]
    found = dict(zip([*names, "input"], gradients, strict=False))
    sources = [n.meta["source"] for n in recording.graph.graph.nodes if n.op == "placeholder"]
    keys = ["input" if s.kind == "input" else s.name for s in sources]
    return [found[key] for key in keys if key in found]


@named
def test_the_same_kernels_as_without_gradients(entry: Entry) -> None:
    model, x = training(entry, torch.float32)
    plain = recorded_without(copy.deepcopy(model), x)
    assert kernels(recorded(model, x)) == kernels(plain)


@pytest.mark.parametrize("name", ["recurrent", "graded spikes", "first step differs"])
def test_stages_equal_the_model_where_arithmetic_is_exact(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, x = entry.dyadic_model(), entry.inputs(EXACT_STEPS)
    expected = tensors_in(copy.deepcopy(model)(x))
    recording = recorded(model, x)
    operands = recording.calling.operands((x,), {})
    stages = run_pipeline(recording.graph)
    assert any(isinstance(m, Scan) for _, m in stages[-1].graph.named_children())
    for stage in stages:
        results = executed(stage, operands)[: len(expected)]
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        assert any(result.requires_grad for result in results)


def test_one_graph_for_all_sizes() -> None:
    model = LIF(SURROGATES["triangular"])
    graphs = []
    for batch in (3, 8):
        x = torch.randn(5, batch, 4, requires_grad=True)
        recording = recorded(model, x)
        graphs.append(run_pipeline(recording.graph)[-1].graph)
    general = GeneralModules()
    found = generalize(graphs[0], graphs[1], general.same_module)
    assert isinstance(found, Generalized), found
    for name, module in general.replacing(found.graph).items():
        setattr(found.graph, name, module)
    model.double()
    x = torch.randn(5, 11, 4, dtype=torch.float64, requires_grad=True)
    operands = recording.calling.operands((x,), {})
    [result] = retyped(found.graph, torch.float64)(*operands)
    leaves = [operand for operand in operands if operand.requires_grad]
    wanted = gradients_of(model(x), leaves_of(model, (x,)))
    assert_close(gradients_of(result, leaves), ordered(recording, wanted, model))


def test_different_uses_do_not_pass_for_the_same() -> None:
    """The code of two bodies is the same text where Functions have other arguments."""
    scans = []
    for slope in (1.0, 2.0):
        model = LIF(CapturedApply(slope))
        graph = roll_loops(recorded(model, STEPS).graph).graph
        [scan] = [m for _, m in graph.named_children() if isinstance(m, Scan)]
        scans.append(scan)
    assert scans[0].body.code == scans[1].body.code
    assert not GeneralModules().same_module(*scans)


def test_other_slopes_in_each_iteration_are_not_rolled() -> None:
    def forward(self: Weighted, x: Tensor) -> Tensor:
        for t in range(4):
            x = ATan.apply(x @ self.weight, float(t))
        return x

    rolled = roll_loops(recorded(Weighted(forward), STEPS[0].detach()).graph)
    assert [refusal.code for refusal in rolled.declined] == ["not-rolled"]


def test_events_flow_through_uses() -> None:
    graph = find_events(roll_loops(recorded(LIF(SURROGATES["gaussian"]), STEPS).graph).graph).graph
    [scan] = [m for _, m in graph.named_children() if isinstance(m, Scan)]
    [use] = [node for node in scan.body.graph.nodes if is_application(node)]
    assert use.meta["fact"].event and use.meta["fact"].payload == "binary"
    [detached] = [n for n in scan.body.graph.nodes if "detach" in str(n.target)]
    assert detached.meta["fact"] == use.meta["fact"]


def test_without_gradients() -> None:
    graph = find_events(roll_loops(recorded(LIF(SURROGATES["atan"]), STEPS).graph).graph).graph
    [scan] = [m for _, m in graph.named_children() if isinstance(m, Scan)]
    plain = without_gradients(scan)
    assert not any(isinstance(n.target, Application) for n in plain.body.graph.nodes)
    assert without_gradients(plain) is plain
    lowered = lower_scan(scan, "lif")
    assert isinstance(lowered, Lowered) and lowered == lower_scan(plain, "lif")
    carries = tuple(torch.randn(3, 6) for _ in range(scan.carries))
    xs = tuple(torch.randn(2, 3, 4) for _ in range(scan.xs))
    consts = [node.meta["val"].shape for node in scan.placeholders[scan.carries + scan.xs :]]
    given = tuple(torch.randn(shape) for shape in consts)
    one, other = (s(2, carries, xs, given) for s in (scan, plain))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
