"""Kernels of convolutional layers, and data for them."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from sparsify import ir
from sparsify.reference import Array


def neurons(channels: int, maps: ir.Pair) -> int:
    return channels * math.prod(maps)


def leaky_maps(
    convolution: ir.Convolution,
    dtype: ir.DType = "float32",
    payload: ir.Payload = "real",
    source: ir.DType | None = None,
) -> ir.Kernel:
    """Leaky integrate-and-fire neurons that a convolution of inputs drives."""
    inputs = neurons(convolution.channels[0], convolution.senders)
    maps = neurons(convolution.channels[1], convolution.receivers)
    state = "float32" if dtype in ("float16", "bfloat16") else dtype
    body = (
        ir.Gather("drive", "w", "x", payload, "self.conv(x)"),
        ir.Let("decayed", "mul", ("v", ir.Const(0.5)), state),
        ir.Let("charged", "add", ("decayed", "drive"), state, "v = 0.5 * v + current"),
        ir.Let("above", "gt", ("charged", ir.Const(1.0)), "bool"),
        ir.Let("spike", "cast", ("above",), state),
        ir.Let("rest", "sub", ("charged", "spike"), state),
        ir.Update("v", "rest"),
        ir.Store("charges", "charged"),
        ir.Store("spikes", "above"),
    )
    return ir.Kernel(
        name="leaky_maps",
        populations=(ir.Population("inputs", inputs), ir.Population("maps", maps)),
        operands=(
            ir.Operand("x", ("T", "B", "N"), "inputs", source or dtype, "x"),
            ir.Operand("v0", ("N",), "maps", state),
        ),
        weights=(ir.Weight("w", "maps", "inputs", dtype, "conv.weight", convolution),),
        states=(ir.State("v", "maps", state, "v0", "membrane potential"),),
        phases=(ir.Phase("maps", body),),
        outputs=(
            ir.Output("charges", ("T", "B", "N"), "maps", state),
            ir.Output("spikes", ("T", "B", "N"), "maps", "bits"),
        ),
        origin=("net.py:7  v = 0.5 * v + self.conv(x)",),
    )


def recurrent_maps(channels: int, maps: ir.Pair) -> ir.Kernel:
    """Neurons that read their own spikes of the step before through a convolution."""
    convolution = ir.Convolution((channels, channels), maps, (3, 3), padding=(1, 1))
    body = (
        ir.Gather("recurrent", "w", "s", "binary"),
        ir.Let("decayed", "mul", ("v", ir.Const(0.5)), "float32"),
        ir.Let("current", "add", ("recurrent", "x"), "float32"),
        ir.Let("charged", "add", ("decayed", "current"), "float32"),
        ir.Let("above", "gt", ("charged", ir.Const(1.0)), "bool"),
        ir.Let("spike", "cast", ("above",), "float32"),
        ir.Let("rest", "sub", ("charged", "spike"), "float32"),
        ir.Update("v", "rest"),
        ir.Update("s", "spike"),
        ir.Store("spikes", "spike"),
    )
    return ir.Kernel(
        name="recurrent_maps",
        populations=(ir.Population("maps", neurons(channels, maps)),),
        operands=(
            ir.Operand("x", ("T", "B", "N"), "maps", "float32"),
            ir.Operand("v0", ("B", "N"), "maps", "float32"),
            ir.Operand("s0", ("B", "N"), "maps", "float32"),
        ),
        weights=(ir.Weight("w", "maps", "maps", "float32", "", convolution),),
        states=(ir.State("v", "maps", "float32", "v0"), ir.State("s", "maps", "float32", "s0")),
        phases=(ir.Phase("maps", body),),
        outputs=(ir.Output("spikes", ("T", "B", "N"), "maps", "float32"),),
    )


@st.composite
def convolutions(draw: st.DrawFn, pooling: bool = False) -> ir.Convolution:
    """Odd sizes, windows that reach beyond the map, and channels around tiles."""

    def pair(*sizes: int) -> ir.Pair:
        return draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))

    convolution = ir.Convolution(
        (draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 7, 16, 33, 40)))),
        pair(1, 4, 7, 18),
        pair(1, 2, 3, 5),
        pair(1, 2, 3),
        pair(0, 1, 2),
        pair(1, 2),
        draw(st.sampled_from(((1, 1), (1, 1), (2, 2), (2, 3)))) if pooling else (1, 1),
    )
    assume(min(*convolution.receivers, *convolution.maps) >= 1)
    return convolution


def convolution_data(
    kernel: ir.Kernel, steps: int, batch: int, activity: float, seed: int = 0
) -> dict[str, Array]:
    """Payloads of the first row are 1, those of the second 0, others real or binary."""
    rng = np.random.default_rng(seed)
    data: dict[str, Array] = {}
    for operand in kernel.operands:
        extent = {"T": steps, "B": batch, "N": kernel.population_size(str(operand.population))}
        shape = [extent[axis] for axis in operand.axes]
        values = rng.standard_normal(shape)
        if "T" in operand.axes:
            active = rng.random(shape) < activity
            binary = operand.dtype == "bool" or kernel.gathers[0].payload == "binary"
            values = np.where(active, 1.0 if binary else values, 0.0)
            values[:, :1] = active[:, :1]
            values[:, 1:2] = 0
        if operand.name == "s0":
            values = np.where(values > 1, 1.0, 0.0)
        numpy_dtype = "bool" if operand.dtype == "bool" else operand.dtype
        data[operand.name] = values.astype(numpy_dtype)
    for weight in kernel.weights:
        values = rng.standard_normal(kernel.weight_shape(weight)) * 0.3
        data[weight.name] = values.astype("float32" if weight.dtype == "bfloat16" else weight.dtype)
    return data
