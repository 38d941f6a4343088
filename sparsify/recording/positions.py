"""Where in the user's code an operation runs: line, submodule, autograd Function, loop iterations.

Frames that matter are followed: those whose code has loops, and those of ``forward`` methods.
Python reports every jump back, so iterations are counted exactly, also of loops that recorded
nothing, and of loops on one line.
"""

from __future__ import annotations

import dis
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple, Protocol, Self

from torch import nn

from sparsify.errors import Location
from sparsify.graph_meta import LoopStep
from sparsify.recording.code_loops import CodeLoop, find_code_loops
from sparsify.recording.frame_events import FrameEvents, tell_events
from sparsify.recording.function_codes import FunctionCodes
from sparsify.recording.guard_code import origin

_SUSPENDS = 0x20 | 0x80 | 0x200  # flags of generators, coroutines, asynchronous generators
_RETURNS = {dis.opmap[name] for name in ("RETURN_VALUE", "RETURN_CONST") if name in dis.opmap}


class Here(NamedTuple):
    location: Location | None
    module: str
    loops: tuple[LoopStep, ...]
    function: str


@dataclass(frozen=True, slots=True)
class _CodeFacts:
    """What matters of a code object; ``enclosing`` has the loops around an offset, by index."""

    code: CodeType
    is_users: bool
    is_forward: bool
    is_watched: bool
    loops: tuple[CodeLoop, ...]
    enclosing: dict[int, tuple[int, ...]]
    locations: tuple[Location, ...]


End = Callable[[Any], None]


class Watcher(Protocol):
    """Is told of the frames of some codes. ``watches`` is asked once for each code."""

    def watches(self, code: CodeType) -> bool: ...

    def on_call(self, frame: FrameType) -> End | None:
        """A frame begins. What is returned is told its result at its end, None if it raises.

        Both run as if they were called from where the frame was.
        """


