"""Random kernels, schedules and data, as hypothesis draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cpp.strategies import STRATEGIES
from sparsify.codegen.slots import TORCH_DTYPES
from sparsify.reference import Array
from sparsify.scalars.halves import HALVES, computed, to_dtype
from sparsify.scalars.scalar_op import ScalarOp
from sparsify.scalars.scalar_ops import SCALAR_OPS

SIZES = (1, 2, 7, 16, 33, 65, 130, 257, 300)  # around tiles and the block of 256 senders
VALUE_DTYPES: tuple[ir.DType, ...] = ("float32", "float64", "int32", "int64", "bool")
AXES: tuple[tuple[ir.Axis, ...], ...] = (
    ("T", "B", "N"),
    ("T", "B", "N"),
    ("B", "N"),
    ("N",),
    ("T",),
    ("T", "N"),
    ("B",),
    (),
)
SUBNORMAL = {"float32": 1e-42, "float64": 1e-42, "bfloat16": 1e-39, "float16": 1e-7}
# Of tests that compile what is drawn.
COMPILED = settings(
    deadline=None,
    derandomize=True,  # a fresh machine compiles every kernel, so the same ones each time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=(Phase.explicit, Phase.generate),  # to shrink takes minutes of compiling
)
# Integers only count: a product that overflows has no meaning to compare.
INTEGER_OPS = ("maximum", "minimum", "where", "gt", "le", "eq", "ne", "neg")


@dataclass
class Drawn:
    """A kernel, how to run it, and which of its operands hold only 0 and 1."""

    kernel: ir.Kernel
    schedule: ir.Schedule
    binary: frozenset[str]


@dataclass
class _Builder:
    draw: st.DrawFn
    float_dtype: ir.DType
    populations: list[ir.Population] = field(default_factory=list)
    operands: list[ir.Operand] = field(default_factory=list)
    weights: list[ir.Weight] = field(default_factory=list)
    states: list[ir.State] = field(default_factory=list)
    outputs: list[ir.Output] = field(default_factory=list)
    dtypes: dict[str, ir.DType] = field(default_factory=dict)
    where: dict[str, str | None] = field(default_factory=dict)  # value -> population
    binary: set[str] = field(default_factory=set)
    gatherable: set[str] = field(default_factory=set)
    updated_in: dict[str, int] = field(default_factory=dict)  # state -> index of the phase
    restricted: bool = False  # gathers are restricted wherever they can be
    half: ir.DType | None = None  # of operands, states and weights, beside the others
    fresh: int = 0

    def name(self, prefix: str) -> str:
        self.fresh += 1
        return f"{prefix}{self.fresh}"

    def define(self, name: str, dtype: ir.DType, population: str | None) -> str:
        self.dtypes[name], self.where[name] = dtype, population
        if dtype == "bool":
            self.binary.add(name)
        return name

    def operand(self, axes: tuple[ir.Axis, ...], population: str, dtype: ir.DType) -> str:
        where = population if "N" in axes else None
        name = self.define(self.name("operand"), dtype, where)
        self.operands.append(ir.Operand(name, axes, where, self.in_memory(axes, dtype)))
        return name

    def in_memory(self, axes: tuple[ir.Axis, ...], dtype: ir.DType) -> ir.DType:
        """Bools of all steps may be bits."""
        can_be_bits = dtype == "bool" and axes == ("T", "B", "N")
        return "bits" if can_be_bits and self.draw(st.booleans()) else dtype

    def readable(self, population: str, dtype: ir.DType) -> list[str]:
        return [
            n
            for n, d in self.dtypes.items()
            if dtype in (d, computed(d)) and self.where[n] in (None, population)
        ]

    def floats(self) -> tuple[ir.DType, ...]:
        """Dtypes that are drawn where there may be floats."""
        return (self.float_dtype, self.half or self.float_dtype)

    def arg(self, population: str, dtype: ir.DType, *, exactly: bool = False) -> ir.Arg:
        known = self.readable(population, dtype)
        if exactly:
            known = [name for name in known if self.dtypes[name] == dtype]
        if known and self.draw(st.integers(0, 4)) > 0:
            name: str = self.draw(st.sampled_from(known))
            return name
        if dtype == "bool":
            return ir.Const(self.draw(st.booleans()))
        if dtype in ("int32", "int64"):
            return ir.Const(self.draw(st.integers(-3, 3)))
        return ir.Const(self.draw(st.sampled_from((0.5, -0.0, 0.9, 1.0, -2.75, 1e-3))))


@st.composite
def kernels(draw: st.DrawFn, restricted: bool = False, halves: bool = False) -> Drawn:
    """A kernel of one to three populations and phases, with a schedule that fits it.

    Its gathers are restricted wherever they can be, or nowhere. With ``halves`` some of what lies
    in memory is float16 or bfloat16.
    """
    b = _Builder(draw, draw(st.sampled_from(("float32", "float64"))), restricted=restricted)
    if halves:
        b.float_dtype, b.half = "float32", draw(st.sampled_from(HALVES))
    for index in range(draw(st.integers(1, 3))):
        b.populations.append(ir.Population(f"layer{index}", draw(st.sampled_from(SIZES))))
    names = [p.name for p in b.populations]
    order = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
    for population in names:
        _draw_operands(b, population)
    for population in dict.fromkeys(order):
        _draw_states(b, population, [i for i, name in enumerate(order) if name == population])
    phases = [_draw_phase(b, population, index) for index, population in enumerate(order)]
    kernel = ir.Kernel(
        name="random",
        populations=tuple(b.populations),
        operands=tuple(b.operands),
        weights=tuple(b.weights),
        states=tuple(b.states),
        phases=tuple(phases),
        outputs=tuple(b.outputs),
        origin=("test_kernels.py",),
        reverse=draw(st.booleans()),
    )
    return Drawn(kernel, draw_schedule(draw, kernel), frozenset(b.binary))


def draw_schedule(draw: st.DrawFn, kernel: ir.Kernel) -> ir.Schedule:
    """Gathers of binary payloads may be dense: their sums are exact, see ``draw_data``."""
    gathers: list[tuple[str, Literal["event", "dense"]]] = [
        (g.result, "dense" if g.payload == "binary" and draw(st.booleans()) else "event")
        for g in kernel.gathers
    ]
    tile = draw(st.sampled_from((0, 0, 16, 32, 64, 128, 256, 512)))
    schedules = [ir.Schedule(strategy.name, tuple(gathers), tile) for strategy in STRATEGIES]
    pairs = zip(STRATEGIES, schedules, strict=True)
    return draw(st.sampled_from([s for each, s in pairs if each.why_not(kernel, s) is None]))


def _draw_operands(b: _Builder, population: str) -> None:
    for _ in range(b.draw(st.integers(1, 2))):
        axes = b.draw(st.sampled_from(AXES))
        dtype = b.draw(st.sampled_from((*b.floats(), "bool", "int32", "int64")))
        name = b.operand(axes, population, dtype)
        if b.draw(st.booleans()):
            b.binary.add(name)
        if axes[-2:] == ("B", "N"):
            b.gatherable.add(name)


def _draw_states(b: _Builder, population: str, phases: list[int]) -> None:
    for _ in range(b.draw(st.integers(0, 2))):
        dtype = b.draw(st.sampled_from((*b.floats(), "bool", "int32")))
        axes: tuple[ir.Axis, ...] = b.draw(st.sampled_from((("B", "N"), ("N",), ())))
        init = b.operand(axes, population, dtype)
        name = b.define(b.name("state"), dtype, population)
        b.states.append(ir.State(name, population, dtype, init))
        b.updated_in[name] = b.draw(st.sampled_from(phases))
        b.gatherable.add(name)


def _draw_phase(b: _Builder, population: str, index: int) -> ir.Phase:
    body: list[ir.Statement] = []
    for _ in range(b.draw(st.integers(0, 2))):
        body += _draw_gather(b, population)
    body += [_draw_let(b, population) for _ in range(b.draw(st.integers(1, 5)))]
    for state in b.states:
        if b.updated_in[state.name] == index:
            body.append(ir.Update(state.name, b.arg(population, state.dtype, exactly=True)))
    body += [_draw_store(b, population) for _ in range(b.draw(st.integers(1, 2)))]
    b.gatherable |= {s.result for s in body if isinstance(s, ir.Let | ir.Gather)}
    return ir.Phase(population, tuple(body))


def _draw_gather(b: _Builder, population: str) -> list[ir.Statement]:
    readable = (*b.floats(), "bool", "int32", "int64")
    sources = [name for name in b.gatherable if b.dtypes[name] in readable]
    if not sources:
        return []
    binary = sorted(b.binary.intersection(sources))
    source = b.draw(st.sampled_from(binary if b.restricted and binary else sorted(sources)))
    weight = b.name("weight")
    senders = b.where[source]
    assert senders is not None
    dtype = b.draw(st.sampled_from(b.floats())) if b.half else b.float_dtype
    b.weights.append(ir.Weight(weight, population, senders, dtype))
    is_binary = source in b.binary and (b.restricted or b.draw(st.booleans()))
    payload: ir.Payload = "binary" if is_binary else "real"
    result = b.define(b.name("sum"), b.float_dtype, population)
    wanting = [name for name in sorted(b.gatherable) if b.where[name] == population]
    if payload == "real" or not wanting or not b.restricted:
        return [ir.Gather(result, weight, source, payload)]
    return [ir.Gather(result, weight, source, payload, only=b.draw(st.sampled_from(wanting)))]


def _draw_let(b: _Builder, population: str) -> ir.Let:
    op = SCALAR_OPS[b.draw(st.sampled_from(sorted(SCALAR_OPS)))]
    if op.rule == "cast":
        return _draw_cast(b, population)
    allowed = [
        d for d in op.dtypes if d in ("bool", "float32", "float64") or op.name in INTEGER_OPS
    ]
    dtype = b.draw(st.sampled_from(allowed))
    args = _draw_args(b, op, population, dtype)
    result_dtype: ir.DType = "bool" if op.rule in ("compare", "logical") else dtype
    result = b.define(b.name("value"), result_dtype, population)
    return ir.Let(result, op.name, args, result_dtype)


def _draw_args(b: _Builder, op: ScalarOp, population: str, dtype: ir.DType) -> tuple[ir.Arg, ...]:
    args = [b.arg(population, dtype) for _ in range(op.arity)]
    if op.rule == "select":
        args[0] = b.arg(population, "bool")
    if op.rule == "compare" and all(isinstance(a, ir.Const) for a in args):
        known = b.readable(population, dtype)
        args[0] = known[0] if known else b.operand(("B", "N"), population, dtype)
    return tuple(args)


def _draw_cast(b: _Builder, population: str) -> ir.Let:
    """Never a float to an integer: out of range that is undefined."""
    allowed: tuple[ir.DType, ...] = ("float32", "float64", "bool")
    into = b.draw(st.sampled_from((*allowed, b.half, b.half) if b.half else allowed))
    sources = [n for d in VALUE_DTYPES for n in b.readable(population, d)]
    source = b.draw(st.sampled_from(sources)) if sources else b.operand((), population, "float32")
    result = b.define(b.name("value"), into, population)
    if b.dtypes[source] == "bool":
        b.binary.add(result)
    return ir.Let(result, "cast", (source,), into)


def _draw_store(b: _Builder, population: str) -> ir.Store:
    readable = [n for n, p in b.where.items() if p in (None, population)]
    value = b.draw(st.sampled_from(readable))
    axes: tuple[ir.Axis, ...] = b.draw(st.sampled_from((("T", "B", "N"), ("B", "N"))))
    name = b.name("output")
    b.outputs.append(ir.Output(name, axes, population, b.in_memory(axes, b.dtypes[value])))
    return ir.Store(name, value)


def in_memory(values: Array, dtype: ir.DType) -> Array:
    """``values`` as a kernel is given them."""
    if dtype == "bits":
        return np.packbits(values != 0, axis=-1, bitorder="little")
    return to_dtype(values, dtype)


def tensors_of(kernel: ir.Kernel, data: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """``data`` as torch has it: halves are float32 in numpy."""
    dtypes = {o.name: o.dtype for o in kernel.operands} | {w.name: w.dtype for w in kernel.weights}
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    for name in tensors:
        if dtypes.get(name) in HALVES:
            tensors[name] = tensors[name].to(TORCH_DTYPES[dtypes[name]])
    return tensors


def array_of(tensor: torch.Tensor) -> Array:
    """A result as the reference has it."""
    is_half = tensor.dtype in (torch.float16, torch.bfloat16)
    array: Array = (tensor.float() if is_half else tensor).numpy()
    return array


def draw_data(
    drawn: Drawn, seed: int, steps: int, batch: int, *, activity: float, special: bool
) -> dict[str, Array]:
    """Tensors for a kernel; ``special`` mixes in infinities, NaN, -0 and subnormals.

    Weights of dense and restricted gathers are multiples of 1/64 up to 1: sums of 0 and 1 times
    those are exact in float32 for up to 2**18 senders, so the order of additions cannot matter.
    """
    rng = np.random.default_rng(seed)
    kernel = drawn.kernel
    data: dict[str, Array] = {}
    for operand in kernel.operands:
        size = 0 if operand.population is None else kernel.population_size(operand.population)
        extent = {"T": steps, "B": batch, "N": size}
        shape = tuple(extent[axis] for axis in operand.axes)
        values = np.asarray(rng.standard_normal(shape) * (rng.random(shape) < activity))
        if operand.name in drawn.binary:
            values = (values != 0).astype(np.float64)
        elif special and operand.dtype in SUBNORMAL:
            odd = rng.choice((np.inf, -np.inf, np.nan, -0.0, SUBNORMAL[operand.dtype]), shape)
            values = np.where(rng.random(shape) < 0.1, odd, values)
        elif operand.dtype in ("int32", "int64"):
            values = np.rint(values * 2)
        data[operand.name] = in_memory(np.asarray(values), operand.dtype)
    dense = {result for result, how in drawn.schedule.gathers if how == "dense"}
    exact = {g.weight for g in kernel.gathers if g.result in dense or g.only is not None}
    for weight in kernel.weights:
        shape = (kernel.population_size(weight.receivers), kernel.population_size(weight.senders))
        values = rng.standard_normal(shape)
        if weight.name in exact:
            values = rng.integers(-64, 65, shape) / 64
        data[weight.name] = to_dtype(values, weight.dtype)
    return data
