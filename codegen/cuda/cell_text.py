"""CUDA text of neurons: what a thread keeps of one, and the function of each phase for one neuron.

A thread computes a neuron of a population and a batch row at a time. What it keeps from step to
step, or from phase to phase, is a struct that lives in registers, or is loaded and saved around.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sparsify import ir
from sparsify.check_ir import read_dtype
from sparsify.codegen.cell_text import (
    C_TYPES,
    Symbols,
    expression,
    operand_text,
    start_phases,
)
from sparsify.codegen.cuda.frame_text import Scratch
from sparsify.codegen.usage import Source, Usage, emitted, neuron_reads, statement_args
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


@dataclass
class Cell:
    """Writes the function of one phase for one neuron."""

    writer: Writer
    usage: Usage
    symbols: Symbols
    neuron: Neuron
    inputs: Inputs | None = None
    _seen: set[str] = field(default_factory=set)

    def write(self, phase: ir.Phase, function: str) -> None:
        w, neuron = self.writer, self.neuron
        own = [f"{neuron.struct}& own"] if neuron.members else []
        gathers = [s.result for s in phase.body if isinstance(s, ir.Gather)]
        sums = [f"const {self._type(name)} {self.symbols.values[name]}" for name in gathers]
        if self.inputs is not None:
            own.append(f"const {self.inputs.struct}& inputs")
        head = ["const Call& call", *own, "int64_t t", "int64_t b", "int n", *sums]
        w.line()
        w.comment(f"Neuron n of {phase.population}, batch row b.")
        with w.block(f"SPARSIFY_INLINE void {function}({', '.join(head)})"):
            self._write_body(phase)

    def _write_body(self, phase: ir.Phase) -> None:
        for state in committed(phase, self.usage):
            name = self.symbols.values[state]
            self.writer.line(f"own.{name} = own.{name}_next;", "the step before has ended")
        for statement in phase.body:
            for arg in statement_args(statement):
                if not isinstance(arg, ir.Const):
                    self._read(arg)
            self._statement(statement)
        for statement in phase.body:  # a state has its old value to the end of the phase
            if isinstance(statement, ir.Update):
                self._update(statement)

    def _statement(self, statement: ir.Statement) -> None:
        match statement:
            case ir.Gather(result=result):
                self._seen.add(result)
                self._keep(result)
            case ir.Let(result=result, dtype=dtype, note=note):
                text = expression(statement, self.symbols, self.usage.dtypes)
                name = self.symbols.values[result]
                self.writer.line(f"const {C_TYPES[dtype]} {name} = {text};", note)
                self._seen.add(result)
                self._keep(result)
            case ir.Store():
                self._store(statement)
            case ir.Update():
                pass  # at the end

    def _keep(self, result: str) -> None:
        name = self.symbols.values[result]
        if any(member.name == name for member in self.neuron.members):
            self.writer.line(f"own.{name} = {name};")

    def _update(self, update: ir.Update) -> None:
        name = self.symbols.values[update.state]
        if not any(member.name == name for member in self.neuron.members):
            return
        name += "_next" if update.state in self.usage.doubled_states else ""
        text = operand_text(update.value, self.usage.dtypes[update.state], self.symbols)
        self.writer.line(f"own.{name} = {text};")

    def _store(self, store: ir.Store) -> None:
        output = next(o for o in self.usage.kernel.outputs if o.name == store.output)
        name = self.symbols.outputs[output.name]
        text = operand_text(store.value, read_dtype(output), self.symbols)
        if output.dtype == "bits":
            self.writer.line(f"own.{name} = {text};", output.note)
            return
        if "T" in output.axes:
            place = f"call.{name}[t * call.{name}_t + b * call.{name}_b + n]"
            self.writer.line(f"{place} = {text};", output.note)
            return
        last = "t == 0" if self.usage.kernel.reverse else "t + 1 == call.steps"
        self.writer.line(f"if ({last}) call.{name}[b * call.{name}_b + n] = {text};", output.note)

    def _read(self, name: str) -> None:
        """Declare the local variable of a value from outside this phase, once."""
        if name in self._seen:
            return
        self._seen.add(name)
        local, kind = self.symbols.values[name], self._type(name)
        operand = next((o for o in self.usage.kernel.operands if o.name == name), None)
        if operand is None:
            self.writer.line(f"const {kind} {local} = own.{local};")
            return
        if self.inputs is not None and operand in self.inputs.operands():
            self.writer.line(f"const {kind} {local} = inputs.{local};")
            return
        element = operand_element(operand, self.symbols)
        self.writer.line(f"const {kind} {local} = {element};", operand.note)

    def _type(self, name: str) -> str:
        return C_TYPES[self.usage.dtypes[name]]


def write_cells(
    w: Writer,
    usage: Usage,
    symbols: Symbols,
    neurons: dict[str, Neuron],
    inputs: Mapping[str, Inputs] = NO_INPUTS,
) -> None:
    """The functions of all phases, those that give states their initial values first.

    Where a population has ``inputs``, its phases take them as the second argument.
    """
    kernel = usage.kernel
    starts = zip(start_phases(kernel), symbols.starts, strict=True)
    phases = zip(kernel.phases, symbols.phases, strict=True)
    for phase, function in starts:
        Cell(w, usage, symbols, neurons[phase.population]).write(phase, function)
    for phase, function in phases:
        population = phase.population
        cell = Cell(w, usage, symbols, neurons[population], inputs.get(population))
        cell.write(phase, function)
