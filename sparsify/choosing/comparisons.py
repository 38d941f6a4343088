"""What a kernel was compared with, sizes apart: the same is not compared for every recording."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, fx

from sparsify.passes.nodes.encode_nodes import encode
from sparsify.regions.region import Region


class Comparisons:
    """Of one model: its recordings differ in sizes, and mostly run the same kernels."""

    def __init__(self) -> None:
        self._right: set[Hashable] = set()

    def is_known(self, region: Region, operands: tuple[Any, ...], steps: int) -> bool:
        """Whether ``region`` was right where it stood for the same operations.

        Neither a kernel nor how it is called depends on sizes, but for those that are 1, and for
        how many of ``steps`` were looked at.
        """
        key = _key(region, operands, steps)
        return key is not None and key in self._right

    def note_right(self, region: Region, operands: tuple[Any, ...], steps: int) -> None:
        key = _key(region, operands, steps)
        if key is not None:
            self._right.add(key)


def _key(region: Region, operands: tuple[Any, ...], steps: int) -> Hashable | None:
    """None where the operations have something of their own."""
    scan = region.scan
    nodes = list(scan.body.graph.nodes)
    if any(node.op in ("call_module", "get_attr") for node in nodes):
        return None
    where = {node: (0, place) for place, node in enumerate(nodes)}
    _, *tensors = operands
    return (
        region.lowered,
        region.launchable.schedule,
        (scan.carries, scan.xs, scan.consts, scan.reverse),
        min(steps, int(operands[0])),
        tuple((_target(node), *encode(node, 0, where)) for node in nodes),
        tuple(_layout(tensor) for group in tensors for tensor in group),
    )


def _target(node: fx.Node) -> Hashable:
    return node.target if node.op == "call_function" else node.op


def _layout(tensor: Tensor) -> Hashable:
    """All but the sizes."""
    ones = tuple(size == 1 for size in tensor.shape)
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    spread = tuple(stride == 0 for stride in tensor.stride())
    return tensor.dtype, ones, order, spread, tensor.is_contiguous()
