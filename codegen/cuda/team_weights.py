"""CUDA text of a team's weights: slices that stay in shared memory, and where others are."""

from __future__ import annotations

from sparsify import ir
from sparsify.codegen.cuda.bundle import Bundle
from sparsify.codegen.cuda.frame_text import needs_total, packed_name, row_length, weight_types
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_masks import write_masked_slice
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.expressions import MEMORY_TYPES
from sparsify.codegen.usage import Packing
from sparsify.codegen.writer import Writer


def write_weight(w: Writer, team: TeamKernel, shape: Shape, packing: Packing) -> None:
    """Copy a weight that stays in shared memory, and give products its slice."""
    weight = packing.weight
    name, types = packed_name(packing, team.symbols), weight_types(weight.dtype)
    mine, width = team.mine[weight.receivers], team.widths[weight.receivers]
    row, is_resident = row_length(team.kernel, packing), name in shape.resident
    kept = team.kept_of(packing, shape)
    if packing.by == "senders" and kept is not None:
        return  # its sums read masked rows from memory
    if packing.by == "senders":
        first = f"call.{name} + int64_t({mine}.first) * {row}"
        if is_resident:
            w.line(f"keep_rows(shared.{name}, {first}, {mine}.size * {row});")
            first = f"shared.{name}"
        w.line(f"const {MEMORY_TYPES[weight.dtype]}* const {name}_slice = {first};")
        return
    first = f"call.{name} + {mine}.first"
    if needs_total(packing, team.kernel, team.schedule):
        w.line(f"const bool {name}_finite = is_finite(*call.{name}_total);")
    if kept is not None:
        names = team.kernel, team.symbols, kept, team.mine, team.widths
        write_masked_slice(w, *names, is_resident)
        return
    if not is_resident:
        w.line(f"const Streamed<{row}, {types}> {name}_slice{{{first}}};")
        return
    given = f"{first}, {team.size(weight.senders)}, {mine}.size"
    bundle = team.bundle_of(weight, shape)
    if bundle is not None:
        owned, filled = shape.slices[weight.receivers], f"shared.{bundle.name}_weights"
        columns, wide = bundle.columns(owned)
        if bundle.apart(owned):
            _keep_parted(w, team, bundle, weight, f"{columns}, {wide - bundle.apart(owned)}", first)
            return
        place = f"{bundle.column(weight.name)}{filled}"
        w.line(f"keep_columns<{width}, {row}, {columns}>({place}, {given});")
        if weight.name == bundle.gathers[-1].weight:
            if wide > len(bundle.gathers) * owned:
                end = f"{len(bundle.gathers)} * {width}, {columns}"
                w.line(f"fill_columns<{end}>({filled}, {team.size(weight.senders)});")
            w.line(f"const Resident<{columns}, {types}> {bundle.name}_slice{{{filled}}};")
        return
    given = f"shared.{name}, {given}"
    w.line(f"keep_columns<{width}, {row}>({given});")
    w.line(f"const Resident<{width}, {types}> {name}_slice{{shared.{name}}};")


def _keep_parted(
    w: Writer, team: TeamKernel, bundle: Bundle, weight: ir.Weight, columns: str, first: str
) -> None:
    """The same of columns of which the last ones lie apart."""
    mine, width = team.mine[weight.receivers], team.widths[weight.receivers]
    types, slice_ = weight_types(weight.dtype), f"{bundle.name}_slice"
    if weight.name == bundle.gathers[0].weight:
        parted = f"Parted<{columns}, {team.size(weight.senders)}, {types}> {slice_}"
        w.line(f"const {parted}{{shared.{bundle.name}_weights}};")
    begin = f"{bundle.column(weight.name)}0".removesuffix(" + 0")
    row = row_length(team.kernel, Packing(weight, "receivers"))
    w.line(f"keep_parted<{width}, {row}>({slice_}, {begin}, {first}, {mine}.size);")
