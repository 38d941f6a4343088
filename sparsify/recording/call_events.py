"""What Python tells of calls: as to ``sys.setprofile``, where it can of most code once only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, CodeType, FrameType, MethodDescriptorType
from typing import Any

from sparsify.recording.monitor import NOT_AGAIN, Monitor, Step

Profiler = Callable[[FrameType, str, Any], bool]
"""As of ``sys.setprofile``; true for a call if later ones of the same code need not be told."""


@contextmanager
def calls_told(profiler: Profiler, matters: Callable[[CodeType], bool]) -> Iterator[None]:
    """Tell ``profiler`` of this thread's calls, and nobody else.

    ``matters``, asked when a call was told, says of which code the end and calls of C are told too.
    """
    before = _pause_profiler()
    monitor = _monitor(profiler, matters)
    is_monitored = monitor.start()
    if not is_monitored:
        sys.setprofile(profiler)
    try:
        yield
    finally:
        if is_monitored:
            monitor.stop()
        sys.setprofile(None)
        _resume_profiler(before)


def _monitor(profiler: Profiler, matters: Callable[[CodeType], bool]) -> Monitor:
    def start(frame: FrameType, offset: int) -> Any:
        is_all = profiler(frame, "call", None)
        if matters(frame.f_code):
            monitor.watch(frame.f_code)
        return NOT_AGAIN if is_all else None

    def call(frame: FrameType, offset: int, function: Any, first: Any) -> None:
        # Methods are told apart from their object.
        if isinstance(function, MethodDescriptorType) and isinstance(first, function.__objclass__):
            function = function.__get__(first)
        if isinstance(function, BuiltinFunctionType):
            profiler(frame, "c_call", function)

    def end(frame: FrameType, offset: int, result: object) -> None:
        profiler(frame, "return", None)

    steps: dict[str, Step] = {"PY_START": start, "CALL": call, "PY_RETURN": end, "PY_UNWIND": end}
    monitor = Monitor(steps)
    return monitor


def _pause_profiler() -> Any:
    before = sys.getprofile()
    if before is not None and not callable(before):  # cProfile: cannot be set again by hand
        before.disable()
    else:
        sys.setprofile(None)
    return before


def _resume_profiler(before: Any) -> None:
    if before is None or callable(before):
        sys.setprofile(before)
    else:
        before.enable()
