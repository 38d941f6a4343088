"""Weights that are computed from stored tensors, kept until one of those holds other bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify.codegen.contents import Contents
from sparsify.codegen.runtime import load_runtime


@dataclass(frozen=True)
class _Kept:
    """What was computed: of which contents, and of which tensors, which are kept alive."""

    contents: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    marks: tuple[int, ...]


class KeptWeights(nn.Module):
    """Computes ``graph`` of stored tensors where they hold other bits than at the last call.

    Values are never written to: when they change, they are other tensors at other addresses. Those
    in ``given`` leave the model, and may be written to by others: then all are computed anew.
    Tensors that are not on the CPU are not looked at, which would wait for their device: values
    are computed in every call. ``frozen`` is the user's promise that nothing changes.
    """

    def __init__(self, graph: fx.GraphModule, given: Collection[int] = ()) -> None:
        super().__init__()
        self.graph, self.given = graph, tuple(given)
        self.frozen = False
        self.computed = 0  # how many times
        self._kept: _Kept | None = None  # replaced as a whole: several threads may call at once
        self._looks: list[Contents] = []  # one for each input

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kept = self._kept
        is_same = kept is not None and all(map(_is_same, inputs, kept.inputs))
        if kept is not None and is_same and self.frozen:
            return kept.values
        contents = self._contents(inputs)
        if kept is not None and contents and contents == kept.contents and self._is_intact(kept):
            if not is_same:  # moved, with the same bits
                self._kept = _Kept(contents, inputs, kept.values, kept.marks)
            return kept.values
        values = self._compute(inputs)
        marks = tuple(_mark(values[index]) for index in self.given)
        self._kept = _Kept(contents, inputs, values, marks)
        return values

    def _contents(self, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        if not all(tensor.is_cpu for tensor in inputs):
            return ()
        looks = self._looks = self._looks or [Contents(load_runtime()) for _ in inputs]
        return tuple([look.look(tensor) for look, tensor in zip(looks, inputs, strict=True)])

    def _is_intact(self, kept: _Kept) -> bool:
        return all(
            _mark(kept.values[index]) == mark
            for index, mark in zip(self.given, kept.marks, strict=True)
        )

    def _compute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self.computed += 1
        with torch.no_grad():
            values: tuple[Tensor, ...] = self.graph(*inputs)
        held = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        # Operations such as ``contiguous`` return what they are given where nothing is to be done.
        return tuple(v.clone() if v.untyped_storage().data_ptr() in held else v for v in values)


def _is_same(tensor: Tensor, known: Tensor) -> bool:
    if tensor is known:
        return True
    layouts = ((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (tensor, known))
    return next(layouts) == next(layouts)


def _mark(value: Tensor) -> int:
    """What tells whether a value that left the model was written to; inference tensors count no
    versions."""
    if not value.is_inference():
        return value._version
    return load_runtime().content_hash(value) if value.is_cpu else 0
