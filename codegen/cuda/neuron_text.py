"""CUDA text of what a thread keeps of a neuron, and of what it is given: structs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sparsify import ir
from sparsify.codegen.cuda.frame_text import Scratch
from sparsify.codegen.expressions import C_TYPES, Symbols
from sparsify.codegen.usage import Source, Usage, emitted, neuron_reads
from sparsify.codegen.writer import Writer


@dataclass(frozen=True)
class Kept:
    """A member of the struct of a neuron. What ``lasts`` is read in a later phase or step."""

    name: str
    dtype: ir.DType
    lasts: bool
    note: str = ""


@dataclass(frozen=True)
class Neuron:
    """What a thread keeps of a neuron: the struct, and the name of an array of them."""

    population: str
    struct: str
    array: str
    members: tuple[Kept, ...]

    @property
    def lasting(self) -> list[Kept]:
        return [member for member in self.members if member.lasts]

    def words(self) -> int:
        """Registers of one neuron."""
        return sum(2 if member.dtype in ("float64", "int64") else 1 for member in self.members)

    def scratch(self) -> list[Scratch]:
        """Memory for neurons that do not fit into registers."""
        return [Scratch(f"{m.name}_kept", m.dtype, m.note) for m in self.lasting]


@dataclass(frozen=True)
class Inputs:
    """The operands that a neuron is given: those of a row before its steps, of a step before all
    else. A struct of their values, and the name of an array of them.
    """

    population: str
    struct: str
    array: str
    of_row: tuple[ir.Operand, ...]
    of_step: tuple[ir.Operand, ...]

    def operands(self) -> tuple[ir.Operand, ...]:
        return (*self.of_row, *self.of_step)

    def words(self) -> int:
        """Registers of one neuron."""
        return sum(2 if o.dtype in ("float64", "int64") else 1 for o in self.operands())


NO_INPUTS: Mapping[str, Inputs] = MappingProxyType({})


def find_inputs(usage: Usage, symbols: Symbols, population: str) -> Inputs | None:
    """What phases of a population read that changes with the step, or with the neuron."""
    phases = [p for p in usage.kernel.phases if p.population == population]
    read = {name for p in phases for s in p.body for name in neuron_reads(s)}
    operands = [o for o in usage.kernel.operands if o.name in read]
    of_step = tuple(o for o in operands if "T" in o.axes)
    of_row = tuple(o for o in operands if "T" not in o.axes and "N" in o.axes)
    if not of_step and not of_row:
        return None
    array = symbols.names.new(f"{population} inputs")
    struct = symbols.names.new("".join(part.capitalize() for part in array.split("_")))
    return Inputs(population, struct, array, of_row, of_step)


def find_neurons(usage: Usage, symbols: Symbols) -> dict[str, Neuron]:
    """Per population that has phases, what is kept of a neuron."""
    found = {}
    for population in dict.fromkeys(phase.population for phase in usage.kernel.phases):
        plain = "".join(part.capitalize() for part in symbols.names.new(population).split("_"))
        struct, array = symbols.names.new(f"{plain}Neuron"), symbols.names.new(f"own {population}")
        members = tuple(_members(population, usage, symbols))
        found[population] = Neuron(population, struct, array, members)
    return found


def _members(population: str, usage: Usage, symbols: Symbols) -> list[Kept]:
    members = []
    for state in usage.kernel.states:
        is_kept = state.name in usage.kept_states
        if state.population != population or not (is_kept or state.name in usage.sources):
            continue
        name = symbols.values[state.name]
        members.append(Kept(name, state.dtype, is_kept, state.note))
        if state.name in usage.doubled_states:
            note = f"{state.name} of the next step"
            members.append(Kept(f"{name}_next", state.dtype, True, note))
    for phase in usage.kernel.phases:
        if phase.population != population:
            continue
        for statement in phase.body:
            if isinstance(statement, ir.Let | ir.Gather):
                name, lasts = statement.result, statement.result in usage.kept_lets
                if lasts or name in usage.sources:
                    members.append(Kept(symbols.values[name], usage.dtypes[name], lasts))
        members += [Kept(symbols.outputs[o.name], "bool", False) for o in bits_of(phase, usage)]
    return members


def bits_of(phase: ir.Phase, usage: Usage) -> list[ir.Output]:
    """The outputs of a phase that are bits: 32 neurons write them together."""
    stored = {s.output for s in phase.body if isinstance(s, ir.Store)}
    return [o for o in usage.kernel.outputs if o.name in stored and o.dtype == "bits"]


def published(phase: ir.Phase, usage: Usage, symbols: Symbols) -> list[tuple[Source, str]]:
    """The sources that a phase computes, each with the member that then has its new value."""
    found = []
    for source, _ in emitted(phase, usage):
        doubled = "_next" if source.name in usage.doubled_states else ""
        found.append((source, f"{symbols.values[source.name]}{doubled}"))
    return found


def is_first_phase(phase: ir.Phase, kernel: ir.Kernel) -> bool:
    """Whether no phase of a step has this population before."""
    return next(p for p in kernel.phases if p.population == phase.population) is phase


def old_value(name: str, phase: ir.Phase, usage: Usage, symbols: Symbols) -> str:
    """The member that has the value of a state, or of an earlier phase, when ``phase`` begins."""
    is_new = name in usage.doubled_states and is_first_phase(phase, usage.kernel)
    return f"{symbols.values[name]}{'_next' * is_new}"


def operand_element(operand: ir.Operand, symbols: Symbols) -> str:
    """The value of an operand for step t, row b and neuron n."""
    name = symbols.values[operand.name]
    index = [f"{axis} * call.{name}_{axis}" for axis in "tb" if axis.upper() in operand.axes]
    if operand.dtype == "bits":
        return f"(call.{name}[{' + '.join([*index, 'n / 8'])}] >> (n % 8) & 1) != 0"
    index += ["n"] * ("N" in operand.axes)
    element = f"call.{name}[{' + '.join(index) or '0'}]"
    return f"{element} != 0" if operand.dtype == "bool" else element


def loaded(phase: ir.Phase, neuron: Neuron, usage: Usage, symbols: Symbols) -> list[Kept]:
    """The lasting members that a phase reads before it writes them."""
    if phase not in usage.kernel.phases:
        return []  # it gives states their first value
    names = {old_value(n, phase, usage, symbols) for s in phase.body for n in neuron_reads(s)}
    names |= {f"{symbols.values[name]}_next" for name in committed(phase, usage)}
    defined = {s.result for s in phase.body if isinstance(s, ir.Let | ir.Gather)}
    names -= {symbols.values[name] for name in defined}
    return [member for member in neuron.lasting if member.name in names]


def saved(phase: ir.Phase, neuron: Neuron, usage: Usage, symbols: Symbols) -> list[Kept]:
    """The lasting members that a phase writes."""
    names = {symbols.values[name] for name in committed(phase, usage)}
    for statement in phase.body:
        if isinstance(statement, ir.Let | ir.Gather):
            names.add(symbols.values[statement.result])
        if isinstance(statement, ir.Update):
            doubled = "_next" if statement.state in usage.doubled_states else ""
            names.add(f"{symbols.values[statement.state]}{doubled}")
    return [member for member in neuron.lasting if member.name in names]


def committed(phase: ir.Phase, usage: Usage) -> list[str]:
    """The states whose new value becomes the old one when ``phase`` begins."""
    kernel = usage.kernel
    if phase not in kernel.phases or not is_first_phase(phase, kernel):
        return []
    states = [s.name for s in kernel.states if s.population == phase.population]
    return [name for name in states if name in usage.doubled_states]


def write_neuron(w: Writer, neuron: Neuron) -> None:
    """The struct, if there is anything to keep."""
    if not neuron.members:
        return
    w.line()
    w.comment(f"What a thread keeps of a neuron of {neuron.population}.")
    with w.block(f"struct {neuron.struct}", "};"):
        for member in neuron.members:
            w.line(f"{C_TYPES[member.dtype]} {member.name};", member.note)


def write_inputs(w: Writer, inputs: Inputs, usage: Usage, symbols: Symbols) -> None:
    """The struct, and the functions that fill it for a row and for a step."""
    w.line()
    w.comment(f"What a neuron of {inputs.population} reads of a row, and of a step.")
    with w.block(f"struct {inputs.struct}", "};"):
        for operand in inputs.operands():
            kind, name = C_TYPES[usage.dtypes[operand.name]], symbols.values[operand.name]
            w.line(f"{kind} {name};", operand.note)
    for function, operands in (("fetch_row", inputs.of_row), ("fetch_step", inputs.of_step)):
        if operands:
            head = f"{inputs.struct}& inputs, const Call& call, int64_t t, int64_t b, int n"
            w.line()
            with w.block(f"SPARSIFY_INLINE void {function}({head})"):
                for operand in operands:
                    name = symbols.values[operand.name]
                    w.line(f"inputs.{name} = {operand_element(operand, symbols)};")
