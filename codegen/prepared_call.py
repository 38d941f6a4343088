"""A call of a C++ kernel that can be made again, with other tensors of the same layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sparsify.codegen.contents import layout_of
from sparsify.codegen.packed_weight import Current, PackedWeight

# A third of the time that torch.empty takes to read its arguments.
empty_like: Any = torch.empty_like


class Given(NamedTuple):
    """What an operand has to be."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]


class PreparedWeight(NamedTuple):
    """The tensor that a weight has to be, and where it lies packed.

    ``packing`` tells whether that is still what was packed last. It does not keep it.
    """

    name: str
    layout: tuple[object, ...]
    content: int
    weight: PackedWeight
    packing: object
    packed_address: int

    @staticmethod
    def of(
        name: str, tensor: torch.Tensor, weight: PackedWeight, current: Current
    ) -> PreparedWeight:
        return PreparedWeight(
            name,
            layout_of(tensor),
            current.content,
            weight,
            current.layout,
            current.packed.tiles.data_ptr(),
        )


class Prepared(NamedTuple):
    """What such a call takes beside its tensors.

    ``threads`` is torch's number of them, which has to be the same; ``team`` is how many are used.
    ``outputs`` are tensors like which new ones are made. ``numbers`` are steps and batch.
    """

    threads: int
    team: int
    numbers: tuple[int, int]
    operands: Sequence[Given]
    weights: Sequence[PreparedWeight]
    outputs: Sequence[tuple[str, torch.Tensor]]
    pointers: Any
    strides: Any
    function: Any

    def add_operands(self, tensors: Mapping[str, torch.Tensor], pointers: list[int]) -> bool:
        """False where an operand is not as it was.

        Raises KeyError, AttributeError or RuntimeError for some that are not.
        """
        for name, dtype, shape, strides in self.operands:
            tensor = tensors[name]
            # What has no strides says so: sparse tensors raise an error, now or at data_ptr.
            if (
                tensor.dtype is not dtype
                or tensor.shape != shape
                or tensor.stride() != strides
                or not tensor.is_cpu
                or tensor.is_neg()
            ):
                return False
            pointers.append(tensor.data_ptr())
        return True

    def add_weights(
        self,
        tensors: Mapping[str, torch.Tensor],
        pointers: list[int],
        looked: dict[str, int] | None,
    ) -> Sequence[Current] | None:
        """What is read of the weights, to be kept until the call ends; None where one changed.

        ``looked`` gets their contents; None promises that they are those of the last call.
        """
        kept = []
        for name, layout, content, weight, packing, packed in self.weights:
            tensor = tensors[name]
            if layout_of(tensor) != layout or not tensor.is_cpu or tensor.is_neg():
                return None
            if looked is not None:
                if name not in looked:
                    holds = weight.contents.still_hold(content, layout)
                    looked[name] = content if holds else weight.contents.look(tensor)
                if looked[name] != content:
                    return None
            current = weight.current
            if current is None or current.layout is not packing:
                return None
            kept.append(current)
            pointers.append(packed)
        return kept


def like(output: torch.Tensor) -> torch.Tensor:
    """A tensor of one element that has the output's shape: ``empty_like`` makes it contiguous."""
    with torch.inference_mode(False):
        return torch.empty(1, dtype=output.dtype, device=output.device).expand(output.shape)
