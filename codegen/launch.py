"""Calling a compiled kernel: checks of tensors, strides, packed weights, event counters."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, TypeGuard

import torch

from sparsify import ir
from sparsify.codegen.backend import Source
from sparsify.codegen.runtime import PackedWeight, Runtime
from sparsify.codegen.usage import SOURCE_BLOCK, Packing, packings
from sparsify.saved_bits import packed_size

TORCH_DTYPES: dict[ir.DType, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "bits": torch.uint8,
}
CPU = torch.device("cpu")
PAIRS_PER_NEURON = 64  # weights that cost as much as the update of a neuron, at some 20 % activity
ALONE = 8192  # neuron updates that take one thread no longer than it takes to wake another
FunctionOf = Callable[[ir.Kernel, ir.Schedule], Any]


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of the kernel as calls check it. ``size`` is the extent of its N axis, if any.

    Of bits that is a number of bytes.
    """

    name: str
    axes: tuple[ir.Axis, ...]
    size: int
    dtype: torch.dtype

    @staticmethod
    def of(kernel: ir.Kernel, tensor: ir.Operand | ir.Output) -> Slot:
        size = 1 if tensor.population is None else kernel.population_size(tensor.population)
        size = packed_size(size) if tensor.dtype == "bits" else size
        return Slot(tensor.name, tensor.axes, size, TORCH_DTYPES[tensor.dtype])

    def shape(self, steps: int, batch: int) -> tuple[int, ...]:
        extent = {"T": steps, "B": batch, "N": self.size}
        return tuple(extent[axis] for axis in self.axes)

    def describe(self) -> str:
        axes = ", ".join(str(self.size) if axis == "N" else axis for axis in self.axes)
        return f"[{axes}] of {self.dtype}"


