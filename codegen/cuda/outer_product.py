"""Compiles and launches the CUDA kernels for the gradient of a weight; see outer_product.cuh.

Nothing here waits for the device: whether events are added is decided from sizes and from the
activity of the example.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import (
    Device,
    Function,
    Grid,
    Launch,
    Memory,
    Word,
    like_of,
)
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.cuda.outer_shape import WARP, Shape, shape_of
from sparsify.codegen.cuda.outer_text import SUM_THREADS, render_outer_product, render_sums
from sparsify.codegen.outer_product import (
    ROWS_PER_SUM,
    VALUES,
    Foreseen,
    Product,
    rows_of,
    source_of,
)

VALUE_BYTES = {"float": 4, "double": 8}
MOST_ROWS = 2**31 - ROWS_PER_SUM
REMEMBERED = 256  # sizes; numbers of rows differ between calls
# What a GPU multiplies, at 20 T/s, while Python launches a kernel.
SMALL_PRODUCT = 1 << 27
# A third of the time that torch.empty takes to read its arguments.
_empty_like: Callable[[Tensor], Tensor] = torch.empty_like


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

    def compile(self, product: Foreseen) -> None:
        """Does nothing: how a product is shared out depends on the device."""

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
        path = self.device.compile(source, headers_for(source))
        return self.device.load(path, source.entry, device)


class Prepared(NamedTuple):
    """A product that can be computed again of other tensors of the same sizes and strides.

    The first launch takes d, the activity, the result and, if ``sums`` is what they are like, the
    sums of blocks; the second one, which adds these up, the sums and the result.
    """

    add: Launch
    sums: Tensor | None
    add_sums: Launch | None
    made: Tensor  # what a result is like

    def run(self, d: Tensor, activity: Tensor, result: Tensor) -> None:
        if self.sums is None or self.add_sums is None:
            self.add((d, activity, result))
            return
        sums = _empty_like(self.sums)
        self.add((d, activity, result, sums))
        self.add_sums((sums, result))


class CudaOuterKernel:
    """Computes the gradients of one weight; ``activity`` is what the example had."""

    def __init__(self, products: CudaOuterProducts, activity: float | None) -> None:
        self._products, self._activity = products, activity
        self._active: dict[torch.device, Tensor] = {}  # int64 [1], counted by the kernels
        self._prepared: dict[Hashable, Prepared] = {}
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
        device, shape = d.device, d.shape
        stream = self._products.device.stream(device)
        # All that launches depend on.
        of_d = d.dtype, shape, d.stride(), device, d.is_neg()
        of_activity = activity.dtype, activity.shape, activity.stride(), activity.is_neg()
        key = stream, senders, packed, total is None, of_d, of_activity
        prepared = self._prepared.get(key)
        self._seen += shape[:-1].numel() * senders
        if prepared is not None:
            result = _empty_like(prepared.made) if total is None else total
            prepared.run(d, activity, result)
            return Product(result)
        result = d.new_empty(shape[-1], senders) if total is None else total
        launches = _launches_of(
            self._products,
            d,
            activity,
            result,
            self._count_on(device),
            packed=packed,
            adds_to_result=total is not None,
        )
        launches.launch()
        if stream is not None:
            self._prepare(key, launches, d, activity, stream)
        return Product(result)

    def _prepare(
        self, key: Hashable, launches: _Launches, d: Tensor, activity: Tensor, stream: int
    ) -> None:
        """Keep what computes the product again, if the tensors are read where they lie."""
        if not launches.reads(d, activity):
            return
        if len(self._prepared) >= REMEMBERED:
            self._prepared = {}
        self._prepared[key] = launches.prepare(stream)

    def _count_on(self, device: torch.device) -> Tensor:
        if device not in self._active:
            with torch.inference_mode(False):
                self._active[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._active[device]


@dataclass(frozen=True)
class _Launches:
    """The launches of one product, with their words."""

    launches: Launches
    add: Sequence[Word]
    add_sums: Sequence[Word]

    def launch(self) -> None:
        self.launches.add.launch(self.launches.grid, self.add)
        if self.launches.add_sums is not None:
            self.launches.add_sums.launch(self.launches.sums_grid, self.add_sums)

    def prepare(self, stream: int) -> Prepared:
        launches, result, sums = self.launches, self.add[2], self.add[3]
        assert isinstance(result, Memory)
        made = like_of(result.tensor)
        if launches.add_sums is None or not isinstance(sums, Memory):
            add = launches.add.prepare(launches.grid, self.add, (0, 1, 2), stream)
            return Prepared(add, None, None, made)
        add = launches.add.prepare(launches.grid, self.add, (0, 1, 2, 3), stream)
        then = launches.add_sums.prepare(launches.sums_grid, self.add_sums, (0, 1), stream)
        return Prepared(add, like_of(sums.tensor), then, made)

    def reads(self, d: Tensor, activity: Tensor) -> bool:
        """Whether the kernel reads these tensors, and no copies."""
        return all(
            isinstance(word, Memory) and word.tensor.data_ptr() == tensor.data_ptr()
            for word, tensor in zip(self.add, (d, activity), strict=False)
        )


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
    given = products, d, activity, result, active
    _launches_of(*given, packed=packed, adds_to_result=adds_to_result, shape=shape).launch()


def _launches_of(
    products: CudaOuterProducts,
    d: Tensor,
    activity: Tensor,
    result: Tensor,
    active: Tensor,
    *,
    packed: bool,
    adds_to_result: bool,
    shape: Shape | None = None,
) -> _Launches:
    """What ``add_outer_products`` launches."""
    d, activity = d.resolve_neg(), activity.resolve_neg()  # they may be negated lazily
    source, readable = source_of(activity, d.dtype, packed)
    left, right = rows_of(d), rows_of(readable)
    rows, (receivers, senders) = d.shape[:-1].numel(), result.shape
    sizes = Sizes(VALUES[d.dtype], source, rows, receivers, senders, d.device)
    launches = products.launches(sizes) if shape is None else products.shared_out(sizes, shape)
    sums: Word = 0
    if launches.add_sums is not None:
        made = torch.empty((sizes.blocks, senders, receivers), dtype=d.dtype, device=d.device)
        sums = Memory(made, "sums of blocks", written=True, fresh=True)
    gradient = Memory(result, "gradient", written=True, fresh=not adds_to_result)
    add = (
        Memory(left.tensor, "d"),
        Memory(right.tensor, "activity"),
        gradient,
        sums,
        Memory(active, "active values", written=True),
        *(rows, receivers, senders),
        *(left.run, left.outer, left.inner),
        *(right.run, right.outer, right.inner),
        int(adds_to_result),
        launches.chunks,
    )
    if not isinstance(sums, Memory):
        return _Launches(launches, add, ())
    summed = Memory(sums.tensor, "sums of blocks")
    numbers = sizes.blocks, receivers, senders, int(adds_to_result)
    return _Launches(launches, add, (summed, gradient, *numbers))


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
