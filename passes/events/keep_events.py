"""How operations keep and end events; ``event_table.py`` says which operation does what."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from sparsify.graph_meta import Fact
from sparsify.passes.events.combine_facts import (
    DENSE,
    Operand,
    as_integers,
    constant,
    is_integer,
    join,
    join_all,
    product,
    total,
    without_value,
)


def same(node: fx.Node, operand: Operand) -> Fact:
    return operand(node.args[0])


def cast(node: fx.Node, operand: Operand) -> Fact:
    fact, dtype = operand(node.args[0]), node.meta["val"].dtype
    if dtype is torch.bool and fact.payload != "zero":
        return Fact(fact.event, "binary", 1.0, fact.origin)
    if not dtype.is_floating_point and not is_integer(fact):
        return Fact(fact.event, "integer", None, fact.origin)
    return fact


def multiply(node: fx.Node, operand: Operand) -> Fact:
    return product(operand(node.args[0]), operand(node.args[1]))


def divide(node: fx.Node, operand: Operand) -> Fact:
    fact, divisor = operand(node.args[0]), node.args[1]
    if isinstance(divisor, (int, float)) and divisor != 0 and fact.value is not None:
        return replace(constant(fact.value / divisor, fact.event), origin=fact.origin)
    rounded = node.kwargs.get("rounding_mode") is not None
    return without_value(fact) if not rounded else as_integers(fact)


def negate(node: fx.Node, operand: Operand) -> Fact:
    return product(operand(node.args[0]), constant(-1, False))


def square(node: fx.Node, operand: Operand) -> Fact:
    return product(operand(node.args[0]), operand(node.args[0]))


def power(node: fx.Node, operand: Operand) -> Fact:
    fact, exponent = operand(node.args[0]), node.args[1]
    if exponent == 2:
        return square(node, operand)
    if not isinstance(exponent, (int, float)) or exponent <= 0:
        return DENSE
    return fact if fact.payload == "binary" else without_value(fact)


def keep_zero(node: fx.Node, operand: Operand) -> Fact:
    """Functions with f(0) = 0."""
    return without_value(operand(node.args[0]))


def absolute(node: fx.Node, operand: Operand) -> Fact:
    fact = operand(node.args[0])
    return fact if fact.value is None else replace(constant(abs(fact.value), fact.event))


def to_integers(node: fx.Node, operand: Operand) -> Fact:
    return as_integers(operand(node.args[0]))


def add(node: fx.Node, operand: Operand) -> Fact:
    return total(operand(node.args[0]), _scaled(node, operand(node.args[1]), 1.0))


def subtract(node: fx.Node, operand: Operand) -> Fact:
    return total(operand(node.args[0]), _scaled(node, operand(node.args[1]), -1.0))


def subtract_from(node: fx.Node, operand: Operand) -> Fact:
    first, second = operand(node.args[1]), operand(node.args[0])
    if second.payload == "binary" and first.payload == "binary" and not first.event:
        return Fact(False, "binary", 1.0)  # 1 - z
    return total(first, _scaled(node, second, -1.0))


def _scaled(node: fx.Node, fact: Fact, sign: float) -> Fact:
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return product(fact, constant(sign * float(alpha), False))  # type: ignore[arg-type]


def add_product(node: fx.Node, operand: Operand) -> Fact:
    """``a + value * b * c``."""
    scale = constant(node.kwargs.get("value", 1), False)
    inner = product(product(operand(node.args[1]), operand(node.args[2])), scale)
    return total(operand(node.args[0]), inner)


def blend(node: fx.Node, operand: Operand) -> Fact:
    """``a + w * (b - a)``."""
    return without_value(total(operand(node.args[0]), operand(node.args[1])))


def both(node: fx.Node, operand: Operand) -> Fact:
    """Logical and."""
    return _as_binary(product(operand(node.args[0]), operand(node.args[1])))


def either(node: fx.Node, operand: Operand) -> Fact:
    """Logical or, exclusive or."""
    return _as_binary(join(operand(node.args[0]), operand(node.args[1])))


def invert(node: fx.Node, operand: Operand) -> Fact:
    """The complement of a mask is decided by the same threshold."""
    fact = operand(node.args[0])
    return Fact(fact.event and fact.payload != "zero", "binary", 1.0, fact.origin)


def _as_binary(fact: Fact) -> Fact:
    return fact if fact.payload == "zero" else Fact(fact.event, "binary", 1.0, fact.origin)


def gather_parts(node: fx.Node, operand: Operand) -> Fact:
    """``stack`` and ``cat``."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    return join_all([operand(part) for part in parts])


def overwrite(node: fx.Node, operand: Operand) -> Fact:
    """``select_scatter``, ``slice_scatter``: some elements are replaced."""
    return join(operand(node.args[0]), operand(node.args[1]))


def scatter_value(node: fx.Node, operand: Operand) -> Fact:
    """Elements at computed places, as a top-k mask has."""
    base, value = operand(node.args[0]), operand(node.args[3])
    joined = join(base, value)
    return replace(joined, event=base.event, origin=base.origin or node.meta.get("location"))


def pad(node: fx.Node, operand: Operand) -> Fact:
    value = node.args[2] if len(node.args) > 2 else 0
    return join(operand(node.args[0]), operand(value))


def fill(node: fx.Node, operand: Operand) -> Fact:
    return operand(node.args[1])