@dataclass(frozen=True, slots=True)
class _PackedSlot:
    """A weight of the kernel in one layout."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    packed: PackedWeight
    by_senders: bool

    @staticmethod
    def of(kernel: ir.Kernel, packing: Packing, runtime: Runtime, tile: int) -> _PackedSlot:
        weight, by_senders = packing.weight, packing.by == "senders"
        receivers, senders = weight.receivers, weight.senders
        return _PackedSlot(
            weight.name,
            (kernel.population_size(receivers), kernel.population_size(senders)),
            TORCH_DTYPES[weight.dtype],
            PackedWeight(runtime, SOURCE_BLOCK if by_senders else tile),
            by_senders,
        )


class CppLaunchable:
    """A loaded kernel; see ``backend.Launchable``. Any number of threads may call it at once.

    ``function_of`` compiles the kernel for another schedule: gathers whose weights are not finite
    run dense, because skipping a zero would skip 0 * inf.
    """

    def __init__(
        self,
        kernel: ir.Kernel,
        schedule: ir.Schedule,
        source: Source,
        function: Any,
        runtime: Runtime,
        tile: int,
        function_of: FunctionOf,
    ) -> None:
        self.kernel, self.schedule, self.source = kernel, schedule, source
        self._runtime, self._function_of = runtime, function_of
        self._operands = [Slot.of(kernel, operand) for operand in kernel.operands]
        self._outputs = [Slot.of(kernel, output) for output in kernel.outputs]
        self._weights = [
            _PackedSlot.of(kernel, packing, runtime, tile) for packing in packings(kernel, schedule)
        ]
        self._counted = {g.result: _counted(kernel, g) for g in kernel.gathers}
        self._active = (ctypes.c_int64 * max(1, len(kernel.gathers)))()
        self._row_steps = 0  # time steps times batch rows of all calls
        self._lock = Lock()
        self._work = sum(kernel.population_size(phase.population) for phase in kernel.phases)
        self._work += sum(math.prod(w.shape) for w in self._weights) // PAIRS_PER_NEURON
        self._needs_step = any("T" not in o.axes for o in kernel.outputs)
        self._functions = {frozenset[str](): _declare(function)}
        tensors = len(self._operands) + len(self._weights) + len(self._outputs)
        strided = (*self._operands, *self._outputs)
        self._pointers = ctypes.c_void_p * max(1, tensors)
        self._strides = ctypes.c_int64 * max(1, sum(len(lead(s.axes)) for s in strided))
        self._shapes: tuple[tuple[int, int], list[tuple[int, ...]], list[tuple[int, ...]]]
        self._shapes = (-1, -1), [], []

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, torch.Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run the kernel; see ``backend.Launchable``.

        Raises ValueError and TypeError for tensors that do not fit, naming them, and ValueError
        for zero steps where an output is the last step's value.
        """
        if steps < 1 or batch < 1:
            self._check_extents(steps, batch)
        shapes = self._shapes
        if shapes[0] != (steps, batch):
            shapes = self._shapes = self._shapes_of(steps, batch)
        pointers: list[int] = []
        strides: list[int] = []
        alive: list[torch.Tensor] = []  # what was made for this call only
        for slot, shape in zip(self._operands, shapes[1], strict=True):
            _add_operand(tensors, slot, shape, pointers, strides, alive)
        infinite = self._add_weights(tensors, frozen, pointers, alive)
        results = {
            slot.name: _add_output(outputs, slot, shape, pointers, strides)
            for slot, shape in zip(self._outputs, shapes[2], strict=True)
        }
        if steps and batch:
            function = self._functions.get(infinite) or self._dense_function(infinite)
            failed = function(
                self._runtime.table,
                self._pointers(*pointers),
                self._strides(*strides),
                steps,
                batch,
                torch.get_num_threads() if steps * batch * self._work > ALONE else 1,
                self._active,
            )
            if failed:
                raise MemoryError(f"kernel {self.kernel.name!r}: no memory for {batch} batch rows")
            with self._lock:
                self._row_steps += steps * batch
        return results

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        """Per Gather, how many senders were active and how many there were, over all calls.

        Of restricted ones, how many sums were wanted and how many there were.
        """
        with self._lock:
            counted, row_steps = list(self._active), self._row_steps
        pairs = zip(counted, self._counted.items(), strict=False)
        return {result: (active, row_steps * n) for active, (result, n) in pairs}

    def reset_events(self) -> None:
        with self._lock:
            self._row_steps = 0
            ctypes.memset(self._active, 0, ctypes.sizeof(self._active))

    def _add_weights(
        self,
        tensors: Mapping[str, torch.Tensor],
        frozen: bool,
        pointers: list[int],
        alive: list[torch.Tensor],
    ) -> frozenset[str]:
        """Pack the weights; the names of those that are not finite."""
        infinite = []
        for slot in self._weights:
            weight = tensors.get(slot.name)
            if not _fits(weight, slot.dtype, slot.shape):
                wanted = f"{list(slot.shape)} of {slot.dtype}"
                raise _misfit(weight, slot.name, wanted, slot.dtype)
            packed = slot.packed.get(weight.t() if slot.by_senders else weight, frozen=frozen)
            pointers.append(packed.tiles.data_ptr())
            alive.append(packed.tiles)
            if not packed.all_finite:
                infinite.append(slot.name)
        return frozenset(infinite)

    def _dense_function(self, infinite: frozenset[str]) -> Any:
        """The kernel whose gathers through ``infinite`` weights are dense, compiled at need.

        Restricted ones skip no sender, and what they skip is zero whatever the weights are.
        """
        read = [g for g in self.kernel.gathers if g.only is None]
        dense = {g.result for g in read if g.weight in infinite}
        gathers: tuple[tuple[str, Any], ...] = tuple(
            (result, "dense" if result in dense else how) for result, how in self.schedule.gathers
        )
        if gathers == self.schedule.gathers:
            function = self._functions[frozenset()]
        else:
            schedule = replace(self.schedule, gathers=gathers)
            function = _declare(self._function_of(self.kernel, schedule))
        self._functions[infinite] = function
        return function

    def _shapes_of(
        self, steps: int, batch: int
    ) -> tuple[tuple[int, int], list[tuple[int, ...]], list[tuple[int, ...]]]:
        operands = [slot.shape(steps, batch) for slot in self._operands]
        outputs = [slot.shape(steps, batch) for slot in self._outputs]
        return (steps, batch), operands, outputs

    def _check_extents(self, steps: int, batch: int) -> None:
        if steps < 0 or batch < 0:
            raise ValueError(f"kernel {self.kernel.name!r}: {steps} steps of {batch} batch rows")
        if steps == 0 and self._needs_step:
            raise ValueError("zero steps: an output without a T axis has no last step")