class Positions:
    """Context manager: knows where it is while it is entered; ``here`` answers."""

    def __init__(self, model: object) -> None:
        self._stop: FrameType | None = None
        self._caller: FrameType | None = None  # of what is paused: the user's code is below it
        self._events: FrameEvents | None = None  # while it is entered
        # By identity, which the facts keep unique: hashing code takes longer than all the rest.
        self._facts: dict[int, _CodeFacts] = {}
        self._without_place: set[int] = set()  # codes that are neither the user's nor forward's
        self._frames: dict[int, _FrameLoops] = {}
        self._owners: list[tuple[str, str]] = [("", "")]
        self._started = 0
        self._located: dict[tuple[int, int], Location] = {}
        self._names: dict[int, str] = {}
        if isinstance(model, nn.Module):
            for name, module in model.named_modules():
                self._names.setdefault(id(module), name)
        self.function_codes = FunctionCodes()
        self.was_disturbed = False
        self.watcher: Watcher | None = None

    def __enter__(self) -> Self:
        self._stop = sys._getframe(1)
        self._events = tell_events(self._on_call, self._matters)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        assert self._events is not None
        self.was_disturbed = self.was_disturbed or self._events.are_disturbed()
        self._events.stop()
        self._events = self._stop = None
        self._frames.clear()

    def pause(self) -> bool:
        """The recorder's own code need not be traced or profiled: that is what calls this.

        False if it is paused already; who was told True resumes.
        """
        if self._caller is not None:
            return False
        if self._events is not None and not self._events.pause():
            self.was_disturbed = True
        self._caller = sys._getframe(2)
        return True

    def resume(self) -> None:
        self._caller = None
        if self._events is not None:
            self._events.resume()

    def here(self) -> Here:
        """Where the innermost frame of the user is; to be called for every operation."""
        frame: FrameType | None = self._caller or sys._getframe(1)
        location: Location | None = None
        fallback: FrameType | None = None
        loops: tuple[LoopStep, ...] = ()
        facts_of, without_place = self._facts, self._without_place
        while frame is not self._stop and frame is not None:
            code = frame.f_code
            if id(code) in without_place:
                frame = frame.f_back
                continue
            facts = facts_of.get(id(code)) or self._inspect(code)
            if facts.is_users:
                if location is None:
                    location = self._locate(frame)
                state = self._frames.get(id(frame)) if facts.loops else None
                if state is not None:
                    loops = self._loops_at(frame, state)
                    break
            elif facts.is_forward and fallback is None:
                fallback = frame
            frame = frame.f_back
        if location is None and fallback is not None:
            location = self._locate(fallback)
        module, function = self._owners[-1]
        return Here(location, module, loops, function)

    def _loops_at(self, frame: FrameType, state: _FrameLoops) -> tuple[LoopStep, ...]:
        """The iterations that ``frame`` and its callers are in."""
        steps = state.steps_at(frame.f_lasti)
        around = state.around
        if around is None:
            around = self._loops_around(frame.f_back)
            if state.frame is None:  # its callers stand still for as long as it runs
                state.around = around
        return around + steps if around else steps

    def _loops_around(self, frame: FrameType | None) -> tuple[LoopStep, ...]:
        while frame is not self._stop and frame is not None:
            state = self._frames.get(id(frame))
            if state is not None and state.facts.loops:
                return self._loops_at(frame, state)
            frame = frame.f_back
        return ()

    def _on_call(self, frame: FrameType, event: str, arg: object) -> Any:
        if self._caller is not None:  # it is paused
            return None
        code = frame.f_code
        facts = self._facts.get(id(code)) or self._inspect(code)
        if facts.is_watched and self.watcher is not None:
            return self._follow_watched(frame, facts, self.watcher)
        return self._follow(frame, facts)

    def _matters(self, code: CodeType) -> bool:
        """Whether some frame of ``code`` may be followed."""
        facts = self._facts.get(id(code)) or self._inspect(code)
        return bool(facts.loops) or facts.is_forward or facts.is_watched

    def _follow_watched(self, frame: FrameType, facts: _CodeFacts, watcher: Watcher) -> Any:
        end = self._outside(frame, watcher.on_call, frame)
        tracer = self._follow(frame, facts)
        if end is None:
            return tracer
        if tracer is None:
            frame.f_trace_lines = False

        def on_event(frame: FrameType, event: str, arg: object) -> Any:
            if tracer is not None:
                tracer(frame, event, arg)
            if event == "return":
                self._outside(frame, end, arg)
            return on_event

        return on_event

    def _outside(self, frame: FrameType, step: Callable[[Any], Any], given: object) -> Any:
        """``step(given)``, for which the user's code is below ``frame``."""
        before, self._caller = self._caller, frame.f_back
        try:
            return step(given)
        finally:
            self._caller = before

    def _follow(self, frame: FrameType, facts: _CodeFacts) -> Any:
        if not facts.loops:
            return self._follow_forward(frame) if facts.is_forward else None
        state = self._frames.get(id(frame))
        if state is not None and state.frame is frame:
            return state.on_event  # a generator goes on
        state = _FrameLoops(self, facts, frame, self._started)
        self._started += 1
        self._frames[id(frame)] = state
        state.is_owner = facts.is_forward and self._enter_forward(frame)
        return state.on_event

    def _follow_forward(self, frame: FrameType) -> Any:
        """What traces a ``forward`` without loops."""
        frame.f_trace_lines = False
        return self._on_forward if self._enter_forward(frame) else None

    def _on_forward(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "return":
            self._owners.pop()
        return self._on_forward

    def _enter_forward(self, frame: FrameType) -> bool:
        """Whether what ``frame`` runs belongs to it from now on."""
        code = frame.f_code
        if code.co_flags & _SUSPENDS:
            return False
        module, function = self._owners[-1]
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            self._owners.append((self._names.get(id(first), module), function))
        else:
            self._owners.append((module, self._function_name(code, first) or function))
        return True

    def _function_name(self, code: CodeType, first: object) -> str:
        cls = getattr(type(first), "_forward_cls", None)
        return str(cls.__name__) if cls is not None else self.function_codes.name_of(code)

    def leave(self, state: _FrameLoops, frame: FrameType) -> None:
        if state.is_owner:
            self._owners.pop()
        del self._frames[id(frame)]

    def _inspect(self, code: CodeType) -> _CodeFacts:
        is_users = origin(code.co_filename) == "user"
        loops = find_code_loops(code) if is_users else ()
        enclosing: dict[int, tuple[int, ...]] = {}
        for index, loop in enumerate(loops):
            for offset in loop.offsets:
                enclosing[offset] = (*enclosing.get(offset, ()), index)
        places = tuple(_location(code.co_filename, loop.line) for loop in loops)
        is_watched = self.watcher is not None and self.watcher.watches(code)
        is_forward = code.co_name == "forward"
        facts = _CodeFacts(code, is_users, is_forward, is_watched, loops, enclosing, places)
        self._facts[id(code)] = facts
        if not is_users and not is_forward:
            self._without_place.add(id(code))
        return facts

    def _locate(self, frame: FrameType) -> Location:
        key = (id(frame.f_code), frame.f_lasti)
        known = self._located.get(key)
        if known is None:
            known = _location(frame.f_code.co_filename, frame.f_lineno)
            self._located[key] = known
        return known


class _FrameLoops:
    """The loops that one run of a code object is in, by index and outermost first."""

    __slots__ = (
        *("positions", "facts", "frame", "number", "is_owner"),
        *("offset", "inside", "iterations", "steps", "jumped", "around"),
    )

    def __init__(
        self, positions: Positions, facts: _CodeFacts, frame: FrameType, number: int
    ) -> None:
        self.positions = positions
        self.facts = facts
        # Only generators outlive their return to the caller; others would keep their locals alive.
        self.frame = frame if frame.f_code.co_flags & _SUSPENDS else None
        self.number = number
        self.is_owner = False
        self.offset = -1
        self.inside: tuple[int, ...] = ()
        self.iterations = [0] * len(facts.loops)
        self.steps: tuple[LoopStep, ...] | None = ()
        self.jumped = -1
        self.around: tuple[LoopStep, ...] | None = None  # of the callers, once it was asked for

    def on_event(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._on_line(frame.f_lasti)
        elif event == "jump":
            self._on_jump(*arg)
        elif event == "return" and self._is_over(frame):
            self.positions.leave(self, frame)
        return self.on_event

    def steps_at(self, offset: int) -> tuple[LoopStep, ...]:
        """The iterations that the instruction at ``offset`` runs in."""
        if offset != self.offset:
            self._move(offset)
        if self.steps is None:
            self.steps = tuple(self._step(index) for index in self.inside)
        return self.steps

    def _on_line(self, offset: int) -> None:
        """Count a jump back: seen at its target, or, on one line from 3.12 on, at the jump."""
        before, came_from, jumped = self.inside, self.offset, self.jumped
        self._move(offset)
        self.jumped = -1
        for index in self.inside:
            loop = self.facts.loops[index]
            if offset in loop.jumps:
                self._count(index)
                self.jumped = index
            elif index == jumped:
                pass  # counted where it jumped
            elif offset == loop.start:
                if index in before or not loop.is_told:
                    self._count(index)
            elif offset == loop.first and index in before and came_from not in loop.ahead:
                self._count(index)

    def _on_jump(self, offset: int, to: int) -> None:
        self._move(to)
        for index in self.inside:
            if offset in self.facts.loops[index].jumps:
                self._count(index)

    def _move(self, offset: int) -> None:
        self.offset = offset
        inside = self.facts.enclosing.get(offset, ())
        if inside != self.inside:
            for index in inside:
                if index not in self.inside:
                    self.iterations[index] = 0
            self.inside = inside
            self.steps = None

    def _count(self, index: int) -> None:
        self.iterations[index] += 1
        self.steps = None

    def _step(self, index: int) -> LoopStep:
        loop = self.facts.loops[index]
        place = (loop.first, loop.last)
        return LoopStep(self.number, place, self.iterations[index], self.facts.locations[index])

    def _is_over(self, frame: FrameType) -> bool:
        return self.frame is None or frame.f_code.co_code[frame.f_lasti] in _RETURNS


def _location(file: str, line: int) -> Location:
    return Location(file, line, linecache.getline(file, line).strip())
