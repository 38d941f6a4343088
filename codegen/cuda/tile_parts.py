"""What tensor cores multiply: what is refused, and in how many parts values are.

A float32 is three bfloat16, see ``mma.cuh``; a half, and a value that is 0 or 1, is one part.
"""

from __future__ import annotations

from sparsify import ir
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.team_memory import is_binary
from sparsify.codegen.cuda.team_shape import SENDER_BLOCK
from sparsify.codegen.usage import Source, Usage
from sparsify.errors import Refusal
from sparsify.scalars.halves import HALVES

TENSOR_CORES_SINCE = (8, 0)  # compute capability, with bfloat16
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH = 16, 8, 16
PARTS = 3  # bfloat16 of a float32; a half is one part
ROW_WORDS = SENDER_BLOCK // 2 + 4  # of the values of a block of senders, see TileValues


def parts_of(usage: Usage) -> int:
    """How many parts the values of all sources have at most."""
    return max(parts_of_source(source, usage) for source in usage.sources.values())


def parts_of_source(source: Source, usage: Usage) -> int:
    """One where values are binary, or halves as the weights are."""
    is_half = weight_dtype(usage.kernel) in HALVES
    return 1 if is_half or is_binary(source, usage) else PARTS


def weight_dtype(kernel: ir.Kernel) -> ir.DType:
    """That of all weights."""
    return kernel.weights[0].dtype


def why_not_tiles(kernel: ir.Kernel, schedule: ir.Schedule, limits: Limits) -> Refusal | None:
    """Refuse devices without tensor cores for all halves, and sums of anything but whole tiles."""
    if limits.capability < TENSOR_CORES_SINCE:
        has = ".".join(map(str, limits.capability))
        reason = f"bfloat16 needs compute capability 8.0; {limits.name} has {has}."
        return Refusal("unsupported-layout", reason, "Choose neurons-per-grid.")
    how = dict(schedule.gathers)
    events = [g.result for g in kernel.gathers if how.get(g.result) != "dense"]
    if events:
        reason = f"Tensor cores multiply whole tiles, and {events[0]!r} is to read events."
        return Refusal("unsupported-layout", reason, "Choose neurons-per-grid for events.")
    if schedule.layouts:
        name, layout = schedule.layouts[0]
        reason = f"Tensor cores multiply whole tiles, and {name!r} is to be read in {layout}."
        return Refusal("unsupported-layout", reason, "Choose neurons-per-grid for layouts.")
    return None


def why_not_dtypes(usage: Usage) -> Refusal | None:
    """Refuse what tensor cores do not multiply."""
    kernel, reason = usage.kernel, None
    dtype = weight_dtype(kernel) if kernel.weights else "float32"
    for weight in kernel.weights:
        if weight.dtype == "float64":
            reason = f"Tensor cores multiply float32 and halves, and {weight.name!r} is float64."
        elif weight.dtype != dtype:
            reason = f"{kernel.weights[0].name!r} is {dtype}, and {weight.name!r} {weight.dtype}."
    for source in usage.sources.values():
        if dtype in HALVES and source.value_dtype != dtype and not is_binary(source, usage):
            reason = f"{source.name!r} is {source.value_dtype}, and is multiplied with {dtype}."
    if reason is None:
        return None
    return Refusal("unsupported-layout", reason, "Choose neurons-per-grid.")
