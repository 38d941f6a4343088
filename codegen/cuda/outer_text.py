"""CUDA text of the kernels for the gradient of a weight; see outer_product.cuh."""

from __future__ import annotations

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.outer_shape import OWN, WARP

SUM_THREADS = 256
TEXT = """\
// The gradient of a weight of {value}, from an activity of {source}: {warps} warps, whose lanes add
// {width} receivers at once.
#include "outer_product.cuh"

using Call = sparsify::OuterCall;

extern "C" __global__ void __launch_bounds__({threads}, {resident})
{entry}(const Call call) {{
  sparsify::add_outer_products<{value}, {type}, {warps}, {width}>(call);
}}
"""
SUMS_TEXT = """\
// The gradient of a weight of {value}, from the sums of blocks of rows.
#include "outer_product.cuh"

using Call = sparsify::SumsCall;

extern "C" __global__ void __launch_bounds__({threads})
{entry}(const Call call) {{
  sparsify::add_sums<{value}>(call);
}}
"""


def render_outer_product(value: str, source: str, warps: int, width: int) -> Source:
    """The kernel that adds events; ``value`` and ``source`` are types in C++."""
    entry = f"run_outer_product_{value}_{source.lower()}_{OWN * warps}x{WARP * width}"
    type_name = f"sparsify::{source}" if source == "Bits" else source
    text = TEXT.format(
        value=value,
        source=source,
        type=type_name,
        warps=warps,
        width=width,
        threads=warps * WARP,
        resident=2 if (value, source, warps) == ("float", "Bits", 8) else 1,
        entry=entry,
    )
    return Source(text, f"{entry}.cu", entry)


def render_sums(value: str) -> Source:
    """The kernel that adds the sums of blocks."""
    entry = f"run_sums_of_blocks_{value}"
    return Source(
        SUMS_TEXT.format(value=value, threads=SUM_THREADS, entry=entry), f"{entry}.cu", entry
    )
