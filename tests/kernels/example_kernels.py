"""Kernels that tests know by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from sparsify import ir
from sparsify.reference import Array

How = Literal["event", "dense"]
STRATEGIES = ("rows-per-thread", "neurons-per-thread")
OF_INPUTS = (*STRATEGIES, "inputs-ahead")  # for kernels with a product of inputs


def schedule(kernel: ir.Kernel, strategy: str, how: How = "event", tile: int = 0) -> ir.Schedule:
    return ir.Schedule(strategy, tuple((g.result, how) for g in kernel.gathers), tile)


def lif(inputs: int, hidden: int, dtype: ir.DType = "float32") -> ir.Kernel:
    """A recurrent layer of leaky integrate-and-fire neurons, reset by subtraction."""
    threshold, leak = ir.Const(1.0), ir.Const(0.9)
    body = (
        ir.Gather("drive", "w_in", "x", "binary", "self.fc(x)"),
        ir.Gather("recurrent", "w_rec", "s", "binary", "self.rec(s)"),
        ir.Let("current", "add", ("drive", "recurrent"), dtype),
        ir.Let("decayed", "mul", ("v", leak), dtype),
        ir.Let("charged", "add", ("decayed", "current"), dtype, "v = 0.9 * v + current"),
        ir.Let("above", "gt", ("charged", threshold), "bool"),
        ir.Let("spike", "cast", ("above",), dtype, "s = (v > 1.0).float()"),
        ir.Let("drop", "mul", ("spike", threshold), dtype),
        ir.Let("rest", "sub", ("charged", "drop"), dtype),
        ir.Update("v", "rest"),
        ir.Update("s", "spike"),
        ir.Store("spikes", "spike"),
        ir.Store("last_v", "rest"),
        ir.Store("last_s", "spike"),
    )
    return ir.Kernel(
        name="recurrent_lif",
        populations=(ir.Population("inputs", inputs), ir.Population("hidden", hidden)),
        operands=(
            ir.Operand("x", ("T", "B", "N"), "inputs", dtype, "x"),
            ir.Operand("v0", ("B", "N"), "hidden", dtype),
            ir.Operand("s0", ("B", "N"), "hidden", dtype),
        ),
        weights=(
            ir.Weight("w_in", "hidden", "inputs", dtype, note="fc.weight"),
            ir.Weight("w_rec", "hidden", "hidden", dtype, note="rec.weight"),
        ),
        states=(
            ir.State("v", "hidden", dtype, "v0", "membrane potential"),
            ir.State("s", "hidden", dtype, "s0", "spikes"),
        ),
        phases=(ir.Phase("hidden", body),),
        outputs=(
            ir.Output("spikes", ("T", "B", "N"), "hidden", dtype),
            ir.Output("last_v", ("B", "N"), "hidden", dtype),
            ir.Output("last_s", ("B", "N"), "hidden", dtype),
        ),
        origin=("model.py:41  s, v = self.cell(x[t], s, v)",),
    )


def lif_data(kernel: ir.Kernel, steps: int, batch: int, seed: int = 0) -> dict[str, Array]:
    """Data with which about a tenth of the neurons fire."""
    rng = np.random.default_rng(seed)
    inputs, hidden = (kernel.population_size(name) for name in ("inputs", "hidden"))
    dtype = kernel.operands[0].dtype
    values = {
        "x": rng.random((steps, batch, inputs)) < 0.1,
        "v0": rng.standard_normal((batch, hidden)),
        "s0": rng.random((batch, hidden)) < 0.1,
        "w_in": rng.standard_normal((hidden, inputs)) * 1.5 / inputs**0.5,
        "w_rec": rng.standard_normal((hidden, hidden)) / hidden**0.5,
    }
    return {name: np.ascontiguousarray(v).astype(dtype) for name, v in values.items()}


def lif_gradient(hidden: int, dtype: ir.DType = "float32") -> ir.Kernel:
    """The way back through ``lif`` with a surrogate gradient that is zero far from threshold."""
    near = ir.Phase(
        "hidden",
        (
            ir.Let("distance", "sub", ("v", ir.Const(1.0)), dtype),
            ir.Let("away", "abs", ("distance",), dtype),
            ir.Let("near", "lt", ("away", ir.Const(0.5)), "bool"),
        ),
    )
    body = (
        ir.Gather("returned", "w_rec", "d", "real", "self.rec(s)", only="near"),
        ir.Let("arrived", "add", ("returned", "g"), dtype),
        ir.Let("passed", "where", ("near", "arrived", ir.Const(0.0)), dtype),
        ir.Let("decayed", "mul", ("d", ir.Const(0.5)), dtype),
        ir.Let("d_new", "add", ("decayed", "passed"), dtype),
        ir.Update("d", "d_new"),
        ir.Store("currents", "d_new"),
        ir.Store("products", "returned"),
        ir.Store("first", "d_new"),
    )
    every: tuple[ir.Axis, ...] = ("T", "B", "N")
    return ir.Kernel(
        name="lif_gradient",
        populations=(ir.Population("hidden", hidden),),
        operands=(
            ir.Operand("v", every, "hidden", dtype, "charged"),
            ir.Operand("g", every, "hidden", dtype, "gradient of the spikes"),
            ir.Operand("d0", ("B", "N"), "hidden", dtype),
        ),
        weights=(ir.Weight("w_rec", "hidden", "hidden", dtype, note="rec.weight, transposed"),),
        states=(ir.State("d", "hidden", dtype, "d0", "gradient of the current"),),
        phases=(near, ir.Phase("hidden", body)),
        outputs=(
            ir.Output("currents", every, "hidden", dtype),
            ir.Output("products", every, "hidden", dtype),
            ir.Output("first", ("B", "N"), "hidden", dtype),
        ),
        origin=("model.py:41  s, v = self.cell(x[t], s, v)",),
        reverse=True,
    )


EVERY: tuple[ir.Axis, ...] = ("T", "B", "N")


def gate_of_bits(hidden: int) -> ir.Kernel:
    """Reads bits as a condition, as events and as what a product is restricted to; writes bits."""
    first = ir.Phase(
        "hidden",
        (
            ir.Gather("excitation", "w", "fired", "real"),
            ir.Let("silent", "logical_not", ("fired",), "bool"),
            ir.Let("bit", "logical_and", ("near", "silent"), "bool"),
            ir.Let("chosen", "where", ("near", "g", ir.Const(0.0)), "float32"),
            ir.Let("driven", "add", ("chosen", "excitation"), "float32"),
            ir.Store("passed", "bit"),
            ir.Store("drive", "driven"),
        ),
    )
    second = ir.Phase(
        "hidden",
        (
            ir.Gather("returned", "w", "chosen", "real", only="near"),
            ir.Gather("copied", "w", "fired", "binary", only="fired"),
            ir.Let("both", "add", ("returned", "copied"), "float32"),
            ir.Store("out", "both"),
        ),
    )
    return ir.Kernel(
        name="gate_of_bits",
        populations=(ir.Population("hidden", hidden),),
        operands=(
            ir.Operand("near", EVERY, "hidden", "bits", "near threshold"),
            ir.Operand("fired", EVERY, "hidden", "bits"),
            ir.Operand("g", EVERY, "hidden", "float32"),
        ),
        weights=(ir.Weight("w", "hidden", "hidden", "float32"),),
        states=(),
        phases=(first, second),
        outputs=(
            ir.Output("passed", EVERY, "hidden", "bits"),
            ir.Output("drive", EVERY, "hidden", "float32"),
            ir.Output("out", EVERY, "hidden", "float32"),
        ),
        origin=("model.py:41  s, v = self.cell(x[t], s, v)",),
    )


def gradient_data(
    kernel: ir.Kernel, steps: int, batch: int, share: float, seed: int = 0
) -> dict[str, Array]:
    """Data of ``lif_gradient`` with the ``share`` of potentials near threshold.

    All are integers, each receiver has 4 weights of 1 or -1, and a step halves what it keeps: after
    5 steps, values have at most 15 bits before the point and 5 behind it. Sums are exact.

    Weights and gradients are small multiples of powers of two.
    """
    rng = np.random.default_rng(seed)
    hidden = kernel.population_size("hidden")
    shape = (steps, batch, hidden)
    weight = np.zeros((hidden, hidden))
    for _ in range(4):
        weight[np.arange(hidden), rng.integers(0, hidden, hidden)] = rng.choice((-1, 1), hidden)
    values = {
        "v": np.where(rng.random(shape) < share, 1.25, 3.0),
        "g": rng.integers(-4, 5, shape),
        "d0": rng.integers(-4, 5, (batch, hidden)),
        "w_rec": weight,
    }
    return {
        name: np.ascontiguousarray(v).astype(kernel.operands[0].dtype) for name, v in values.items()
    }


def two_layers(first: int, second: int) -> ir.Kernel:
    """Feed-forward: ReLU events of one layer reach the next in the same step, which feeds back."""
    one = ir.Phase(
        "one",
        (
            ir.Gather("back", "w_back", "h", "real"),
            ir.Let("sum", "add", ("x", "back"), "float32"),
            ir.Let("shifted", "sub", ("sum", "bias"), "float32"),
            ir.Let("active", "relu", ("shifted",), "float32"),
        ),
    )
    two = ir.Phase(
        "two",
        (
            ir.Gather("forward", "w_forward", "active", "real"),
            ir.Let("squashed", "tanh", ("forward",), "float32"),
            ir.Let("half", "mul", ("squashed", ir.Const(0.5)), "float32"),
            ir.Let("new", "relu", ("half",), "float32"),
            ir.Update("h", "new"),
            ir.Store("out", "new"),
        ),
    )
    return ir.Kernel(
        name="two_layers",
        populations=(ir.Population("one", first), ir.Population("two", second)),
        operands=(
            ir.Operand("x", ("T", "B", "N"), "one", "float32"),
            ir.Operand("bias", ("N",), "one", "float32"),
            ir.Operand("h0", (), None, "float32"),
        ),
        weights=(
            ir.Weight("w_back", "one", "two", "float32"),
            ir.Weight("w_forward", "two", "one", "float32"),
        ),
        states=(ir.State("h", "two", "float32", "h0"),),
        phases=(one, two),
        outputs=(ir.Output("out", ("T", "B", "N"), "two", "float32"),),
        origin=("model.py:12  h = torch.relu(torch.tanh(self.up(torch.relu(a))) * 0.5)",),
    )


def product(senders: int, receivers: int, dtype: ir.DType = "float32") -> ir.Kernel:
    """One gather of an input, stored."""
    return ir.Kernel(
        name="product",
        populations=(ir.Population("senders", senders), ir.Population("receivers", receivers)),
        operands=(ir.Operand("x", ("T", "B", "N"), "senders", dtype),),
        weights=(ir.Weight("w", "receivers", "senders", dtype),),
        states=(),
        phases=(ir.Phase("receivers", (ir.Gather("y", "w", "x", "real"), ir.Store("out", "y"))),),
        outputs=(ir.Output("out", ("T", "B", "N"), "receivers", dtype),),
    )


def renamed(value: Any) -> Any:
    """All names and notes of a kernel, or of a part of it, say something else."""
    if isinstance(value, str):
        return f"{value}_of_another_layer"
    if isinstance(value, tuple):
        return tuple(map(renamed, value))
    if not hasattr(value, "__dataclass_fields__"):
        return value
    kept = {"dtype", "axes", "op", "payload"}
    fields = [f for f in value.__dataclass_fields__ if f not in kept]
    return replace(value, **{field: renamed(getattr(value, field)) for field in fields})
