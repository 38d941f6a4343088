"""When two Python values are the same to a guard: type and content, NaN included."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from operator import is_
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any

import torch

ATOMS: tuple[type, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    NoneType,
    EllipsisType,
    range,
    slice,
    Enum,
    Decimal,
    Fraction,
    PurePath,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
LARGEST_ARRAY = 1 << 20  # bytes that are worth comparing at every call
SHOWN = 80  # characters of a value in a message


class Gone:
    """Stands for a value that is not there (any more)."""

    def __repr__(self) -> str:
        return "absent"


GONE = Gone()


def is_atom(value: object) -> bool:
    """True for immutable values that are compared by type and content."""
    kind = type(value)  # isinstance would ask the object for its class
    if issubclass(kind, ATOMS):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and issubclass(kind, numpy.generic)


def differs(now: object, then: object) -> bool:
    """Compare two atoms: ``nan`` equals itself, ``1``, ``1.0`` and ``True`` are three values."""
    if now is then:
        return False
    if type(now) is not type(then):
        return True
    if isinstance(now, float):
        return _floats_differ(now, then)  # type: ignore[arg-type]
    if isinstance(now, complex) and isinstance(then, complex):
        return _floats_differ(now.real, then.real) or _floats_differ(now.imag, then.imag)
    if isinstance(now, slice) and isinstance(then, slice):
        return any(
            differs(getattr(now, part), getattr(then, part)) for part in ("start", "stop", "step")
        )
    if hasattr(now, "tobytes") and hasattr(then, "tobytes"):  # numpy scalars
        return bool(now.tobytes() != then.tobytes())
    return bool(now != then)


def _floats_differ(now: float, then: float) -> bool:
    if now != then:
        return now == now or then == then
    return now == 0 and math.copysign(1, now) != math.copysign(1, then)


def atoms_differ(now: Sequence[object], then: Sequence[object]) -> bool:
    """Compare two long sequences of atoms."""
    if len(now) != len(then):
        return True
    if all(map(is_, now, then)):
        return False
    return any(map(differs, now, then))


def tables_differ(now: Any, then: dict[Any, object]) -> bool:
    """Compare a long dict of atoms with an earlier copy of it, order included."""
    return list(now) != list(then) or atoms_differ(list(now.values()), list(then.values()))


def sets_differ(now: Any, then: frozenset[object]) -> bool:
    """Compare a set with an earlier copy of it, elements by type and content."""
    if len(now) != len(then) or any(element not in then for element in now):
        return True
    return {(type(e), repr(e)) for e in now if is_atom(e)} != {
        (type(e), repr(e)) for e in then if is_atom(e)
    }


def arrays_differ(now: Any, then: Any) -> bool:
    """Compare a numpy array with an earlier copy of it, bit for bit."""
    if type(now) is not type(then) or now.dtype != then.dtype or now.shape != then.shape:
        return True
    return bool(now.tobytes() != then.tobytes())


def show(value: object) -> str:
    """A short text for a message; runs no code of the user's."""
    if value is GONE:
        return "absent"
    kind: Any = type(value)
    subject: Any = value
    if issubclass(kind, (torch.device, torch.Size)):
        text = str(subject)
    elif is_atom(value):
        text = repr(subject)
    elif issubclass(kind, torch.Tensor):
        text = "a parameter" if issubclass(kind, torch.nn.Parameter) else "a tensor"
    elif kind in (list, tuple, dict, set, frozenset):
        text = f"a {kind.__name__} of {len(subject)}"
    elif issubclass(kind, (type, FunctionType)) or kind is MethodType:
        text = subject.__qualname__
    elif issubclass(kind, (BuiltinFunctionType, ModuleType)):
        text = subject.__name__
    else:
        text = f"a {kind.__qualname__}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
