"""Convolutions as Gathers: their sizes, and which have no kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from sparsify import ir
from sparsify.errors import Refusal
from sparsify.passes.lowering.lower_layout import Shape, shape_of
from sparsify.passes.lowering.lower_refusals import refuse
from sparsify.passes.nodes.classify_ops import CONVOLUTION, POOL, product_operand

STAYS = "It runs as before."


def convolution_of(product: fx.Node) -> ir.Convolution:
    """The sizes of ``aten.convolution`` along one or two dims."""
    _, weight, _, stride, padding, dilation, *_ = _args(product)
    source, pool = source_of(product)
    return sized(shape_of(weight), shape_of(source), (stride, padding, dilation), pool)


def sized(
    weight: Shape, maps: Shape, options: Sequence[Sequence[int]], pool: fx.Node | None
) -> ir.Convolution:
    """The convolution of what has the shape ``maps``, through ``pool`` if there is one.

    ``options`` are stride, padding and dilation.
    """
    receivers, senders, *window = weight
    stride, padding, dilation = options
    dims = len(window)
    return ir.Convolution(
        (senders, receivers),
        _pair(maps[-dims:], 1, dims),
        _pair(window, 1, dims),
        _pair(stride, 1, dims),
        _pair(padding, 0, dims),
        _pair(dilation, 1, dims),
        (1, 1) if pool is None else _pair(_args(pool)[1], 1, 2),
    )


def source_of(product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a product reads, and the pool through which it does, if its Gather is to pool events."""
    operand = product_operand(product)
    assert operand is not None
    if product.target is CONVOLUTION and operand.target is POOL and pools_events(operand):
        return operand.all_input_nodes[0], operand
    return operand, None


def pools_events(pool: fx.Node) -> bool:
    """Whether a max-pool makes of binary events those of blocks that lie side by side."""
    fact = pool.all_input_nodes[0].meta.get("fact")
    is_binary = fact is not None and fact.event and fact.payload == "binary"
    return is_binary and is_of_blocks(pool)


def is_of_blocks(pool: fx.Node) -> bool:
    """Whether a pool takes blocks that lie side by side."""
    _, size, *rest = _args(pool)
    stride, padding, dilation, ceil = (*rest, *([], 0, 1, False)[len(rest) :])[:4]
    is_side_by_side = not stride or _pair(stride, 1, 2) == _pair(size, 1, 2)
    is_plain = _pair(_listed(padding), 0, 2) == (0, 0) and _pair(_listed(dilation), 1, 2) == (1, 1)
    return is_side_by_side and is_plain and not ceil


def _listed(size: Any) -> Sequence[int]:
    return [size] if isinstance(size, int) else list(size)


def why_not_convolution(product: fx.Node) -> Refusal | None:
    """Which form of a convolution has no kernel."""
    operand, weight, _, _, _, _, transposed, _, groups = _args(product)
    dims = len(shape_of(weight)) - 2
    if transposed:
        reason = "Transposed convolutions have no event kernel."
        return refuse("unsupported-layout", reason, STAYS, product)
    if groups != 1:
        reason = f"It is a convolution in {groups} groups, in which an event reaches few neurons."
        return refuse("unsupported-layout", reason, STAYS, product)
    if dims not in (1, 2):
        reason = f"Convolutions along {dims} dims have no event kernel, those along 1 or 2 have."
        return refuse("unsupported-layout", reason, STAYS, product)
    if len(shape_of(operand)) != dims + 2:
        reason = "It is a convolution without a batch."
        return refuse("unsupported-layout", reason, "Give it a batch of one.", product)
    if 0 in (*shape_of(operand)[1:], *shape_of(weight), *shape_of(product)[1:]):
        reason = "It is a convolution of nothing."
        return refuse("unsupported-layout", reason, STAYS, product)
    return None


def _args(product: fx.Node) -> Any:
    return product.args


def _pair(sizes: Sequence[int], missing: int, dims: int) -> ir.Pair:
    """Of rows and columns; one size stands for all dims, and one dim has one row."""
    full = list(sizes) * dims if len(sizes) == 1 else list(sizes)
    first, second = ([missing] * (2 - dims) + full)[:2]
    return int(first), int(second)
