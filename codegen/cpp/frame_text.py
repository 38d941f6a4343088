"""C++ text around the loops: header comment, sizes, the call's arguments, the entry point."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify import ir
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols
from sparsify.codegen.given_weights import given_weights
from sparsify.codegen.notes_text import shape_note, write_origin
from sparsify.codegen.predict_cost import are_weights_far
from sparsify.codegen.usage import UINT16_SENDERS, WIDE_TILES, Source, has_convolution
from sparsify.codegen.writer import Writer


def write_head(
    w: Writer,
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    tile: int,
    headers: Sequence[str] = (),
) -> None:
    write_origin(w, kernel, schedule)
    w.line('#include "kernel.h"')
    for header in (*_headers(kernel, schedule), *headers):
        w.line(f'#include "{header}"')
    w.line()
    w.line("namespace {")
    w.line()
    w.line("using namespace sparsify;")
    w.line()
    for population in kernel.populations:
        size = symbols.sizes[population.name]
        w.line(f"constexpr int64_t {size} = {population.size};", f"neurons of {population.name}")
    together = "weights lie together" if tile in WIDE_TILES else "sums stay in registers"
    w.line(f"constexpr int64_t TILE = {tile};", f"receivers whose {together}")
    far = "true" if are_weights_far(kernel) else "false"
    w.line(f"constexpr bool FAR = {far};", "whether weights lie beyond a core's own cache")


def _headers(kernel: ir.Kernel, schedule: ir.Schedule) -> list[str]:
    """What kernels need beside kernel.h."""
    found = ["restricted.h"] if any(gather.only is not None for gather in kernel.gathers) else []
    given = given_weights(kernel, schedule)
    if any(weight.is_kept and weight.by == "receivers" for weight in given):
        found.append("kept_rows.h")
    if any(weight.is_kept and weight.by == "senders" for weight in given):
        found.append("kept_products.h")
    if any(weight.layout.kind == "masked-rows" for weight in given):
        found.append("masked_rows.h")
    found += ["convolve.h"] if has_convolution(kernel) else []
    return found


def write_call(
    w: Writer,
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    extra: Sequence[str] = (),
) -> None:
    """The struct that holds what one call was given, and the ``extra`` members of a strategy."""
    w.line()
    w.comment("Element (t, b, n) of a tensor is at [t * _t + b * _b + n].")
    if "bits" in {o.dtype for o in kernel.operands} | {o.dtype for o in kernel.outputs}:
        w.comment("Of N / 8 bytes it is bit n % 8 at [t * _t + b * _b + n / 8].")
    with w.block("struct Call", "};"):
        w.line("int64_t steps, batch;")
        for operand in kernel.operands:
            name, kind = symbols.values[operand.name], MEMORY_TYPES[operand.dtype]
            strides = "".join(f", {name}_{x.lower()}" for x in operand.axes if x != "N")[2:]
            tail = f" int64_t {strides};" if strides else ""
            note = shape_note(kernel, operand, operand.note)
            w.line(f"const {kind}* {name};{tail}", note)
        for given in given_weights(kernel, schedule):
            weight = given.weight
            receivers, senders = kernel.weight_shape(weight)
            note = f"[{receivers}, {senders}] {weight.note}".rstrip()
            w.line(f"{given.kind()} {given.name(symbols)};", f"{note}, {given.note()}")
        for output in kernel.outputs:
            name, kind = symbols.outputs[output.name], MEMORY_TYPES[output.dtype]
            strides = "".join(f", {name}_{x.lower()}" for x in output.axes if x != "N")[2:]
            note = shape_note(kernel, output, output.note)
            w.line(f"{kind}* {name}; int64_t {strides};", note)
        counted = "how many senders were active"
        if any(gather.only is not None for gather in kernel.gathers):
            counted += ", or sums wanted"
        w.line("int64_t* active;", f"per gather, {counted}")
        w.line("char* memory;")
        for member in extra:
            w.line(member)


def write_entry(
    w: Writer,
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    entry: str,
    set_up: Sequence[str],
    clear: Sequence[str] = (),
) -> None:
    """The function that Python calls. ``set_up`` are lines that end by declaring ``bytes``.

    ``clear`` are lines that write what threads find in memory when they begin.
    """
    w.line()
    w.line("}  // namespace")
    w.line()
    w.line('extern "C" __attribute__((visibility("default")))')
    head = (
        f"int {entry}(const Runtime* runtime, void* const* pointers, const int64_t* strides,\n"
        f"    int64_t steps, int64_t batch, int threads, int64_t* active)"
    )
    with w.block(head):
        w.line("Call call;")
        w.line("call.steps = steps;")
        w.line("call.batch = batch;")
        w.line("call.active = active;")
        for name, kind, axes in entry_tensors(kernel, schedule, symbols):
            given = f"static_cast<{kind}>" if kind.endswith("*") else kind
            w.line(f"call.{name} = {given}(*pointers++);")
            for axis in axes:
                w.line(f"call.{name}_{axis} = *strides++;")
        for output in kernel.outputs:
            if {"T", "B"} <= set(output.axes):
                name = f"call.{symbols.outputs[output.name]}"
                w.line(f"prefer_large_pages({name}, steps, {name}_t, batch, {name}_b);")
        for line in set_up:
            w.line(line)
        w.line("call.memory = static_cast<char*>(std::aligned_alloc(64, bytes + 64));")
        w.line("if (!call.memory) return 1;")
        for line in clear:
            w.line(line)
        w.line("runtime->parallel(run, &call, threads);")
        w.line("std::free(call.memory);")
        w.line("return 0;")


def entry_tensors(
    kernel: ir.Kernel, schedule: ir.Schedule, symbols: Symbols
) -> list[tuple[str, str, list[str]]]:
    """Identifier, C type and strided axes of what the entry takes, in its order."""
    tensors = []
    for operand in kernel.operands:
        axes = [x.lower() for x in operand.axes if x != "N"]
        kind = f"const {MEMORY_TYPES[operand.dtype]}*"
        tensors.append((symbols.values[operand.name], kind, axes))
    for given in given_weights(kernel, schedule):
        tensors.append((given.name(symbols), given.kind(), []))
    for output in kernel.outputs:
        axes = [x.lower() for x in output.axes if x != "N"]
        tensors.append((symbols.outputs[output.name], f"{MEMORY_TYPES[output.dtype]}*", axes))
    return tensors


def events_type(source: Source, kernel: ir.Kernel) -> str:
    small = kernel.population_size(source.population) <= UINT16_SENDERS
    return f"Events<{'uint16_t' if small else 'int32_t'}, {C_TYPES[source.dtype]}>"


def operand_row(operand: ir.Operand, symbols: Symbols, t: str, b: str) -> str:
    """The address of a row of an operand with axes (T,)B,N."""
    name = symbols.values[operand.name]
    time = f" + {t} * call.{name}_t" if "T" in operand.axes else ""
    return f"call.{name}{time} + {b} * call.{name}_b"
