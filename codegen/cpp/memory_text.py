"""C++ text of scratch memory: what a kernel keeps of states, results and events."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cpp.frame_text import events_type
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols
from sparsify.codegen.usage import Source, Usage
from sparsify.codegen.writer import Writer


@dataclass(frozen=True)
class Field:
    """A member of a scratch struct: its declaration and how the constructor makes it."""

    declaration: str
    init: str
    note: str = ""


def array(kind: str, name: str, count: str, copies: int, note: str) -> Field:
    taken = ", ".join([f"arena.take<{kind}>({count})"] * copies)
    many = f"[{copies}]" if copies > 1 else ""
    return Field(f"{kind}* {name}{many}", f"{name}{{{taken}}}", note)


def state_fields(usage: Usage, symbols: Symbols) -> list[Field]:
    """States and results that are read neuron by neuron, ``[rows, N]``."""
    fields = []
    for state in usage.kernel.states:
        if state.name in usage.kept_states:
            size, copies = symbols.sizes[state.population], 1 + (state.name in usage.doubled_states)
            note = f"[rows, {usage.kernel.population_size(state.population)}] {state.note}".rstrip()
            name = symbols.values[state.name]
            fields.append(array(MEMORY_TYPES[state.dtype], name, f"rows * {size}", copies, note))
    for result, population in kept_results(usage):
        name, kind = symbols.values[result], MEMORY_TYPES[usage.dtypes[result]]
        size = symbols.sizes[population]
        fields.append(array(kind, name, f"rows * {size}", 1, "read by a later phase"))
    return fields


def kept_results(usage: Usage) -> list[tuple[str, str]]:
    """Results that a later phase reads, with their population."""
    return [
        (statement.result, phase.population)
        for phase in usage.kernel.phases
        for statement in phase.body
        if isinstance(statement, ir.Let | ir.Gather) and statement.result in usage.kept_lets
    ]


def events_field(
    source: Source, usage: Usage, symbols: Symbols, copies: int, rows: str = "rows"
) -> Field:
    name, size = f"{symbols.values[source.name]}_events", symbols.sizes[source.population]
    made = f"arena, {rows}, {size}, {'true' if source.payload else 'false'}"
    kind = events_type(source, usage.kernel)
    note = f"active senders of {source.name}"
    if copies == 1:
        return Field(f"{kind} {name}", f"{name}({made})", note)
    return Field(f"{kind} {name}[2]", f"{name}{{{{{made}}}, {{{made}}}}}", f"{note}, now and next")


def blocks_field(source: Source, symbols: Symbols, copies: int, note: str) -> Field:
    """Values of a source as restricted products read them."""
    name, size = f"{symbols.values[source.name]}_blocks", symbols.sizes[source.population]
    kind, made = f"Blocks<{C_TYPES[source.dtype]}>", f"arena, rows, {size}"
    if copies == 1:
        return Field(f"{kind} {name}", f"{name}({made})", note)
    return Field(f"{kind} {name}[2]", f"{name}{{{{{made}}}, {{{made}}}}}", note)


def write_struct(w: Writer, name: str, note: str, fields: list[Field]) -> None:
    w.line()
    w.comment(note)
    with w.block(f"struct {name}", "};"):
        for field in fields:
            w.line(f"{field.declaration};", field.note)
        inits = ",\n        ".join(field.init for field in fields)
        w.line(
            f"{name}(Arena& arena, int64_t rows)\n      : {inits} {{}}"
            if fields
            else f"{name}(Arena&, int64_t) {{}}"
        )
        with w.block("static int64_t bytes(int64_t rows)"):
            w.line("Arena arena;")
            w.line(f"const {name} measured(arena, rows);")
            w.line("(void)measured;")
            w.line("return arena.used();")
