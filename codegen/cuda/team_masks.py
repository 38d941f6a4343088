"""Masked rows in teams: a block has those of its slice of receivers, in shared memory if they fit.

Sums read them in the place of whole rows, see masked_slice.cuh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsify import ir
from sparsify.codegen.cuda.frame_text import packed_name, row_length, weight_types
from sparsify.codegen.cuda.layouts import Kept, masked, masked_senders
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.expressions import C_TYPES, MEMORY_TYPES, Symbols
from sparsify.codegen.usage import Packing
from sparsify.codegen.writer import Writer
from sparsify.errors import Refusal


def why_not_layouts(kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
    """Refuse the layouts that blocks of a team cannot read."""
    for weight in kernel.weights:
        layout = schedule.layout_of(weight.name)
        if layout.kind not in ("dense-rows", "masked-rows"):
            return Refusal(
                "unsupported-layout",
                f"A block of a team has few receivers of {weight.name!r}: {layout} would be no"
                " shorter than their masks.",
                "Choose masked-rows, or row-per-block.",
            )
    return None


def kept_of_teams(
    kernel: ir.Kernel,
    schedule: ir.Schedule,
    symbols: Symbols,
    packings: Sequence[Packing],
    shape: Shape,
) -> list[Kept]:
    """What the blocks of a team are given beside whole rows.

    Restricted sums have rows of receivers: whole ones in shared memory, else masked ones.
    """
    found = []
    for packing in packings:
        layout = schedule.layout_of(packing.weight.name)
        if layout.kind != "masked-rows":
            continue
        if packing.by == "receivers":
            band = shape.slices[packing.weight.receivers]
            found.append(masked(kernel, packing, layout, band))
        elif packed_name(packing, symbols) not in shape.resident:
            found.append(masked_senders(kernel, packing, layout))
    return found


def write_masked_slice(
    w: Writer,
    kernel: ir.Kernel,
    symbols: Symbols,
    kept: Kept,
    mine: Mapping[str, str],
    widths: Mapping[str, str],
    is_resident: bool,
) -> None:
    """Copy the masked rows of a slice if they stay in shared memory, and give sums the slice."""
    packing, weight = kept.packing, kept.packing.weight
    name, kind = packed_name(packing, symbols), weight_types(weight.dtype)
    width, my = widths[weight.receivers], mine[weight.receivers]
    words = f"{symbols.sizes[weight.senders]} * words_of({width})"
    arrays = []
    for array, count in (("masks", words), ("kept", f"{words} * {kept.room}")):
        first = f"call.{name}_{array} + int64_t(team.rank) * ({count})"
        if is_resident:
            size = f"{my}.size > 0 ? {count} : 0"
            w.line(f"keep_rows(shared.{name}_{array}, {first}, {size});")
            first = f"shared.{name}_{array}"
        arrays.append(first)
    fits = f"*call.{name}_overflow == 0"
    types = f"{width}, {kept.room}, {row_length(kernel, packing)}, {kind}"
    given = f"{{{', '.join(arrays)}}}, {{call.{name} + {my}.first}}"
    w.line(f"const MaskedSlice<{types}> {name}_slice{{{fits}, {given}}};")


def masked_sum(kept: Kept, symbols: Symbols, values: str, receiver: str, row: int) -> str:
    """The sum of one receiver over all senders, by a whole warp."""
    weight = kept.packing.weight
    name, senders = packed_name(kept.packing, symbols), symbols.sizes[weight.senders]
    kind = weight_types(weight.dtype)
    types = f"{senders}, {kept.room}, {kind}"
    rows = f"MaskedRows<{types}>(call.{name}_masks, call.{name}_kept)"
    added = f"part_of_row({rows}, {values}, {senders}, {receiver})"
    whole = (
        f"part_of_row({whole_rows(weight, row, f'call.{name}')}, {values}, {senders}, {receiver})"
    )
    return f"warp_sum(*call.{name}_overflow == 0 ? {added} : {whole})"


def whole_rows(weight: ir.Weight, row: int, at: str) -> str:
    """The C++ object that reads rows of receivers."""
    return f"Rows<{row}, {C_TYPES[weight.dtype]}, {MEMORY_TYPES[weight.dtype]}>({at})"
