"""How operations start events: thresholds, and choices that they decide; see ``event_table.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from sparsify.graph_meta import Fact, Payload
from sparsify.passes.events.combine_facts import (
    DENSE,
    ZERO,
    Operand,
    is_integer,
    join,
    without_value,
)


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
    known = (
        fact
        if all(b is None or float(b).is_integer() for b in (low, high))
        else without_value(fact)
    )
    if low == 0 or high == 0:
        return _cut(node, known if (high or 1) >= 1 else without_value(fact))
    keeps = (low is None or low <= 0) and (high is None or high >= 1)
    if keeps and fact.payload in ("zero", "binary"):
        return fact
    if (low or -1) > 0 or (high or 1) < 0:
        return DENSE
    return without_value(known) if known.payload == "constant" else known


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


def combine(node: fx.Node, operand: Operand) -> Fact:
    """The larger or smaller of two: zero where both are, or a threshold at zero."""
    first, second = operand(node.args[0]), operand(node.args[1])
    if "zero" in (first.payload, second.payload):
        return _cut(node, join(first, second))
    return join(first, second)
