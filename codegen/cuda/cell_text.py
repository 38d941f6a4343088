"""CUDA text of cells: the function of each phase, for one neuron and one batch row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sparsify import ir
from sparsify.check_ir import read_dtype
from sparsify.codegen.cuda.neuron_text import (
    NO_INPUTS,
    Inputs,
    Neuron,
    committed,
    operand_element,
)
from sparsify.codegen.expressions import C_TYPES, Symbols, expression, operand_text, start_phases
from sparsify.codegen.usage import Usage, statement_args
from sparsify.codegen.writer import Writer


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
        gathers = [gather.result for gather in phase.gathers]
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
