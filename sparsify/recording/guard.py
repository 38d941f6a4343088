"""Watch a run to learn what it depends on and what it changes beside its tensors.

What cannot be seen: C extensions that keep a state of their own, and Python that runs in other
threads.
"""

from __future__ import annotations

import _io
import gc
import importlib._bootstrap as _bootstrap
import inspect
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from sparsify.errors import Location
from sparsify.recording.call_events import Profiler, calls_told
from sparsify.recording.environment import (
    environment,
    environment_variables,
    random_states,
    restore_random,
)
from sparsify.recording.guard_changes import (
    Change,
    SideEffect,
    doubts,
    find_changes,
    tell,
    undo,
)
from sparsify.recording.guard_check import MISSED, CheckWriter
from sparsify.recording.guard_code import origin
from sparsify.recording.guard_nodes import frozen, read_cell
from sparsify.recording.guard_told import Told
from sparsify.recording.guard_values import GONE
from sparsify.recording.guard_walk import Walk
from sparsify.recording.recording import Args, Kwargs

# Calls that read or write what is outside the process; methods of files, and those that seed
# generators, are found by the type of their object.
OUTSIDE: frozenset[Any] = frozenset(
    (
        *(print, input, open, time.time, time.time_ns, time.perf_counter, time.perf_counter_ns),
        *(time.monotonic, time.monotonic_ns, time.process_time, time.sleep),
    )
)
# What a module does when it is imported happens once; the garbage collector comes at any time.
IMPORTED: CodeType = vars(_bootstrap)["_find_and_load"].__code__  # of modules not yet loaded
READ_ENVIRONMENT = type(os.environ).__getitem__.__code__
# Functions in Python that do; the first one runs only for records that are let through.
REACHING: dict[CodeType, str] = {
    logging.Logger.handle.__code__: "logging.Logger.handle",
    **{
        getattr(owner, name).__code__: f"{owner.__name__}.{name}"
        for owner, names in (
            (torch, ("manual_seed", "seed", "set_rng_state")),
            (torch.cuda, ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state")),
        )
        for name in names
    },
}
SEEDING = ("manual_seed", "seed", "set_state")  # methods of generators


class CompiledGuard:
    """A guard (``recording.Guard``) as one generated function, readable as ``source``."""

    def __init__(self, writer: CheckWriter) -> None:
        self.source = writer.source
        self._check = writer.function()
        self._told: list[Told] = writer.told
        self._told_at = writer.told_at

    def matches(self, args: Args, kwargs: Kwargs) -> bool:
        """True if the recording holds for this call."""
        try:
            return self._check(args, kwargs) is None
        except MISSED:  # something that is read is not there any more
            return False

    def explain(self, args: Args, kwargs: Kwargs) -> str:
        """The first thing that differs, "" if nothing does."""
        try:
            found = self._check(args, kwargs)
        except MISSED as error:
            traceback = error.__traceback__
            inner = traceback.tb_next if traceback else None
            line = inner.tb_lineno if inner else 0
            told = next(told for at, told in self._told_at.items() if at + 2 >= line)
            return f"{self._told[told].path} is not there any more"
        return self._told[found[0]].say(found[1]) if found else ""


class Seen:
    """What a watched run read and changed; filled when the run is over."""

    def __init__(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self._args, self._kwargs = args, kwargs
        self._environment = environment()
        self._random = random_states()
        self._walk = Walk()
        self._changes: list[Change] = []
        self._drawn: list[str] = []
        self._loaded: list[str] = []
        self._variables: dict[Any, object] = {}
        self._failure = ""
        self._foreign_codes = {id(c) for c in (IMPORTED, *map(_code_of, gc.callbacks))}
        self._reached_out: dict[str, tuple[str, int]] = {}
        self._follow(self._start, model)

    def guard(self) -> CompiledGuard:
        """The guard for the state before the run; keeps no tensor alive."""
        writer = CheckWriter()
        if self._failure:
            writer.never(f"what forward reads could not be followed: {self._failure}")
        writer.write(self._walk, self._environment, self._variables, self._args, self._kwargs)
        return CompiledGuard(writer)

    def side_effects(self, handled: Collection[tuple[int, Any]]) -> list[SideEffect]:
        """What the run changed, except where (id of the owner, key) is among ``handled``.

        An attribute that forward sets to the same value at every call is told once only: the next
        run finds it as it leaves it, and its guard is keyed on that value.
        """
        kept = [change for change in self._changes if change.owners.isdisjoint(handled)]
        effects = [tell(change, self._walk) for change in kept]
        for name in self._drawn:
            text = f"forward draws random numbers from Python's {name}."
            remedy = "Draw them with torch, or outside forward and pass them in."
            effects.append(SideEffect(name, "", "", text=text, remedy=remedy))
        for name in self._loaded:
            text = f"forward loads Python's {name}, and may draw random numbers from it."
            effects.append(SideEffect(name, "", "", text=text, may_settle=True))
        for name, where in self._reached_out.items():
            text = f"forward calls {name}(), which a replaced run would not do."
            remedy = "Call it outside forward."
            effects.append(SideEffect(name, "", "", Location(*where), text, remedy))
        if self._failure:
            text = f"What forward reads could not be followed: {self._failure}."
            effects.append(SideEffect("model", "", "", text=text))
        return [*effects, *doubts(self._walk)]

    def restore_python(self) -> None:
        """Put back the attributes, containers, globals and closures that the run changed."""
        undo(self._changes)
        restore_random(self._random)

    def will_run(self, *functions: object) -> None:
        """Follow what functions, and those that they name, can read when they run later."""
        waiting = [held for held in functions if isinstance(held, FunctionType)]
        while waiting:
            function = waiting.pop()
            if id(function.__code__) in self._walk.codes:
                continue
            known = set(self._walk.functions)
            self._follow(self._walk.root, function, function.__qualname__)
            for code in _codes_in(function.__code__):
                self._follow(self._walk.enter, code, function.__globals__, {})
            new = self._walk.functions.keys() - known
            waiting += [self._walk.functions[key][0].value for key in new]

    def profiler(self) -> Profiler:
        """What Python calls at every call and every return: most are none of those that matter."""
        codes, users, foreign_codes = self._walk.codes, self._walk.users, self._foreign_codes
        always = foreign_codes | {id(READ_ENVIRONMENT)}
        foreign: FrameType | None = None  # runs in the middle of forward, is none of it

        def profile(frame: FrameType, event: str, arg: Any) -> bool:
            nonlocal foreign
            key = id(frame.f_code)
            if foreign is not None:
                if event == "return" and frame is foreign:
                    foreign = None
            elif event == "call":
                if key in codes and key not in always:
                    return True
                if key in foreign_codes:
                    foreign = frame
                    return False
                if key in always:
                    self._follow(self._read_variable, frame)
                if key not in codes:
                    self._first_call(frame)
                return key not in always
            elif event == "c_call" and key in users and _is_outside(arg):
                self._reached_out.setdefault(
                    arg.__name__, (frame.f_code.co_filename, frame.f_lineno)
                )
            return False

        return profile

    def matters(self, code: CodeType) -> bool:
        """Whether calls that ``code`` makes, or its end, are to be told to the profiler."""
        return id(code) in self._walk.users or id(code) in self._foreign_codes

    def _first_call(self, frame: FrameType) -> None:
        code = frame.f_code
        if code in REACHING and _users_line(frame) not in self._reached_out.values():
            self._reached_out.setdefault(REACHING[code], _users_line(frame))
        held = frame.f_locals if code.co_freevars else {}
        free = {name: held.get(name, GONE) for name in code.co_freevars}
        self._follow(self._walk.enter, code, frame.f_globals, free)

    def _read_variable(self, frame: FrameType) -> None:
        variable = os.environ.encodekey(frame.f_locals["key"])
        self._variables.setdefault(variable, environment_variables().get(variable))

    def _follow(self, step: Callable[..., object], *args: Any) -> None:
        """Objects that answer questions in their own way must not end the user's run."""
        try:
            step(*args)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            self._failure = f"{type(error).__name__}: {error}"

    def _start(self, model: nn.Module) -> None:
        self._walk.root(model, "model")
        for key, name in _argument_names(model, self._args, self._kwargs):
            value = self._args[key] if isinstance(key, int) else self._kwargs[key]
            self._walk.argument(value, key, f"argument {name}")

    def _finish(self) -> None:
        self._walk.resolve_imports()
        for function in _functions_of(self._walk):
            self._walk.root(function, function.__qualname__)
        self._changes = find_changes(self._walk)
        now = random_states()
        self._drawn = [n for n, then in self._random.items() if frozen(now[n]) != frozen(then)]
        self._loaded = [name for name in now if name not in self._random]


@contextmanager
def watch(model: nn.Module, args: Args, kwargs: Kwargs) -> Iterator[Seen]:
    """Watch the run inside the ``with`` block; ask the Seen after it."""
    seen = Seen(model, args, kwargs)
    with calls_told(seen.profiler(), seen.matters):
        yield seen
    seen._follow(seen._finish)


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """``code`` and that of the functions defined in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes_in(inner)


def _users_line(frame: FrameType) -> tuple[str, int]:
    """The innermost line of the user's that led here."""
    place: FrameType = frame
    while origin(place.f_code.co_filename) != "user" and place.f_back is not None:
        place = place.f_back
    return place.f_code.co_filename, place.f_lineno


def _code_of(function: object) -> object:
    return getattr(function, "__code__", None)


def _is_outside(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    if isinstance(owner, torch.Generator):
        return function.__name__ in SEEDING
    return isinstance(owner, _io._IOBase) or (isinstance(owner, ModuleType) and function in OUTSIDE)


def _argument_names(
    model: nn.Module, args: Args, kwargs: Kwargs
) -> Iterator[tuple[int | str, str]]:
    """Key and name of every argument; positional ones take the names of forward's parameters."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for index in range(len(args)):
        yield index, positional[index] if index < len(positional) else f"number {index}"
    for name in kwargs:
        yield name, name


def _functions_of(walk: Walk) -> list[FunctionType]:
    """Functions that ran and that no walk reached, with something in them that can change.

    Those made during the run (their code is a constant of code that ran) are gone or follow from
    what was read.
    """
    made = {id(inner) for code in walk.codes.values() for inner in code.co_consts}
    unknown: list[CodeType] = [
        code
        for key, code in walk.codes.items()
        if key not in walk.functions and key not in made and (key in walk.free or key in walk.users)
    ]
    if not unknown:
        return []
    functions = [f for f in gc.get_referrers(*unknown) if isinstance(f, FunctionType)]
    matching = [f for f in functions if _holds(f, walk.free.get(id(f.__code__), {}))]
    return matching or functions


def _holds(function: FunctionType, free: dict[str, Any]) -> bool:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return all(read_cell(cell) is free[name] for name, cell in cells if name in free)
