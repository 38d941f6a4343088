"""The definition of the kernel IR: a numpy interpreter, one statement at a time.

Readable first. Every operation rounds to the dtype of its statement, as the backends must: event
kernels are compared with this file bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsify import ir
from sparsify.check_ir import check_kernel, read_dtype, value_dtypes
from sparsify.scalars.fused import fused
from sparsify.scalars.halves import computed, to_dtype
from sparsify.scalars.scalar_ops import SCALAR_OPS, operand_dtypes

Array = npt.NDArray[Any]


def run_reference(
    kernel: ir.Kernel,
    tensors: Mapping[str, Array],
    *,
    steps: int,
    batch: int,
) -> dict[str, Array]:
    """Run ``kernel`` for ``steps`` time steps and ``batch`` rows.

    ``tensors`` holds operands with their axes in the order T, B, N, and weights
    of the shapes that ``ir.Weight`` states. Returns the outputs, ``[T, B, N]`` or ``[B, N]``; those
    that are bits, operands too, are uint8 ``[T, B, ceil(N / 8)]``. Halves are float32 here, given
    and returned.
    Raises ValueError for a malformed kernel, and for zero steps where an output is the last
    step's value.
    """
    check_kernel(kernel)
    if steps == 0 and any("T" not in output.axes for output in kernel.outputs):
        raise ValueError("zero steps: an output without a T axis has no last step")
    with np.errstate(all="ignore"):
        return _Interpreter(kernel, tensors, steps, batch).run()


@np.errstate(all="ignore")
def gather(weight: Array, source: Array) -> Array:
    """``[R, S]`` and ``[B, S]`` to ``[B, R]``, added in the order that ``ir.Gather`` states."""
    receivers, senders = weight.shape
    total = np.zeros((len(source), receivers), weight.dtype)
    for start in range(0, senders, ir.GATHER_BLOCK):
        block = np.zeros_like(total)
        for s in range(start, min(start + ir.GATHER_BLOCK, senders)):
            active = (source[:, s] != 0)[:, None]
            payload = source[:, s].astype(weight.dtype)[:, None]
            block = np.where(active, fused(weight[:, s], payload, block), block)
        total = total + block
    return total


@np.errstate(all="ignore")
def convolve(weight: Array, source: Array, convolution: ir.Convolution) -> Array:
    """``[channels, taps]`` and ``[B, S]`` to ``[B, R]``, in the order that ``ir.Gather`` states."""
    (senders, receivers), (rows, columns) = convolution.channels, convolution.window
    source = _pooled(source.reshape(-1, senders, *convolution.senders), convolution)
    padding = [(0, 0), (0, 0), *((pad, pad) for pad in convolution.padding)]
    maps = np.pad(source, padding).astype(weight.dtype)
    taps = weight.reshape(receivers, senders, rows, columns)
    total = np.zeros((len(source), receivers, *convolution.receivers), weight.dtype)
    for row, column, channel in np.ndindex(rows, columns, senders):
        firsts = row * convolution.dilation[0], column * convolution.dilation[1]
        under = (
            slice(first, first + step * (count - 1) + 1, step)
            for first, step, count in zip(
                firsts, convolution.stride, convolution.receivers, strict=True
            )
        )
        payload = maps[(slice(None), slice(channel, channel + 1), *under)]
        added = fused(taps[:, channel, row, column, None, None], payload, total)
        total = np.where(payload != 0, added, total)
    return total.reshape(len(source), -1)


def _pooled(source: Array, convolution: ir.Convolution) -> Array:
    """``[B, channels, rows, columns]`` of blocks, active where one of their senders is."""
    (rows, columns), (high, wide) = convolution.maps, convolution.pooling
    if (high, wide) == (1, 1):
        return source
    cut = source[:, :, : rows * high, : columns * wide]
    blocks = cut.reshape(*source.shape[:2], rows, high, columns, wide).any((3, 5))
    return np.asarray(blocks)


@np.errstate(all="ignore")
def wanted(only: Array, source: Array, dtype: ir.DType) -> Array:
    """Which sums of a restricted Gather are computed: bools ``[B, R]``, see ``ir.Gather``."""
    wild = ~(np.abs(source.astype(dtype)) < ir.WILD[dtype]).all(1)
    return np.asarray((only != 0) | wild[:, None])


class _Interpreter:
    def __init__(
        self,
        kernel: ir.Kernel,
        tensors: Mapping[str, Array],
        steps: int,
        batch: int,
    ) -> None:
        self.kernel = kernel
        self.tensors = tensors
        self.steps = steps
        self.batch = batch
        self.dtypes = value_dtypes(kernel)
        self.values: dict[str, Array] = {}  # of this step, each [B, N]
        self.next: dict[str, Array] = {}  # states of the next step
        self.outputs: dict[str, Array] = {}
        self.stored = {o.name: read_dtype(o) for o in kernel.outputs}
        self.packed = {o.name for o in kernel.outputs if o.dtype == "bits"}

    def run(self) -> dict[str, Array]:
        for output in self.kernel.outputs:
            shape = (self.batch, self.kernel.population_size(output.population))
            leading = (self.steps,) if "T" in output.axes else ()
            self.outputs[output.name] = np.zeros(leading + shape, computed(read_dtype(output)))
        for state in self.kernel.states:
            init = self._operand(state.init, 0)
            size = self.kernel.population_size(state.population)
            self.values[state.name] = np.broadcast_to(init, (self.batch, size))
        times = range(self.steps)
        for t in reversed(times) if self.kernel.reverse else times:
            self._step(t)
        for name in self.packed:
            self.outputs[name] = np.packbits(self.outputs[name], axis=-1, bitorder="little")
        return self.outputs

    def _step(self, t: int) -> None:
        for operand in self.kernel.operands:
            self.values[operand.name] = self._operand(operand.name, t)
        for phase in self.kernel.phases:
            size = self.kernel.population_size(phase.population)
            for statement in phase.body:
                self._statement(statement, t, (self.batch, size))
        self.values.update(self.next)

    def _statement(self, statement: ir.Statement, t: int, shape: tuple[int, int]) -> None:
        match statement:
            case ir.Let(result=result):
                self.values[result] = np.broadcast_to(self._let(statement), shape)
            case ir.Gather(result=result):
                self.values[result] = self._gather(statement)
            case ir.Update(state=state, value=value):
                self.next[state] = self._full(value, self.dtypes[state], shape)
            case ir.Store(output=output, value=value):
                target = self.outputs[output]
                where = target[t] if target.ndim == 3 else target
                where[...] = self._full(value, self.stored[output], shape)

    def _gather(self, statement: ir.Gather) -> Array:
        source, matrix = self.values[statement.source], self.tensors[statement.weight]
        convolution = self.kernel.weight(statement.weight).convolution
        if convolution is not None:
            return convolve(matrix, source, convolution)
        total = gather(matrix, source)
        if statement.only is None:
            return total
        keep = wanted(self.values[statement.only], source, self.dtypes[statement.result])
        return np.where(keep, total, np.zeros_like(total))

    def _let(self, let: ir.Let) -> Array:
        op = SCALAR_OPS[let.op]
        given = tuple(None if isinstance(a, ir.Const) else self.dtypes[a] for a in let.args)
        wanted = operand_dtypes(op, given, let.dtype)
        assert wanted is not None  # check_kernel refuses comparisons of literals
        args = [self._arg(a, dtype) for a, dtype in zip(let.args, wanted, strict=True)]
        return to_dtype(np.asarray(op.reference(*args)), let.dtype)

    def _arg(self, arg: ir.Arg, dtype: ir.DType) -> Array:
        if isinstance(arg, ir.Const):
            return np.asarray(arg.value, dtype)
        return self.values[arg]

    def _full(self, arg: ir.Arg, dtype: ir.DType, shape: tuple[int, int]) -> Array:
        value = np.asarray(arg.value) if isinstance(arg, ir.Const) else self.values[arg]
        return np.broadcast_to(to_dtype(value, dtype), shape).copy()

    def _operand(self, name: str, t: int) -> Array:
        """The operand at step ``t``, with axes [B, N] (of extent 1 where it lacks one)."""
        operand = next(o for o in self.kernel.operands if o.name == name)
        value = np.asarray(self.tensors[name])
        value = value[t] if "T" in operand.axes else value
        if operand.dtype == "bits":
            assert operand.population is not None
            size = self.kernel.population_size(operand.population)
            value = np.unpackbits(value, axis=-1, count=size, bitorder="little").astype(np.bool_)
        if "B" not in operand.axes:
            value = value[None]
        return value if "N" in operand.axes else value[..., None]
