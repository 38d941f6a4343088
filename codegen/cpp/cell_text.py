"""C++ text of one phase for one tile of neurons and one batch row: sums, expressions, writes."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsify import ir
from sparsify.check_ir import read_dtype
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols, expression, operand_text
from sparsify.codegen.usage import Source, Usage, emitted, neuron_reads, statement_args
from sparsify.codegen.writer import Writer
from sparsify.scalars.halves import HALVES


@dataclass(frozen=True)
class Places:
    """Where a strategy keeps things: C++ expressions, given the variables of the cell.

    ``parameters`` declare these variables, ``arguments`` pass all of them but ``first, width``.
    ``state`` is the object that holds states and kept results (``own`` or ``shared``); events of
    a source are read from ``events[name]``; ``emit[name]`` are the lines that publish
    ``{values}``, a tile of a source that the kernel computes.
    """

    parameters: str
    arguments: str
    state: str
    events: dict[str, str]
    emit: dict[str, list[str]]


@dataclass
class Cell:
    """Writes the function of one phase. ``_loads`` are (declaration before, line in the loop).

    ``_stored`` says where the loop leaves a value as it is computed.
    """

    writer: Writer
    usage: Usage
    symbols: Symbols
    places: Places
    _before: list[tuple[str, str]] = field(default_factory=list)
    _inside: list[tuple[str, str]] = field(default_factory=list)
    _updates: list[tuple[str, str]] = field(default_factory=list)
    _after: list[str] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _stored: dict[tuple[ir.Arg, ir.DType], str] = field(default_factory=dict)

    def write(self, phase: ir.Phase, function: str) -> None:
        size = self.symbols.sizes[phase.population]
        for statement in phase.body:
            for arg in statement_args(statement):
                if not isinstance(arg, ir.Const):
                    self._read(arg, size)
            self._statement(statement, size, phase)
        for source, value in emitted(phase, self.usage):
            self._stage(source, value)
        self._inside += self._updates  # a state has its old value to the end of the phase
        sums = [gather.result for gather in phase.gathers]
        parameters = [f"const {self._type(r)}* {self._sum(r)}" for r in sums]
        head = ", ".join([self.places.parameters, *parameters])
        self.writer.line()
        self.writer.comment(f"Neurons first .. first + width of {phase.population}, batch row b.")
        with self.writer.block(f"SPARSIFY_INLINE void {function}({head})"):
            self._write_body()

    def _write_body(self) -> None:
        for text, note in self._before:
            self.writer.line(text, note)
        if self._inside:
            self.writer.line("SPARSIFY_LANES")
            with self.writer.block("for (int64_t i = 0; i < width; ++i)"):
                for text, note in self._inside:
                    self.writer.line(text, note)
        for text in self._after:
            self.writer.line(text)

    def _statement(self, statement: ir.Statement, size: str, phase: ir.Phase) -> None:
        match statement:
            case ir.Gather():
                self._gather(statement)
            case ir.Let(result=result, dtype=dtype, note=note):
                text = expression(statement, self.symbols, self.usage.dtypes)
                name = self.symbols.values[result]
                self._inside.append((f"const {C_TYPES[dtype]} {name} = {text};", note))
                self._seen.add(result)
                self._keep(result, size)
            case ir.Update(state=state, value=value):
                self._update(state, value, size)
            case ir.Store():
                self._store(statement, phase)

    def _gather(self, gather: ir.Gather) -> None:
        name = self.symbols.values[gather.result]
        if self._is_read(gather.result):
            self._inside.append(
                (f"const {self._type(gather.result)} {name} = {self._sum(gather.result)}[i];", "")
            )
        self._seen.add(gather.result)
        self._keep(gather.result, self.symbols.sizes[self._population_of(gather)])

    def _population_of(self, gather: ir.Gather) -> str:
        return next(w.receivers for w in self.usage.kernel.weights if w.name == gather.weight)

    def _is_read(self, name: str) -> bool:
        statements = (s for phase in self.usage.kernel.phases for s in phase.body)
        return name in self.usage.sources or any(name in neuron_reads(s) for s in statements)

    def _keep(self, result: str, size: str) -> None:
        """Store a result that a later phase reads neuron by neuron."""
        if result not in self.usage.kept_lets:
            return
        name = self.symbols.values[result]
        place = f"{self.places.state}.{name} + row * {size} + first"
        self._pointer(f"{name}_to", self.usage.dtypes[result], place)
        self._inside.append((f"{name}_to[i] = {name};", ""))

    def _update(self, state: str, value: ir.Arg, size: str) -> None:
        if state not in self.usage.kept_states:
            return
        name = self.symbols.values[state]
        slot = "[next]" if state in self.usage.doubled_states else ""
        place = f"{self.places.state}.{name}{slot} + row * {size} + first"
        self._pointer(f"{name}_to", self.usage.dtypes[state], place)
        text = operand_text(value, self.usage.dtypes[state], self.symbols)
        self._updates.append((f"{name}_to[i] = {text};", "for the next step"))

    def _store(self, store: ir.Store, phase: ir.Phase) -> None:
        output = next(o for o in self.usage.kernel.outputs if o.name == store.output)
        name = self.symbols.outputs[output.name]
        kept = self._kept_at(store.value, output.dtype, phase)
        time = f"t * call.{name}_t + " if "T" in output.axes else ""
        place = f"call.{name} + {time}b * call.{name}_b + first"
        if not time and kept is not None:
            self._after += [
                "if (t == 0)" if self.usage.kernel.reverse else "if (t + 1 == call.steps)",
                f"  for (int64_t i = 0; i < width; ++i) ({place})[i] = {kept};",
            ]
            return
        text = operand_text(store.value, read_dtype(output), self.symbols)
        self._inside.append((f"{name}_to[i] = {text};", output.note))
        if output.dtype == "bits":
            self._before.append((f"alignas(64) uint8_t {name}_to[TILE];", ""))
            self._after.append(f"pack({place} / 8, {name}_to, width);")
        else:
            self._pointer(f"{name}_to", output.dtype, place)
            if output.dtype not in HALVES:
                self._stored[store.value, output.dtype] = f"{name}_to"

    def _kept_at(self, value: ir.Arg, dtype: ir.DType, phase: ir.Phase) -> str | None:
        """Where a value of this phase lies after its loop: in a kept state, or a source's tile."""
        updates = (s for s in phase.body if isinstance(s, ir.Update) and s.value == value)
        state = next((u.state for u in updates if u.state in self.usage.kept_states), None)
        if state is not None:
            return f"{self.symbols.values[state]}_to[i]"
        published = (s for s, v in emitted(phase, self.usage) if v == value)
        source = next((s for s in published if s.value_dtype == dtype), None)
        return f"{self.symbols.values[source.name]}_tile[i]" if source is not None else None

    def _read(self, name: str, size: str) -> None:
        """Declare the local variable of a value from outside this phase, once."""
        if name in self._seen:
            return
        self._seen.add(name)
        kernel, local, kind = self.usage.kernel, self.symbols.values[name], self._type(name)
        tested = " != 0" if kind == "bool" else ""
        operand = next((o for o in kernel.operands if o.name == name), None)
        if operand is None:
            slot = "[now]" if name in self.usage.doubled_states else ""
            place = f"{self.places.state}.{local}{slot} + row * {size} + first"
        else:
            steps = [f"{x} * call.{local}_{x}" for x in "tb" if x.upper() in operand.axes]
            if "N" not in operand.axes:
                index = " + ".join(steps) or "0"
                self._before.append(
                    (f"const {kind} {local} = call.{local}[{index}]{tested};", operand.note)
                )
                return
            place = " + ".join([f"call.{local}", *steps, "first"])
            if operand.dtype == "bits":
                self._before.append((f"alignas(64) uint8_t {local}_from[TILE];", operand.note))
                self._before.append((f"spread({local}_from, {place} / 8, width);", ""))
                self._inside.append((f"const bool {local} = {local}_from[i] != 0;", ""))
                return
        self._pointer(f"{local}_from", self.usage.dtypes[name], place, "const ")
        self._inside.append((f"const {kind} {local} = {local}_from[i]{tested};", ""))

    def _pointer(self, name: str, dtype: ir.DType, place: str, constant: str = "") -> None:
        self._before.append((f"{constant}{MEMORY_TYPES[dtype]}* const {name} = {place};", ""))

    def _stage(self, source: Source, value: ir.Arg) -> None:
        name, dtype = self.symbols.values[source.name], source.value_dtype
        kind = C_TYPES[dtype] if dtype in HALVES else MEMORY_TYPES[dtype]
        if stored := self._stored.get((value, dtype)):  # a loop is bound by what it stores
            self._before.append((f"const {kind}* const {name}_tile = {stored};", ""))
        else:
            text = operand_text(value, source.value_dtype, self.symbols)
            self._before.append((f"alignas(64) {kind} {name}_tile[TILE];", ""))
            self._inside.append((f"{name}_tile[i] = {text};", ""))
        self._after += [
            line.format(values=f"{name}_tile") for line in self.places.emit[source.name]
        ]

    def _sum(self, result: str) -> str:
        return f"{self.symbols.values[result]}_sum"

    def _type(self, name: str) -> str:
        return C_TYPES[self.usage.dtypes[name]]
