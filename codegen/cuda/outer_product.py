"""Compiles and launches the CUDA kernels for the gradient of a weight; see outer_product.cuh.

Nothing here waits for the device: whether events are added is decided from sizes and from the
activity of the example.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Device, Function, Grid, Limits, Memory
from sparsify.codegen.cuda.headers import headers_of
from sparsify.codegen.outer_product import ROWS_PER_SUM, VALUES, Product, rows_of, source_of

OWN = 8  # senders of a warp
WARP = 32
VALUE_BYTES = {"float": 4, "double": 8}
MOST_ROWS = 2**31 - ROWS_PER_SUM
SUMS_BYTES = 64 * 2**20  # of the sums of blocks, where rows are shared out
SUM_THREADS = 256
REMEMBERED = 256  # sizes; numbers of rows differ between calls
# What a GPU multiplies, at 20 T/s, while Python launches a kernel.
SMALL_PRODUCT = 1 << 27
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


@dataclass(frozen=True)
class Shape:
    """How a product is shared out: the tile of a block of threads, and the chunks of rows."""

    warps: int
    width: int
    tiles: int
    chunks: int

    @property
    def threads(self) -> int:
        return self.warps * WARP

    def shared_bytes(self, value_bytes: int) -> int:
        """For the totals over blocks of rows, where a block of threads adds all of them."""
        return OWN * self.width * self.threads * value_bytes if self.chunks == 1 else 0


def shape_of(rows: int, receivers: int, senders: int, value_bytes: int, limits: Limits) -> Shape:
    """Large tiles read less, so rows are shared out where there are few; no bit depends on it."""
    most = 16 if value_bytes == 4 else 8  # shared memory without asking for more
    warps = next((warps for warps in (4, 8) if senders <= OWN * warps), most)
    width = 1 if receivers <= WARP else 2
    tiles = -(-senders // (OWN * warps)) * -(-receivers // (WARP * width))
    blocks = -(-rows // ROWS_PER_SUM)
    chunks = 1
    if tiles < limits.multiprocessors and blocks * receivers * senders * value_bytes <= SUMS_BYTES:
        chunks = min(blocks, -(-2 * limits.multiprocessors // tiles))
    return Shape(warps, width, tiles, chunks)


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


@dataclass(frozen=True)
class Sizes:
    """What a kernel is compiled and shared out for; ``value`` and ``source`` are types in C++."""

    value: str
    source: str
    rows: int
    receivers: int
    senders: int
    device: torch.device

    @property
    def blocks(self) -> int:
        """Of rows, each of which is summed on its own."""
        return -(-self.rows // ROWS_PER_SUM)


@dataclass(frozen=True)
class Launches:
    """The kernels of a product, with their grids; without ``add_sums``, ``add`` writes all."""

    chunks: int
    add: Function
    grid: Grid
    add_sums: Function | None
    sums_grid: Grid


@dataclass(frozen=True)
class CudaOuterProducts:
    """Gradients of weights on a GPU or its emulator.

    ``any_size``: kernels run whatever is gained by them.
    """

    device: Device
    any_size: bool = False
    _launches: dict[Sizes, Launches] = field(default_factory=dict, repr=False, compare=False)

    def load(self, activity: float | None) -> CudaOuterKernel:
        return CudaOuterKernel(self, activity)

    def launches(self, sizes: Sizes) -> Launches:
        """The kernels, compiled if need be. Raises what Device.compile and Device.load raise."""
        found = self._launches.get(sizes)
        if found is None:
            found = self.shared_out(sizes, self._shape_for(sizes))
            if len(self._launches) >= REMEMBERED:
                self._launches.clear()
            self._launches[sizes] = found
        return found

    def shared_out(self, sizes: Sizes, shape: Shape) -> Launches:
        """The kernels for tiles and chunks of ``shape``."""
        value_bytes = VALUE_BYTES[sizes.value]
        source = render_outer_product(sizes.value, sizes.source, shape.warps, shape.width)
        squares = -(-sizes.receivers // WARP) * -(-sizes.senders // WARP)
        return Launches(
            shape.chunks,
            self._function(source, sizes.device),
            Grid(shape.tiles * shape.chunks, shape.threads, shape.shared_bytes(value_bytes)),
            self._function(render_sums(sizes.value), sizes.device) if shape.chunks > 1 else None,
            Grid(squares, SUM_THREADS),
        )

    def _shape_for(self, sizes: Sizes) -> Shape:
        value_bytes, limits = VALUE_BYTES[sizes.value], self.device.limits(sizes.device)
        return shape_of(sizes.rows, sizes.receivers, sizes.senders, value_bytes, limits)

    def _function(self, source: Source, device: torch.device) -> Function:
        path = self.device.compile(source, headers_of("outer_product.cuh"))
        return self.device.load(path, source.entry, device)


class CudaOuterKernel:
    """Computes the gradients of one weight; ``activity`` is what the example had."""

    def __init__(self, products: CudaOuterProducts, activity: float | None) -> None:
        self._products, self._activity = products, activity
        self._active: dict[torch.device, Tensor] = {}  # int64 [1], counted by the kernels
        self._seen = 0

    @property
    def events(self) -> tuple[int, int]:
        """Waits for the device."""
        return sum(int(count.item()) for count in self._active.values()), self._seen

    def reset_events(self) -> None:
        self._seen = 0
        for count in self._active.values():
            count.zero_()

    def why_not(self, d: Tensor, activity: Tensor, senders: int) -> str:
        wanted = self._products.device.type
        if d.device.type != wanted or activity.device != d.device:
            return f"the tensors are on {d.device} and {activity.device}, not on one {wanted}"
        if d.dtype not in VALUES:
            return f"there is no kernel for {d.dtype}"
        if d.shape[:-1].numel() > MOST_ROWS:
            return f"there are more than {MOST_ROWS} rows"
        if self._products.any_size:
            return ""
        if d.numel() * senders < SMALL_PRODUCT:
            return "the product is small"
        most = break_even(d.dtype)
        if self._activity is not None and self._activity > most:
            return f"{self._activity:.1%} of the activation were active, more than {most:.1%}"
        return ""

    def __call__(
        self, d: Tensor, activity: Tensor, senders: int, *, packed: bool, total: Tensor | None
    ) -> Product:
        result = d.new_empty(d.shape[-1], senders) if total is None else total
        self._seen += d.shape[:-1].numel() * senders
        add_outer_products(
            self._products,
            d,
            activity,
            result,
            self._count_on(d.device),
            packed=packed,
            adds_to_result=total is not None,
        )
        return Product(result)

    def _count_on(self, device: torch.device) -> Tensor:
        if device not in self._active:
            self._active[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._active[device]


def add_outer_products(
    products: CudaOuterProducts,
    d: Tensor,
    activity: Tensor,
    result: Tensor,
    active: Tensor,
    *,
    packed: bool,
    adds_to_result: bool,
    shape: Shape | None = None,
) -> None:
    """Write the sum of ``d[row, r] * activity[row, s]`` over all rows to ``result`` ``[R, S]``.

    As ``cpp_outer_product.add_events``, but where ``d`` is not finite every value of the activity
    is multiplied. ``active`` ``[1]`` of int64 grows by the number of active values. The bits do not
    depend on ``shape``.
    """
    source, readable = source_of(activity, d.dtype, packed)
    left, right = rows_of(d), rows_of(readable)
    rows, (receivers, senders) = d.shape[:-1].numel(), result.shape
    sizes = Sizes(VALUES[d.dtype], source, rows, receivers, senders, d.device)
    launches = products.launches(sizes) if shape is None else products.shared_out(sizes, shape)
    sums = None
    if launches.add_sums is not None:
        sums = torch.empty((sizes.blocks, senders, receivers), dtype=d.dtype, device=d.device)
    gradient = Memory(result, "gradient", written=True, fresh=not adds_to_result)
    launches.add.launch(
        launches.grid,
        (
            Memory(left.tensor, "d"),
            Memory(right.tensor, "activity"),
            gradient,
            0 if sums is None else Memory(sums, "sums of blocks", written=True, fresh=True),
            Memory(active, "active values", written=True),
            *(rows, receivers, senders),
            *(left.run, left.outer, left.inner),
            *(right.run, right.outer, right.inner),
            int(adds_to_result),
            launches.chunks,
        ),
    )
    if sums is not None and launches.add_sums is not None:
        launches.add_sums.launch(
            launches.sums_grid,
            (
                Memory(sums, "sums of blocks"),
                gradient,
                *(sizes.blocks, receivers, senders),
                int(adds_to_result),
            ),
        )


def break_even(dtype: torch.dtype) -> float:
    """The share of active values above which a dense product is expected to be faster.

    Counted, not measured: for each sender, 32 rows and 64 receivers a warp issues about 20
    instructions and 12 an event, and a multiprocessor 4 in a cycle. Dense products do about 100 of
    their multiplications in a cycle, with TF32 some four times as many. Adding float64 takes twice
    as long.
    """
    dense_cycles = 32 * 64 / 100
    if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dense_cycles /= 4
    if dtype is torch.float64:
        dense_cycles /= 2
    return max(0.01, (4 * dense_cycles - 20) / (12 * 32))
