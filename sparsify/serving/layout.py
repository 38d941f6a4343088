"""Which operands a compiled graph serves: their dtypes, sizes and orders of dims."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify.serving.size_guard import Run, SizeGuard
from sparsify.serving.spans import EVERY, Span

Dim = tuple[int, int]  # (index of the operand, dim)


@dataclass(frozen=True, slots=True)
class OperandLayout:
    """``strides`` is "contiguous", an order of the dims, or the strides themselves."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int, ...]
    strides: object
    varies: bool


class Layout:
    """The layouts that a graph was made for; the dims of one class vary together, within a span.

    ``least_size`` is the smallest size that a varying dim may have. Without ``spans``, each class
    has every size from there on. ``guard`` tells at which of them Python decides as it did.
    """

    def __init__(
        self,
        operands: Sequence[Tensor],
        classes: Sequence[Sequence[Dim]] = (),
        least_size: int = 1,
        spans: Sequence[Span] | None = None,
    ) -> None:
        self.classes = tuple(tuple(dims) for dims in classes)
        self.spans = (EVERY,) * len(self.classes) if spans is None else tuple(spans)
        self.least_size = least_size
        self.guard: SizeGuard | None = None
        varying = {index for dims in self.classes for index, _ in dims}
        self.layouts = tuple(
            OperandLayout(
                operand.dtype,
                operand.device,
                tuple(operand.shape),
                stride_class(operand),
                index in varying,
            )
            for index, operand in enumerate(operands)
        )
        self._looks = [
            (
                known.dtype,
                None if known.device.type == "cpu" else known.device,
                None if known.varies else torch.Size(known.shape),
                known.strides == "contiguous",
                known,
            )
            for known in self.layouts
        ]
        self._fixed = [
            (index, dim, size)
            for index in sorted(varying)
            for dim, size in enumerate(self.layouts[index].shape)
            if not any((index, dim) in dims for dims in self.classes)
        ]

    def serves(self, operands: Sequence[Tensor]) -> bool:
        """True if the graph gives the right values for these operands; takes microseconds."""
        pairs = zip(operands, self._looks, strict=True)
        for operand, (dtype, device, shape, is_contiguous, known) in pairs:
            if operand.dtype is not dtype:
                return False
            if not operand.is_cpu if device is None else operand.device != device:
                return False
            if shape is None:
                if operand.dim() != len(known.shape):
                    return False
            elif operand.shape != shape:
                return False
            if is_contiguous:
                if not operand.is_contiguous():
                    return False
            elif stride_class(operand) != known.strides:
                return False
        return not self.classes or self._sizes_fit(operands)

    def is_beyond(self, operands: Sequence[Tensor]) -> bool:
        """True if another recording may show that the graph serves these operands.

        Nothing else than the span of a class, or a question of Python's, keeps it from that.
        """
        unbounded = self._with_spans([EVERY] * len(self.classes))
        unbounded.guard = None
        return unbounded.serves(operands) and not self.serves(operands)

    def widened(self, operands: Sequence[Tensor], run: Run | None = None) -> Layout:
        """This one after a recording of these operands has shown that the graph serves them."""
        sizes = self.sizes(operands)
        if self.guard is not None and run is not None:
            self.guard.add(run)
        return self._with_spans(list(map(Span.widened, self.spans, sizes)))

    def sizes(self, operands: Sequence[Tensor]) -> tuple[int, ...]:
        """The size of every class."""
        return tuple(operands[index].shape[dim] for (index, dim), *_ in self.classes)

    def _with_spans(self, spans: Sequence[Span]) -> Layout:
        other = copy.copy(self)
        other.spans = tuple(spans)
        return other

    def why_not(self, operands: Sequence[Tensor], names: Sequence[str]) -> str:
        """The first difference, in words; "" if there is none."""
        for operand, known, name in zip(operands, self.layouts, names, strict=True):
            if operand.dtype is not known.dtype:
                return f"{name} is {operand.dtype} and was {known.dtype}"
            if operand.device != known.device:
                return f"{name} is on {operand.device} and was on {known.device}"
            if not known.varies and operand.shape != known.shape:
                return f"{name} has sizes {list(operand.shape)} and had {list(known.shape)}"
            if stride_class(operand) != known.strides:
                return f"{name} lies in another order in memory"
        return self._why_not_sizes(operands, names)

    def _why_not_sizes(self, operands: Sequence[Tensor], names: Sequence[str]) -> str:
        """Which of the sizes that vary cannot be what it is."""
        for index, dim, size in self._fixed:
            if operands[index].dim() != len(self.layouts[index].shape):
                return (
                    f"{names[index]} has {operands[index].dim()} dims and had {self._rank(index)}"
                )
            given = operands[index].shape[dim]
            if given != size:
                what = f"{names[index]} has size {given} in dim {dim}"
                return f"{what} and had {size} in both recordings"
        for (first, dim), *others in self.classes:
            if operands[first].dim() != len(self.layouts[first].shape):
                return (
                    f"{names[first]} has {operands[first].dim()} dims and had {self._rank(first)}"
                )
            size = operands[first].shape[dim]
            place = f"size {size} in dim {dim} of {names[first]}"
            if size < self.least_size:
                return f"{place} is below {self.least_size}, from where on the graph holds"
            for index, other in others:
                given = operands[index].shape[other]
                if given != size:
                    one = f"dim {other} of {names[index]}"
                    return f"{place} meets {given} in {one}, and both recordings had one size there"
        for span, ((index, dim), *_) in zip(self.spans, self.classes, strict=True):
            size = operands[index].shape[dim]
            if size not in span:
                known = f"beyond the {span.least} to {span.most} that were recorded"
                return f"{names[index]} has size {size} in dim {dim}, {known}"
        if self.guard is None:
            return ""
        sizes = self.sizes(operands)
        reason = self.guard.why_not(operands, sizes)
        what = f"the call has sizes of {list(sizes)}, which were not recorded"
        return f"{what}: {reason}" if reason else ""

    def _rank(self, index: int) -> int:
        return len(self.layouts[index].shape)

    def differs_in_sizes_only(self, operands: Sequence[Tensor]) -> bool:
        """True if another recording may give a graph for both."""
        if self.serves(operands):
            return False
        return all(
            operand.dtype is known.dtype
            and operand.device == known.device
            and operand.dim() == len(known.shape)
            for operand, known in zip(operands, self.layouts, strict=True)
        )

    def _sizes_fit(self, operands: Sequence[Tensor]) -> bool:
        for index, dim, size in self._fixed:
            if operands[index].shape[dim] != size:
                return False
        for dims, span in zip(self.classes, self.spans, strict=True):
            size = operands[dims[0][0]].shape[dims[0][1]]
            if size < self.least_size or size not in span:
                return False
            if any(operands[index].shape[dim] != size for index, dim in dims[1:]):
                return False
        return self.guard is None or self.guard.holds(operands, self.sizes(operands))


def stride_class(tensor: Tensor) -> object:
    """What operations can tell from strides, for all sizes: see ``OperandLayout``."""
    if tensor.is_contiguous():
        return "contiguous"
    stride, shape = tensor.stride(), tensor.shape
    dims = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: stride[d])
    span = 1
    for dim in dims:
        if stride[dim] != span:
            return ("strides", *stride)
        span *= shape[dim]
    return tuple(dims)
