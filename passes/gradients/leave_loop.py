"""Find what of a constant's gradient can wait until the loop has ended.

The gradient of a constant is a sum over steps. Before, in every step::

    d_w = mm(t(d), z); d_b = view(sum(d, [0], True), [30]); d_beta = sum(d * v, [0, 1])

After, with ``d`` and ``z`` of all steps, and sums over steps kept by the loop::

    d_w = OuterProduct(d, z); d_b = view(sum(d_sum, [0], True), [30]); ...

What follows a sum over rows, or a product of two values of a step, may follow it after the loop if
it is linear: a sum of such operations is the operation of the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sparsify.passes.lowering.lower_ops import fill_of
from sparsify.passes.nodes.classify_ops import RESHAPES, SLICES, TRANSPOSES, order_of
from sparsify.regions.convolution_backward import Sizes, weight_gradient

aten = torch.ops.aten
SUMS = (aten.sum.dim_IntList, aten.sum.default)
_LINEAR = (
    *SUMS,
    *RESHAPES,
    *TRANSPOSES,
    *SLICES,
    aten.neg.default,
    aten.expand.default,
    aten.squeeze.default,
    aten.squeeze.dims,
    aten._to_copy.default,
)
_ADDITIONS = (aten.add.Tensor, aten.sub.Tensor)
_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)
_FACTORS = (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)


@dataclass(frozen=True)
class Factors:
    """``mm(t(d), activation)``, or with ``swapped`` ``mm(t(activation), d)``, its transpose.

    That of a convolution is ``weight_gradient(d, activation, *sizes)``.
    """

    d: fx.Node
    activation: fx.Node
    swapped: bool
    waits: bool  # the activation is the same in every step, so that ``d`` is added up first
    sizes: Sizes = ()


@dataclass
class Leaving:
    """``products`` are outer products of two values of a step, ``summed`` what the loop adds up.

    All else between them and the constants' gradients, ``after``, is computed after the loop.
    """

    products: dict[fx.Node, Factors] = field(default_factory=dict)
    summed: dict[fx.Node, None] = field(default_factory=dict)
    after: set[fx.Node] = field(default_factory=set)


def find_leaving(
    gradients: Iterable[fx.Node], depends: set[fx.Node], invariant: set[fx.Node]
) -> Leaving:
    """Take the ``gradients`` of constants apart.

    ``depends`` holds what depends on gradients of results, ``invariant`` what no step changes.
    """
    finder = _Finder(depends, invariant)
    for gradient in gradients:
        finder.visit(gradient)
    return finder.found


class _Finder:
    def __init__(self, depends: set[fx.Node], invariant: set[fx.Node]) -> None:
        self.depends, self.invariant = depends, invariant
        self.found = Leaving()

    def visit(self, node: fx.Node) -> None:
        product = self._outer_product(node)
        if node in self.invariant or node in self.found.after:
            return
        if product is not None:
            self.found.products[node] = product
            if product.waits:
                self.found.summed[product.d] = None
        elif not self._reduces(node):
            self.found.summed[node] = None
        else:
            self.found.after.add(node)
            for operand in self._linear(node) or ():
                self.visit(operand)

    def _reduces(self, node: fx.Node) -> bool:
        """True if sums over rows or outer products are among what ``node`` is linear in."""
        if node in self.invariant:
            return False
        if self._outer_product(node) is not None:
            return True
        operands = self._linear(node)
        if operands is None:
            return False
        return node.target in SUMS or any(self._reduces(operand) for operand in operands)

    def _outer_product(self, node: fx.Node) -> Factors | None:
        if node.target is weight_gradient:
            d, activation, *sizes = node.args
            assert isinstance(d, fx.Node) and isinstance(activation, fx.Node)
            return Factors(d, activation, False, False, tuple(sizes))
        if node.target is not aten.mm.default:
            return None
        first, second = node.args
        assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
        if first.target not in TRANSPOSES or order_of(first) != [1, 0]:
            return None
        first = first.all_input_nodes[0]
        swapped = second in self.depends
        if swapped == (first in self.depends):
            return None
        d, activation = (second, first) if swapped else (first, second)
        return Factors(d, activation, swapped, activation in self.invariant)

    def _linear(self, node: fx.Node) -> list[fx.Node] | None:
        """The operands in which ``node`` is linear, all others being the same in every step."""
        changing = [i for i in node.all_input_nodes if i not in self.invariant]
        if not changing or not all(i in self.depends for i in changing):
            return None
        args: Any = node.args
        if node.target in _LINEAR:
            return changing
        if node.target in _ADDITIONS:
            tensors = [arg for arg in args[:2] if isinstance(arg, fx.Node)]
            return changing if len(tensors) == 2 and set(tensors) == set(changing) else None
        if node.target in _FACTORS:
            return changing if args[0] is not args[1] and self._is_factor(args) else None
        if node.target is aten.where.self:
            branches = [arg for arg in args[1:] if arg not in changing]
            others_zero = all(fill_of(arg) == 0 for arg in branches)
            return changing if args[0] in self.invariant and others_zero else None
        if node.target in _SCATTERS:
            return changing if fill_of(args[0]) == 0 else None
        return None

    def _is_factor(self, args: Any) -> bool:
        first, second = args[:2]
        known = not isinstance(second, fx.Node) or second in self.invariant
        return known or first in self.invariant
