"""How operations start, keep and end events; ``event_table.py`` says which operation does what.

A rule takes the facts of the operands (numbers count as facts: 0 is ``zero``, others are dense
constants) and gives the result's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from sparsify.graph_meta import Fact, Payload

aten = torch.ops.aten

DENSE = Fact(False, "real")
ZERO = Fact(True, "zero", 0.0)
Operand = Callable[[Any], Fact]
Rule = Callable[[fx.Node, Operand], Fact]


def constant(value: Any, event: bool) -> Fact:
    """Elements that are 0 or ``value``."""
    number = float(value)
    if number == 0:
        return ZERO
    payload: Payload = "binary" if number == 1 else "constant"
    return Fact(event, payload, number)


def join(first: Fact, second: Fact) -> Fact:
    """What is known of a value that is one or the other."""
    if first.payload == "zero":
        return second
    if second.payload == "zero":
        return first
    event = first.event and second.event
    origin = first.origin or second.origin
    if first.value is not None and first.value == second.value:
        return Fact(event, first.payload, first.value, origin)
    both = is_integer(first) and is_integer(second)
    return Fact(event, "integer" if both else "real", None, origin)


def is_integer(fact: Fact) -> bool:
    known = fact.value is not None and fact.value.is_integer()
    return known or fact.payload == "integer"


# ---- where events start


def compare(node: fx.Node, operand: Operand) -> Fact:
    return Fact(True, "binary", 1.0, node.meta.get("location"))


def differ(node: fx.Node, operand: Operand) -> Fact:
    """``z != 0`` of an event is one; other equalities are decided by no threshold."""
    facts = [operand(argument) for argument in node.args[:2]]
    is_event = all(fact.event for fact in facts) and ZERO in facts
    return Fact(is_event, "binary", 1.0, facts[0].origin if is_event else None)


def equal(node: fx.Node, operand: Operand) -> Fact:
    return Fact(False, "binary", 1.0)


def draw(node: fx.Node, operand: Operand) -> Fact:
    return compare(node, operand)


def rectify(node: fx.Node, operand: Operand) -> Fact:
    return _cut(node, operand(node.args[0]))


def shrink(node: fx.Node, operand: Operand) -> Fact:
    return _cut(node, Fact(False, "real"))


def keep_above(node: fx.Node, operand: Operand) -> Fact:
    if node.args[2] == 0:
        return _cut(node, operand(node.args[0]))
    return Fact(False, "real")


def step(node: fx.Node, operand: Operand) -> Fact:
    at_zero = operand(node.args[1])
    payload: Payload = "binary" if at_zero.payload in ("zero", "binary") else "real"
    return Fact(True, payload, 1.0 if payload == "binary" else None, node.meta.get("location"))


def clamp(node: fx.Node, operand: Operand) -> Fact:
    return _clamped(node, operand, _bound(node, 1, "min"), _bound(node, 2, "max"))


def clamp_max(node: fx.Node, operand: Operand) -> Fact:
    return _clamped(node, operand, None, _bound(node, 1, "max"))


def clamp_six(node: fx.Node, operand: Operand) -> Fact:
    return _clamped(node, operand, 0, 6)


def _bound(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _clamped(node: fx.Node, operand: Operand, low: Any, high: Any) -> Fact:
    fact = operand(node.args[0])
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return DENSE
    known = fact if all(b is None or float(b).is_integer() for b in (low, high)) else _unknown(fact)
    if low == 0 or high == 0:
        return _cut(node, known if (high or 1) >= 1 else _unknown(fact))
    keeps = (low is None or low <= 0) and (high is None or high >= 1)
    if keeps and fact.payload in ("zero", "binary"):
        return fact
    if (low or -1) > 0 or (high or 1) < 0:
        return DENSE
    return _unknown(known) if known.payload == "constant" else known


def _unknown(fact: Fact) -> Fact:
    return Fact(fact.event, "real", None, fact.origin) if fact.payload != "zero" else fact


def _cut(node: fx.Node, fact: Fact) -> Fact:
    """Elements below a threshold become zero."""
    origin = fact.origin if fact.event and fact.origin else node.meta.get("location")
    if fact.payload == "constant":
        return Fact(True, "integer" if is_integer(fact) else "real", None, origin)
    return Fact(True, fact.payload, fact.value, origin)


def choose(node: fx.Node, operand: Operand) -> Fact:
    """``where(condition, a, b)``."""
    condition, first, second = (operand(argument) for argument in node.args[:3])
    return _chosen(condition, first, second)


def fill_masked(node: fx.Node, operand: Operand) -> Fact:
    value, condition, filling = (operand(argument) for argument in node.args[:3])
    return _chosen(condition, filling, value)


def _chosen(condition: Fact, first: Fact, second: Fact) -> Fact:
    joined = join(first, second)
    one_is_zero = "zero" in (first.payload, second.payload)
    if one_is_zero and condition.event and not joined.event:
        return replace(joined, event=True, origin=condition.origin)
    return joined


# ---- what becomes of them


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


def product(first: Fact, second: Fact) -> Fact:
    if "zero" in (first.payload, second.payload):
        return ZERO
    event = first.event or second.event
    origin = first.origin or second.origin
    if first.value is not None and second.value is not None:
        return replace(constant(first.value * second.value, event), origin=origin)
    both = is_integer(first) and is_integer(second)
    return Fact(event, "integer" if both else "real", None, origin)


def divide(node: fx.Node, operand: Operand) -> Fact:
    fact, divisor = operand(node.args[0]), node.args[1]
    if isinstance(divisor, (int, float)) and divisor != 0 and fact.value is not None:
        return replace(constant(fact.value / divisor, fact.event), origin=fact.origin)
    rounded = node.kwargs.get("rounding_mode") is not None
    return _unknown(fact) if not rounded else _integers(fact)


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
    return fact if fact.payload == "binary" else _unknown(fact)


def keep_zero(node: fx.Node, operand: Operand) -> Fact:
    """Functions with f(0) = 0."""
    return _unknown(operand(node.args[0]))


def absolute(node: fx.Node, operand: Operand) -> Fact:
    fact = operand(node.args[0])
    return fact if fact.value is None else replace(constant(abs(fact.value), fact.event))


def to_integers(node: fx.Node, operand: Operand) -> Fact:
    return _integers(operand(node.args[0]))


def _integers(fact: Fact) -> Fact:
    kept = fact.payload in ("zero", "binary", "integer")
    return fact if kept else Fact(fact.event, "integer", None, fact.origin)


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


def total(first: Fact, second: Fact) -> Fact:
    if first.payload == "zero":
        return second
    if second.payload == "zero":
        return first
    both = is_integer(first) and is_integer(second)
    event = first.event and second.event
    return Fact(event, "integer" if both else "real", None, first.origin if event else None)


def add_product(node: fx.Node, operand: Operand) -> Fact:
    """``a + value * b * c``."""
    scale = constant(node.kwargs.get("value", 1), False)
    inner = product(product(operand(node.args[1]), operand(node.args[2])), scale)
    return total(operand(node.args[0]), inner)


def blend(node: fx.Node, operand: Operand) -> Fact:
    """``a + w * (b - a)``."""
    return _unknown(total(operand(node.args[0]), operand(node.args[1])))


def combine(node: fx.Node, operand: Operand) -> Fact:
    """The larger or smaller of two: zero where both are, or a threshold at zero."""
    first, second = operand(node.args[0]), operand(node.args[1])
    if "zero" in (first.payload, second.payload):
        return _cut(node, join(first, second))
    return join(first, second)


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
    return _join_all([operand(part) for part in parts])


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


def _join_all(facts: list[Fact]) -> Fact:
    joined = facts[0] if facts else DENSE
    for fact in facts[1:]:
        joined = join(joined, fact)
    return joined