def lead(axes: tuple[ir.Axis, ...]) -> tuple[ir.Axis, ...]:
    """The axes whose strides a kernel is told; N is contiguous."""
    return tuple(axis for axis in axes if axis != "N")


def _add_operand(
    tensors: Mapping[str, torch.Tensor],
    slot: Slot,
    shape: tuple[int, ...],
    pointers: list[int],
    strides: list[int],
    alive: list[torch.Tensor],
) -> None:
    tensor = tensors.get(slot.name)
    if not _fits(tensor, slot.dtype, shape):
        raise _misfit(tensor, slot.name, slot.describe(), slot.dtype, shape)
    if tensor.is_neg():  # the imaginary part of a conjugate is negated lazily
        tensor = tensor.resolve_neg()
        alive.append(tensor)
    steps = tensor.stride()
    if slot.axes and slot.axes[-1] == "N":
        if steps[-1] != 1 and slot.size > 1:
            tensor = tensor.contiguous()
            alive.append(tensor)
            steps = tensor.stride()
        steps = steps[:-1]
    strides += steps
    pointers.append(tensor.data_ptr())


def _add_output(
    given: Mapping[str, torch.Tensor] | None,
    slot: Slot,
    shape: tuple[int, ...],
    pointers: list[int],
    strides: list[int],
) -> torch.Tensor:
    tensor = given.get(slot.name) if given else None
    if tensor is None:
        tensor = torch.empty(shape, dtype=slot.dtype, device=CPU)
    else:
        _check_output(tensor, slot, shape)
    strides += tensor.stride()[:-1]
    pointers.append(tensor.data_ptr())
    return tensor


def _check_output(tensor: torch.Tensor, slot: Slot, shape: tuple[int, ...]) -> None:
    if not _fits(tensor, slot.dtype, shape) or tensor.is_neg():
        raise _misfit(tensor, slot.name, slot.describe(), slot.dtype, shape)
    *outer, inner = tensor.stride()
    if inner != 1 and slot.size > 1:
        raise ValueError(f"output {slot.name!r}: its last axis must be contiguous")
    if any(extent > 1 and not step for extent, step in zip(shape, outer, strict=False)):
        raise ValueError(f"output {slot.name!r} overlaps itself: it was expanded")


def _fits(tensor: object, dtype: torch.dtype, shape: tuple[int, ...]) -> TypeGuard[torch.Tensor]:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.is_cpu
        and tensor.layout is torch.strided
    )


def _misfit(
    tensor: object,
    name: str,
    wanted: str,
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = None,
) -> ValueError | TypeError:
    """What is wrong with a tensor that was given to a kernel."""
    if tensor is None:
        return ValueError(f"tensor {name!r} is missing: expected {wanted}")
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{name!r} is {type(tensor).__name__}: expected a tensor {wanted}")
    given = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    here = f" = {list(shape)}" if shape is not None else ""
    message = f"tensor {name!r} is {given}, {tensor.layout}: expected {wanted}{here} on the CPU"
    return ValueError(message) if tensor.dtype is dtype else TypeError(message)


def _declare(function: Any) -> Any:
    """Tell ctypes what the entry of a kernel takes; see ``frame_text.write_entry``."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_int, pointer]
    function.restype = ctypes.c_int
    return function


def _counted(kernel: ir.Kernel, gather: ir.Gather) -> int:
    """How many senders a Gather has, or how many sums, if it is restricted."""
    weight = next(w for w in kernel.weights if w.name == gather.weight)
    return kernel.population_size(weight.senders if gather.only is None else weight.receivers)
