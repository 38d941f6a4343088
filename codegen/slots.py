"""The tensors of a kernel as calls give them: what is checked, accepted and made for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch

from sparsify import ir
from sparsify.saved_bits import packed_size

TORCH_DTYPES: dict[ir.DType, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
    "bits": torch.uint8,
}
CPU = torch.device("cpu")


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


Shapes = tuple[tuple[int, int], list[tuple[int, ...]], list[tuple[int, ...]]]


class Slots:
    """The operands and outputs of a kernel, and the shapes that they have in a call."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.operands = [Slot.of(kernel, operand) for operand in kernel.operands]
        self.outputs = [Slot.of(kernel, output) for output in kernel.outputs]
        self._name = kernel.name
        self._needs_step = any("T" not in o.axes for o in kernel.outputs)
        self._shapes: Shapes = (-1, -1), [], []

    def shapes(self, steps: int, batch: int) -> Shapes:
        """Steps and batch, and the shapes of operands and of outputs.

        Raises ValueError for negative numbers, and for zero steps where an output is the last
        step's value.
        """
        if steps < 1 or batch < 1:
            self._check_extents(steps, batch)
        shapes = self._shapes
        if shapes[0] != (steps, batch):
            operands = [slot.shape(steps, batch) for slot in self.operands]
            outputs = [slot.shape(steps, batch) for slot in self.outputs]
            shapes = self._shapes = (steps, batch), operands, outputs
        return shapes

    def _check_extents(self, steps: int, batch: int) -> None:
        if steps < 0 or batch < 0:
            raise ValueError(f"kernel {self._name!r}: {steps} steps of {batch} batch rows")
        if steps == 0 and self._needs_step:
            raise ValueError("zero steps: an output without a T axis has no last step")


def lead(axes: tuple[ir.Axis, ...]) -> tuple[ir.Axis, ...]:
    """The axes whose strides a kernel is told; N is contiguous."""
    return tuple(axis for axis in axes if axis != "N")


def counted(kernel: ir.Kernel, gather: ir.Gather) -> int:
    """How many senders a Gather has, or how many sums, if it is restricted."""
    weight = kernel.weight(gather.weight)
    if weight.convolution is not None:
        return weight.convolution.channels[0] * math.prod(weight.convolution.maps)
    return kernel.population_size(weight.senders if gather.only is None else weight.receivers)


def take_operand(
    tensors: Mapping[str, torch.Tensor],
    slot: Slot,
    shape: tuple[int, ...],
    device: torch.device,
    strides: list[int],
) -> torch.Tensor:
    """The operand of a call with contiguous neurons; appends the strides of its other axes."""
    tensor = tensors.get(slot.name)
    if not fits(tensor, slot.dtype, shape, device):
        raise misfit(tensor, slot.name, slot.describe(), slot.dtype, device, shape)
    if tensor.is_neg():  # the imaginary part of a conjugate is negated lazily
        tensor = tensor.resolve_neg()
    steps = tensor.stride()
    if slot.axes and slot.axes[-1] == "N":
        if steps[-1] != 1 and slot.size > 1:
            tensor = tensor.contiguous()
            steps = tensor.stride()
        steps = steps[:-1]
    strides += steps
    return tensor


def take_output(
    given: Mapping[str, torch.Tensor] | None,
    slot: Slot,
    shape: tuple[int, ...],
    device: torch.device,
    strides: list[int],
) -> torch.Tensor:
    """The output of a call, given or made; appends the strides of all axes but N."""
    tensor = given.get(slot.name) if given else None
    if tensor is None:
        tensor = torch.empty(shape, dtype=slot.dtype, device=device)
    else:
        _check_output(tensor, slot, shape, device)
    strides += tensor.stride()[:-1]
    return tensor


def _check_output(
    tensor: torch.Tensor, slot: Slot, shape: tuple[int, ...], device: torch.device
) -> None:
    if not fits(tensor, slot.dtype, shape, device) or tensor.is_neg():
        raise misfit(tensor, slot.name, slot.describe(), slot.dtype, device, shape)
    *outer, inner = tensor.stride()
    if inner != 1 and slot.size > 1:
        raise ValueError(f"output {slot.name!r}: its last axis must be contiguous")
    if any(extent > 1 and not step for extent, step in zip(shape, outer, strict=False)):
        raise ValueError(f"output {slot.name!r} overlaps itself: it was expanded")


def fits(
    tensor: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> TypeGuard[torch.Tensor]:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.dtype is dtype
        and tensor.shape == shape
        and tensor.device == device
        and tensor.layout is torch.strided
    )


def misfit(
    tensor: object,
    name: str,
    wanted: str,
    dtype: torch.dtype,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
) -> ValueError | TypeError:
    """What is wrong with a tensor that was given to a kernel."""
    if tensor is None:
        return ValueError(f"tensor {name!r} is missing: expected {wanted}")
    if not isinstance(tensor, torch.Tensor):
        return TypeError(f"{name!r} is {type(tensor).__name__}: expected a tensor {wanted}")
    given = f"{list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
    here = f" = {list(shape)}" if shape is not None else ""
    place = "the CPU" if device == CPU else str(device)
    message = f"tensor {name!r} is {given}, {tensor.layout}: expected {wanted}{here} on {place}"
    return ValueError(message) if tensor.dtype is dtype else TypeError(message)
