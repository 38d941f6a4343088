"""C++ text of convolutions: the sizes of their maps, scratch memory and calls; see ``convolve.h``.

Sums of a convolution are computed for all receivers of a thread before its neurons run.
"""

from __future__ import annotations

from sparsify import ir
from sparsify.codegen.cpp.memory_text import Field
from sparsify.codegen.expressions import C_TYPES, Symbols
from sparsify.codegen.usage import Usage, channels_at_once
from sparsify.codegen.writer import Writer


def map_name(weight: ir.Weight, symbols: Symbols) -> str:
    return f"{symbols.values[weight.name]}_map"


def write_maps(w: Writer, kernel: ir.Kernel, symbols: Symbols) -> None:
    """A struct of sizes for each weight of a convolution."""
    for weight in kernel.weights:
        if weight.convolution is None:
            continue
        w.line()
        w.comment(f"The maps that {weight.note or weight.name} reads, and those that it makes.")
        with w.block(f"struct {map_name(weight, symbols)}", "};"):
            write_sizes(w, weight.convolution)


def write_sizes(w: Writer, given: ir.Convolution) -> None:
    """The members of a struct of sizes."""
    channels, to_channels = given.channels
    w.line(f"static constexpr int64_t channels = {channels}, to_channels = {to_channels};")
    for rows, columns, (first, second) in (
        ("from_rows", "from_columns", given.senders),
        ("pool_rows", "pool_columns", given.pooling),
        ("rows", "columns", given.maps),
        ("to_rows", "to_columns", given.receivers),
        ("window_rows", "window_columns", given.window),
        ("stride_rows", "stride_columns", given.stride),
        ("padding_rows", "padding_columns", given.padding),
        ("dilation_rows", "dilation_columns", given.dilation),
    ):
        w.line(f"static constexpr int64_t {rows} = {first}, {columns} = {second};")


def windows_fields(usage: Usage, symbols: Symbols) -> list[Field]:
    """Scratch memory of a thread for the events of a batch row under all windows."""
    kernel = usage.kernel
    fields = []
    for gather in kernel.gathers:
        weight = kernel.weight(gather.weight)
        if weight.convolution is not None:
            kind = C_TYPES[usage.dtypes[gather.result]]
            declared = f"Windows<{map_name(weight, symbols)}, {kind}>"
            name = _windows(gather, symbols)
            note = "events under all windows, of one row"
            fields.append(Field(f"{declared} {name}", f"{name}(arena)", note))
    return fields


def call_of(
    gather: ir.Gather, kernel: ir.Kernel, symbols: Symbols, sums: str, read: str, is_dense: bool
) -> str:
    """The call that computes sums; ``read`` are the events, or an address and a distance of rows.

    It lacks the range of receivers, and gives the number of active senders.
    """
    weight = kernel.weight(gather.weight)
    assert weight.convolution is not None
    name = f"convolve_{'dense' if is_dense else 'events'}<{channels_at_once(weight.convolution)}>"
    packed, windows = f"call.{symbols.values[weight.name]}", f"own.{_windows(gather, symbols)}"
    return f"{name}({sums}, {packed}, {windows}, {read}, rows"


def _windows(gather: ir.Gather, symbols: Symbols) -> str:
    return f"{symbols.values[gather.result]}_windows"
