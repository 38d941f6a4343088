"""What is known of values that are made of others, by what is known of those.

Numbers count as facts: 0 is ``zero``, others are dense constants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from sparsify.graph_meta import Fact, Payload

DENSE = Fact(False, "real")
ZERO = Fact(True, "zero", 0.0)
Operand = Callable[[Any], Fact]
Rule = Callable[[fx.Node, Operand], Fact]  # takes the facts of the operands, gives the result's


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


def join_all(facts: list[Fact]) -> Fact:
    joined = facts[0] if facts else DENSE
    for fact in facts[1:]:
        joined = join(joined, fact)
    return joined


def is_integer(fact: Fact) -> bool:
    known = fact.value is not None and fact.value.is_integer()
    return known or fact.payload == "integer"


def without_value(fact: Fact) -> Fact:
    return Fact(fact.event, "real", None, fact.origin) if fact.payload != "zero" else fact


def as_integers(fact: Fact) -> Fact:
    kept = fact.payload in ("zero", "binary", "integer")
    return fact if kept else Fact(fact.event, "integer", None, fact.origin)


def product(first: Fact, second: Fact) -> Fact:
    """What is known of one times the other."""
    if "zero" in (first.payload, second.payload):
        return ZERO
    event = first.event or second.event
    origin = first.origin or second.origin
    if first.value is not None and second.value is not None:
        return replace(constant(first.value * second.value, event), origin=origin)
    both = is_integer(first) and is_integer(second)
    return Fact(event, "integer" if both else "real", None, origin)


def total(first: Fact, second: Fact) -> Fact:
    """What is known of their sum."""
    if first.payload == "zero":
        return second
    if second.payload == "zero":
        return first
    both = is_integer(first) and is_integer(second)
    event = first.event and second.event
    return Fact(event, "integer" if both else "real", None, first.origin if event else None)
