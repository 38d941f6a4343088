"""CUDA text around the loops: header comment, sizes, the struct of what a call is given.

``struct Call`` consists of 8-byte words. ``call_members`` lists its members in the order in which
they are written here and filled by the launchable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsify import ir
from sparsify.codegen.cuda.layouts import Kept, arrays_of
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols
from sparsify.codegen.notes_text import shape_note, write_origin
from sparsify.codegen.usage import Packing, packings
from sparsify.codegen.writer import Writer

PAD = 32  # elements; rows of weights are as many as a warp reads at once, so that each is aligned


@dataclass(frozen=True)
class Scratch:
    """Memory that a launch brings beside its tensors. ``name`` is its C++ identifier.

    "word" are 32 bits without a sign. ``zeroed`` memory is zero when the kernel starts, and again
    when it has ended. A kernel sets ``lasting`` memory, one of all calls in the memory of the host,
    when it has given up.
    """

    name: str
    dtype: ir.DType | Literal["word"]
    note: str = ""
    zeroed: bool = False
    lasting: bool = False

    @property
    def kind(self) -> str:
        return "uint32_t" if self.dtype == "word" else MEMORY_TYPES[self.dtype]


@dataclass(frozen=True)
class Member:
    """A pointer of ``struct Call`` and the strides behind it, or a number (``kind`` int64_t).

    ``role`` and ``of`` say what it belongs to: the operand, weight, output or scratch of that name.
    """

    role: Literal["operand", "weight", "total", "kept", "output", "active", "scratch", "number"]
    of: str
    kind: str
    name: str
    axes: tuple[str, ...] = ()
    note: str = ""

    @property
    def declaration(self) -> str:
        strides = ", ".join(f"{self.name}_{axis}" for axis in self.axes)
        star = "" if self.role == "number" else "*"
        return f"{self.kind}{star} {self.name};" + f" int64_t {strides};" * bool(strides)


def padded(neurons: int) -> int:
    """The elements of a row of weights for so many receivers, or senders."""
    return -(-neurons // PAD) * PAD


def packed_name(packing: Packing, symbols: Symbols) -> str:
    """A weight packed ``[sender][receiver]``, or with ``_rows`` ``[receiver][sender]``."""
    name = symbols.values[packing.weight.name]
    return name if packing.by == "receivers" else f"{name}_rows"


def weight_types(dtype: ir.DType) -> str:
    """The template arguments for what a weight is, and for what it is in memory if that differs."""
    kind, in_memory = C_TYPES[dtype], MEMORY_TYPES[dtype]
    return kind if kind == in_memory else f"{kind}, {in_memory}"


def row_length(kernel: ir.Kernel, packing: Packing) -> int:
    """The distance of rows of a packed weight."""
    weight = packing.weight
    along = weight.receivers if packing.by == "receivers" else weight.senders
    return padded(kernel.population_size(along))


def needs_total(packing: Packing, kernel: ir.Kernel, schedule: ir.Schedule) -> bool:
    """Whether gathers skip senders of this weight, which they may only if it is finite."""
    how = dict(schedule.gathers)
    readers = (g for g in kernel.gathers if g.weight == packing.weight.name and g.only is None)
    return packing.by == "receivers" and any(how[g.result] == "event" for g in readers)


def call_members(
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    scratch: Sequence[Scratch] = (),
    numbers: Sequence[str] = (),
    kept: Sequence[Kept] = (),
) -> list[Member]:
    """The members of ``struct Call`` behind ``steps`` and ``batch``.

    ``scratch`` and ``numbers`` are a strategy's own, in its order; ``kept`` is what is packed of
    weights beside their whole rows.
    """
    members: list[Member] = []
    for operand in kernel.operands:
        kind, axes = f"const {MEMORY_TYPES[operand.dtype]}", _strided(operand)
        name, note = symbols.values[operand.name], shape_note(kernel, operand, operand.note)
        members.append(Member("operand", operand.name, kind, name, axes, note))
    for packing in packings(kernel, schedule):
        members += _weight_members(kernel, schedule, symbols, packing)
        rows, of = packed_name(packing, symbols), packing.weight.name
        for array in arrays_of(kept, packing):
            kind, name = f"const {array.kind}", f"{rows}{array.suffix}"
            members.append(Member("kept", of, kind, name, (), array.note))
    for output in kernel.outputs:
        kind, name = MEMORY_TYPES[output.dtype], symbols.outputs[output.name]
        note = shape_note(kernel, output, output.note)
        members.append(Member("output", output.name, kind, name, _strided(output), note))
    counted = "of each gather the active senders, or sums wanted; then the rows and steps"
    members.append(Member("active", "", "unsigned long long", "active", (), counted))
    for memory in scratch:
        members.append(Member("scratch", memory.name, memory.kind, memory.name, (), memory.note))
    members += [Member("number", number, "int64_t", number) for number in numbers]
    return members


def _strided(tensor: ir.Operand | ir.Output) -> tuple[str, ...]:
    return tuple(axis.lower() for axis in tensor.axes if axis != "N")


def _weight_members(
    kernel: ir.Kernel, schedule: ir.Schedule, symbols: Symbols, packing: Packing
) -> list[Member]:
    weight = packing.weight
    sizes = [kernel.population_size(weight.senders), kernel.population_size(weight.receivers)]
    axes = "[sender][receiver]"
    if packing.by == "senders":
        sizes.reverse()
        axes = "[receiver][sender]"
    note = f"{axes} of {sizes[0]} x {sizes[1]} {weight.note}".rstrip()
    kind, name = f"const {MEMORY_TYPES[weight.dtype]}", packed_name(packing, symbols)
    members = [Member("weight", weight.name, kind, name, (), note)]
    if needs_total(packing, kernel, schedule):
        note = "0; not finite if one of its elements is not"
        of_sums = f"const {C_TYPES[weight.dtype]}"
        members.append(Member("total", weight.name, of_sums, f"{name}_total", (), note))
    return members


def write_head(
    w: Writer,
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    headers: Sequence[str] = ("gather.cuh",),
) -> None:
    """Header comment, includes and the sizes of populations; opens the anonymous namespace."""
    write_origin(w, kernel, schedule)
    for header in headers:
        w.line(f'#include "{header}"')
    w.line()
    w.line("namespace {")
    w.line()
    w.line("using namespace sparsify;")
    w.line()
    for population in kernel.populations:
        size = symbols.sizes[population.name]
        w.line(f"constexpr int {size} = {population.size};", f"neurons of {population.name}")


def write_call(w: Writer, kernel: ir.Kernel, members: Sequence[Member]) -> None:
    """The struct that holds what one call is given."""
    w.line()
    w.comment("Element (t, b, n) of a tensor is at [t * _t + b * _b + n].")
    if "bits" in {o.dtype for o in kernel.operands} | {o.dtype for o in kernel.outputs}:
        w.comment("Of N / 8 bytes it is bit n % 8 at [t * _t + b * _b + n / 8].")
    with w.block("struct Call", "};"):
        w.line("int64_t steps, batch;")
        for member in members:
            w.line(member.declaration, member.note)
