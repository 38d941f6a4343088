"""Calls like earlier ones, made in C++ or in Python: tests run in both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify.codegen.native_call import NativeCall, Repeater, load_native_call
from sparsify.serving.engine import Engine

WAYS = ("native", "python")
ASKED = 10  # which argument of ``NativeCall.repeater`` has the questions


class Counted:
    """The extension; ``asked`` gets how many bytes of questions went along with each call."""

    def __init__(self, native: NativeCall) -> None:
        self._native = native
        self.asked: list[int] = []
        self.original_call, self.call_sooner = native.original_call, native.call_sooner

    def layouts_of(self, tensors: list[torch.Tensor]) -> bytes | None:
        return self._native.layouts_of(tensors)

    def repeater(self, *what: Any) -> Repeater | None:
        repeater = self._native.repeater(*what)
        if repeater is None:
            return None

        def counted(frozen: bool, *sequences: Any) -> Any:
            results = repeater(frozen, *sequences)
            if results is not None:
                self.asked.append(0 if frozen else len(what[ASKED][1]))
            return results

        return counted


def call_in(way: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has calls made that way; the list gets an item for each native one: see ``Counted``."""
    # Another test may have asked where no compiler was to be found.
    native = load_native_call() or load_native_call.__wrapped__()
    assert native is not None, "the tests need Python's headers"
    counted = Counted(native)
    given = counted if way == "native" else None
    for module in (
        "codegen.cpp.prepared_call",
        "regions.region_call",
        "serving.last_call",
        "serving.install",
    ):
        monkeypatch.setattr(f"sparsify.{module}.native_call", lambda: given)
    return counted.asked


def called_in_python(fast: Any) -> Any:
    """``fast``, calls of which are made in Python for now: another test may have hastened them."""
    kind: Any = type(fast)
    kind.__call__ = kind.__call__
    return fast


def count_long_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an item for each call that the last one did not serve."""
    found: list[Any] = []
    call = Engine._call

    def counted(self: Engine, *given: Any) -> Any:
        found.append(given)
        return call(self, *given)

    monkeypatch.setattr(Engine, "_call", counted)
    return found
