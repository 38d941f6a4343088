"""Events of ``sys.monitoring``, which Python has from 3.12 on, told of one thread.

There, ``sys.settrace`` and ``sys.setprofile`` tell of every call, also of those that the recorder
makes, because to switch them off and on instruments all code anew. Monitoring costs nothing at
codes of which nothing is to be told any more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

_MONITORING: Any = getattr(sys, "monitoring", None)
NOT_AGAIN: Any = getattr(_MONITORING, "DISABLE", None)
_TOOLS = (4, 3, 5)  # those that Python keeps for no debugger, coverage or profiler
# Python tells of the end by an exception for all codes, or for none.
_EVERYWHERE = ("PY_START", "PY_UNWIND")

Step = Callable[..., Any]
"""Is given the frame, and what the event tells beside its code."""


class Monitor:
    """Calls ``steps``, which are named as events are. That of PY_START may return NOT_AGAIN."""

    def __init__(self, steps: dict[str, Step]) -> None:
        self._steps = steps
        self._tool: int | None = None
        self._watched: dict[int, CodeType] = {}

    def start(self) -> bool:
        """False, and without an effect, where Python has no monitoring or others use all of it."""
        self._tool = _take_tool()
        if self._tool is None:
            return False
        for name, step in self._steps.items():
            _MONITORING.register_callback(self._tool, _event(name), _in_this_thread(step))
        _MONITORING.restart_events()  # what was not to be told again, is
        _MONITORING.set_events(self._tool, self._bits(is_everywhere=True))
        return True

    def watch(self, code: CodeType) -> None:
        """Tell of ``code`` the events that are not told of all codes."""
        if id(code) not in self._watched:
            self._watched[id(code)] = code
            _MONITORING.set_local_events(self._tool, code, self._bits(is_everywhere=False))

    def stop(self) -> None:
        if self._tool is None:
            return
        _MONITORING.set_events(self._tool, 0)
        for code in self._watched.values():
            _MONITORING.set_local_events(self._tool, code, 0)
        self._watched.clear()
        for name in self._steps:
            _MONITORING.register_callback(self._tool, _event(name), None)
        _MONITORING.free_tool_id(self._tool)
        self._tool = None

    def _bits(self, is_everywhere: bool) -> int:
        names = [name for name in self._steps if (name in _EVERYWHERE) == is_everywhere]
        return sum(_event(name) for name in names)


def _take_tool() -> int | None:
    for tool in _TOOLS if _MONITORING is not None else ():
        try:
            _MONITORING.use_tool_id(tool, "sparsify")
        except ValueError:  # it is in use
            continue
        return tool
    return None


def _event(name: str) -> int:
    return int(getattr(_MONITORING.events, name))


def _in_this_thread(step: Step) -> Callable[..., Any]:
    thread = get_ident()

    def told(code: CodeType, *details: Any) -> Any:
        if get_ident() != thread:
            return None
        frame: FrameType = sys._getframe(1)
        return step(frame, *details)

    return told
