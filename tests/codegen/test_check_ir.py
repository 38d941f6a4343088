"""What is wrong with a kernel is said, naming the statement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from sparsify import ir
from sparsify.check_ir import check_kernel, value_dtypes, why_malformed_kernel
from tests.kernels.example_kernels import lif, two_layers
from tests.kernels.random_kernels import Drawn, kernels

LIF = lif(5, 7)


def with_body(*extra: ir.Statement, first: bool = False) -> ir.Kernel:
    body = LIF.phases[0].body
    return replace(LIF, phases=(ir.Phase("hidden", extra + body if first else body + extra),))


def without(kind: type) -> ir.Kernel:
    body = tuple(s for s in LIF.phases[0].body if not isinstance(s, kind))
    return replace(LIF, phases=(ir.Phase("hidden", body),))


def operand(axes: tuple[ir.Axis, ...], population: str | None) -> ir.Kernel:
    return replace(LIF, operands=(*LIF.operands, ir.Operand("o", axes, population, "float32")))


MALFORMED: list[tuple[ir.Kernel, str]] = [
    (replace(LIF, populations=(*LIF.populations, ir.Population("hidden", 3))), "two populations"),
    (with_body(ir.Let("v", "neg", ("spike",), "float32")), "two values are called 'v'"),
    (replace(LIF, outputs=(*LIF.outputs, LIF.outputs[0])), "two outputs are called 'spikes'"),
    (lif(0, 7), "'inputs' has 0 neurons"),
    (operand(("B", "T"), None), "has axes"),
    (operand(("N",), None), "an N axis and a population go together"),
    (operand(("B", "N"), "nobody"), "no population 'nobody'"),
    (replace(LIF, weights=(replace(LIF.weights[0], dtype="int32"),)), "is int32"),
    (replace(LIF, outputs=(replace(LIF.outputs[0], axes=("N",)),)), "has axes"),
    (replace(LIF, outputs=(replace(LIF.outputs[1], dtype="bits"),)), "'last_v' is bits with axes"),
    (replace(LIF, states=(replace(LIF.states[0], dtype="bits"),)), "'v' is bits, which only"),
    (replace(LIF, outputs=(replace(LIF.outputs[0], dtype="bits"),)), "'spikes' is bool, the value"),
    (replace(LIF, states=(replace(LIF.states[0], init="x"),)), "not an operand without T"),
    (replace(LIF, states=(replace(LIF.states[0], dtype="float64"),)), "another dtype"),
    (with_body(ir.Let("a", "nothing", ("v",), "float32")), "no scalar op 'nothing'"),
    (with_body(ir.Let("a", "neg", ("later",), "float32")), "not defined before it is read"),
    (with_body(ir.Let("a", "neg", ("x",), "float32")), "belongs to population 'inputs'"),
    (with_body(ir.Let("a", "neg", ("v",), "float64")), "is float32, expected float64"),
    (with_body(ir.Gather("a", "none", "s", "real")), "no weight 'none'"),
    (with_body(ir.Gather("a", "w_rec", "spike", "real")), "not a value of an earlier phase"),
    (with_body(ir.Gather("a", "w_in", "s", "real")), "connects other populations"),
    (with_body(ir.Store("spikes", "spike")), "output 'spikes' is written twice"),
    (with_body(ir.Update("v", "rest")), "state 'v' is written twice"),
    (with_body(ir.Store("none", "spike")), "no output 'none'"),
    (with_body(ir.Store("spikes", "above"), first=True), "not defined before"),
    (without(ir.Update), "state 's' is never written"),
    (without(ir.Store), "output 'last_s' is never written"),
]


@pytest.mark.parametrize(("kernel", "reason"), MALFORMED)
def test_malformed(kernel: ir.Kernel, reason: str) -> None:
    with pytest.raises(ValueError, match="kernel 'recurrent_lif': ") as raised:
        check_kernel(kernel)
    assert reason in str(raised.value)


@pytest.mark.parametrize("kernel", [LIF, lif(1, 1, "float64"), two_layers(3, 4)])
def test_well_formed(kernel: ir.Kernel) -> None:
    assert why_malformed_kernel(kernel) is None


def test_value_dtypes() -> None:
    dtypes = value_dtypes(LIF)
    assert dtypes["above"] == "bool" and dtypes["drive"] == "float32" and dtypes["v0"] == "float32"


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=kernels())
def test_random_kernels_are_well_formed(drawn: Drawn) -> None:
    assert why_malformed_kernel(drawn.kernel) is None
