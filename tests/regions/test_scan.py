from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx

from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.scans.scan import Scan, retyped
from tests.models.looped_models import WEIGHTS, B, H, float_start, recurrent
from tests.unrolled import dyadic, record_unrolled

aten = torch.ops.aten


def integrator() -> Scan:
    """One carry v, one x, one const w: v' = v * w + x, y = v' > 1."""
    graph = fx.Graph()
    v, x, w = (graph.placeholder(name) for name in ("v", "x", "w"))
    total = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (v, w)), x))
    spike = graph.call_function(aten.gt.Scalar, (total, 1.0))
    as_float = graph.call_function(aten._to_copy.default, (spike,), {"dtype": torch.float32})
    graph.output((total, as_float))
    return Scan(fx.GraphModule({}, graph), carries=1, xs=1, consts=1)


def operands(steps: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return [torch.zeros(2, 3)], [torch.ones(steps, 2, 3)], [torch.full((3,), 0.5)]


def test_forward_returns_final_carries_and_stacked_ys() -> None:
    v, spikes = integrator()(3, *operands(3))
    assert torch.equal(v, torch.full((2, 3), 1.75))
    assert spikes.shape == (3, 2, 3)
    assert spikes.is_contiguous()
    assert spikes[:, 0, 0].tolist() == [0.0, 1.0, 1.0]


def test_zero_steps_return_the_initial_carries_and_empty_ys() -> None:
    v, spikes = integrator()(0, *operands(0))
    assert torch.equal(v, torch.zeros(2, 3))
    assert spikes.shape == (0, 2, 3)
    assert spikes.dtype is torch.float32


def test_trace_states_has_the_carries_at_the_start_of_every_step() -> None:
    scan = integrator()
    trace = scan.trace_states(3, *operands(3))
    [carried] = trace.carries
    assert carried[:, 0, 0].tolist() == [0.0, 1.0, 1.5]
    for got, expected in zip(trace.outputs, scan(3, *operands(3)), strict=True):
        assert torch.equal(got, expected)


def test_trace_states_of_no_steps_is_empty() -> None:
    assert integrator().trace_states(0, *operands(0)).carries[0].shape == (0, 2, 3)


def test_all_steps_started_from_traced_carries_give_the_same_values() -> None:
    recorded = record_unrolled(recurrent, [dyadic(6, B, H, seed=7)], WEIGHTS)
    rolled = roll_loops(recorded.graph).graph
    scan = rolled.get_submodule("scan_0")
    assert isinstance(scan, Scan)
    x = recorded.operands[-1]
    consts = [WEIGHTS[p.name] for p in scan.placeholders[scan.carries + scan.xs :]]
    trace = scan.trace_states(6, [torch.zeros(B, H), torch.zeros(B, H)], [x], consts)

    for step in range(6):
        results = scan.body(*(carry[step] for carry in trace.carries), x[step], *consts)
        assert torch.equal(results[-1], trace.outputs[-1][step])


def test_retyped_scan_computes_in_float64() -> None:
    scan = integrator()
    carries, xs, consts = ([t.double() for t in group] for group in operands(3))
    v, spikes = scan.retyped(torch.float64)(3, carries, xs, consts)
    assert v.dtype is torch.float64
    assert spikes.dtype is torch.float64
    assert scan(3, carries, xs, consts)[1].dtype is torch.float32  # the original is untouched


def test_retyped_graph_also_changes_default_dtypes_and_scans() -> None:
    recorded = record_unrolled(float_start, [dyadic(6, B, H, seed=7)], WEIGHTS)
    rolled = roll_loops(recorded.graph).graph
    for node in rolled.graph.nodes:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    [result] = retyped(rolled, torch.float64)(*(t.double() for t in recorded.operands))
    assert result.dtype is torch.float64
    # Few dyadic terms are exact in both precisions; the division at the end is not.
    assert torch.equal(result.float(), recorded.results[0])


def test_a_scan_survives_deepcopy() -> None:
    scan = integrator()
    twin = copy.deepcopy(scan)
    assert twin.roles == ["carry", "x", "const"]
    assert torch.equal(twin(3, *operands(3))[0], scan(3, *operands(3))[0])


def test_roles_are_marked_on_the_placeholders() -> None:
    assert [p.meta["role"] for p in integrator().placeholders] == ["carry", "x", "const"]


def test_too_few_operands_are_an_error() -> None:
    with pytest.raises(ValueError, match="takes carries=1, xs=1, consts=1, but 1 carries, 1 xs"):
        integrator()(3, *operands(3)[:2], [])


def test_too_few_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"xs\[0\] has 3 steps, 4 are to be run"):
        integrator()(4, *operands(3))


def test_a_body_of_another_arity_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 placeholders cannot take 1 carries, 1 xs and 2 consts"):
        Scan(integrator().body, carries=1, xs=1, consts=2)


def test_the_graph_reads_as_a_call_of_the_scan() -> None:
    recorded = record_unrolled(recurrent, [dyadic(6, B, H, seed=7)], WEIGHTS)
    code = roll_loops(recorded.graph).graph.code
    assert "self.scan_0(6, (full_default" in code
