"""A kernel with halves wherever there can be some."""

from __future__ import annotations

import numpy as np

from sparsify import ir
from sparsify.reference import Array
from sparsify.scalars.halves import to_dtype


def half_lif(inputs: int, hidden: int, dtype: ir.DType) -> ir.Kernel:
    """A recurrent layer of leaky integrate-and-fire neurons, as ``model.to(dtype)`` computes it.

    Inputs are real-valued, so that halves are multiplied by halves.
    """
    body = (
        ir.Gather("drive", "w_in", "x", "real", "self.fc(x)"),
        ir.Let("biased", "add", ("bias", "drive"), "float32"),
        ir.Let("input", "cast", ("biased",), dtype),
        ir.Gather("recurrent", "w_rec", "s", "binary", "self.rec(s)"),
        ir.Let("fed_back", "cast", ("recurrent",), dtype),
        ir.Let("both", "add", ("input", "fed_back"), "float32"),
        ir.Let("current", "cast", ("both",), dtype),
        ir.Let("kept", "mul", ("v", ir.Const(0.9)), "float32"),
        ir.Let("decayed", "cast", ("kept",), dtype),
        ir.Let("summed", "add", ("decayed", "current"), "float32"),
        ir.Let("charged", "cast", ("summed",), dtype, "v = 0.9 * v + current"),
        ir.Let("above", "gt", ("charged", ir.Const(1.0)), "bool"),
        ir.Let("spike", "cast", ("above",), dtype, "s = (v > 1).to(v.dtype)"),
        ir.Let("lowered", "sub", ("charged", "spike"), "float32"),
        ir.Let("rest", "cast", ("lowered",), dtype),
        ir.Update("v", "rest"),
        ir.Update("s", "spike"),
        ir.Store("spikes", "spike"),
        ir.Store("last_v", "rest"),
    )
    return ir.Kernel(
        name="half_lif",
        populations=(ir.Population("inputs", inputs), ir.Population("hidden", hidden)),
        operands=(
            ir.Operand("x", ("T", "B", "N"), "inputs", dtype, "x"),
            ir.Operand("bias", ("N",), "hidden", dtype, "fc.bias"),
            ir.Operand("zero", (), None, dtype),
        ),
        weights=(
            ir.Weight("w_in", "hidden", "inputs", dtype, note="fc.weight"),
            ir.Weight("w_rec", "hidden", "hidden", dtype, note="rec.weight"),
        ),
        states=(
            ir.State("v", "hidden", dtype, "zero", "membrane potential"),
            ir.State("s", "hidden", dtype, "zero", "spikes"),
        ),
        phases=(ir.Phase("hidden", body),),
        outputs=(
            ir.Output("spikes", ("T", "B", "N"), "hidden", dtype),
            ir.Output("last_v", ("B", "N"), "hidden", dtype),
        ),
        origin=("model.py:41  s, v = self.cell(x[t], s, v)",),
    )


def half_lif_data(kernel: ir.Kernel, steps: int, batch: int) -> dict[str, Array]:
    """Data with which some fifth of the neurons fire."""
    rng = np.random.default_rng(0)
    inputs, hidden = (kernel.population_size(name) for name in ("inputs", "hidden"))
    values = {
        "x": rng.standard_normal((steps, batch, inputs)) * (rng.random(inputs) < 0.2),
        "bias": rng.standard_normal(hidden) * 0.1,
        "zero": np.zeros(()),
        "w_in": rng.standard_normal((hidden, inputs)) * 1.5 / inputs**0.5,
        "w_rec": rng.standard_normal((hidden, hidden)) / hidden**0.5,
    }
    return {name: to_dtype(value, kernel.operands[0].dtype) for name, value in values.items()}
