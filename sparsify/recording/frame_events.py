"""What Python tells of frames: their calls, and of those that are followed, jumps back and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Protocol

from sparsify.recording.monitor import NOT_AGAIN, Monitor

# From 3.12 on, switching tracing on and off instruments all code anew: it costs more than it saves.
_CHEAP_PAUSE = sys.version_info < (3, 12)

Tracer = Callable[[FrameType, str, Any], Any]
"""As of ``sys.settrace``: what it returns for a call is told the other events of the frame.

Jumps back are told as lines, or as "jump" with the offsets from and to which.
"""


class FrameEvents(Protocol):
    def start(self) -> bool:
        """False if there are none of this kind."""

    def stop(self) -> None: ...

    def pause(self) -> bool:
        """Tell of nothing, as far as that saves time; nor is anything told to ``sys.setprofile``.

        False if they were disturbed.
        """

    def resume(self) -> None: ...

    def are_disturbed(self) -> bool:
        """Whether somebody has set another trace function."""


def tell_events(tracer: Tracer, matters: Callable[[CodeType], bool]) -> FrameEvents:
    """Begin to tell ``tracer`` of this thread's frames, as far as their code ``matters``."""
    ways: tuple[FrameEvents, ...] = (_Monitored(tracer, matters), _Traced(tracer))
    return next(events for events in ways if events.start())


class _Traced:
    """By ``sys.settrace``."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._profiler: Any = None

    def start(self) -> bool:
        self._before = sys.gettrace()
        sys.settrace(self._tracer)
        return True

    def stop(self) -> None:
        sys.settrace(self._before)

    def pause(self) -> bool:
        if not _CHEAP_PAUSE:
            return True
        self._profiler = sys.getprofile()
        sys.setprofile(None)  # first: it would be told of the other calls
        is_fine = sys.gettrace() is self._tracer  # as below, but no call that is traced
        sys.settrace(None)
        return is_fine

    def resume(self) -> None:
        if _CHEAP_PAUSE:
            sys.settrace(self._tracer)
            sys.setprofile(self._profiler)  # last, for the same reason

    def are_disturbed(self) -> bool:
        return sys.gettrace() is not self._tracer


class _Monitored:
    """By events of ``sys.monitoring``, so that code that does not matter is told of once only."""

    def __init__(self, tracer: Tracer, matters: Callable[[CodeType], bool]) -> None:
        self._tracer, self._matters = tracer, matters
        self._followed: dict[int, Tracer] = {}
        self._monitor = Monitor(
            {
                "PY_START": self._on_start,
                "JUMP": self._on_jump,
                "PY_RETURN": self._on_end,
                "PY_UNWIND": lambda frame, offset, error: self._on_end(frame, offset, None),
            }
        )

    def start(self) -> bool:
        if not self._monitor.start():
            return False
        self._before = sys.gettrace()
        if self._before is not None:
            sys.settrace(None)
        return True

    def stop(self) -> None:
        self._monitor.stop()
        self._followed.clear()
        if sys.gettrace() is not self._before:
            sys.settrace(self._before)

    def pause(self) -> bool:
        return True  # nothing is told of what comes, as none of it matters

    def resume(self) -> None:
        pass

    def are_disturbed(self) -> bool:
        return sys.gettrace() is not None

    def _on_start(self, frame: FrameType, offset: int) -> Any:
        code = frame.f_code
        tracer = self._tracer(frame, "call", None)
        self._followed.pop(id(frame), None)  # of a generator that nobody ran to its end
        if tracer is not None:
            self._followed[id(frame)] = tracer
            self._monitor.watch(code)
        return None if self._matters(code) else NOT_AGAIN

    def _on_jump(self, frame: FrameType, offset: int, to: int) -> None:
        tracer = self._followed.get(id(frame))
        if tracer is not None:
            tracer(frame, "jump", (offset, to))

    def _on_end(self, frame: FrameType, offset: int, result: object) -> None:
        tracer = self._followed.pop(id(frame), None)
        if tracer is not None:
            tracer(frame, "return", result)
