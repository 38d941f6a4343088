"""State to which no attribute leads: caches, contexts, keys, C code, the environment."""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
import os
import weakref
from argparse import Namespace
from collections import ChainMap, UserDict
from collections.abc import Callable
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.guarded import Config, Slotted, explained, guarded, matched, watched

X = torch.ones(2, 3)
SCALE: ContextVar[float] = ContextVar("SCALE", default=1.0)
MODE: ContextVar[str] = ContextVar("MODE")
CALLS: list[int] = []


@functools.cache
def config() -> Config:
    return Config()


@functools.lru_cache(maxsize=4)
def named_config(name: str) -> Config:
    return Config(name=name)


class Switches(dict[str, Any]):
    """A dictionary with attributes and a class attribute."""

    scale = 1.0

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Defaults(UserDict[str, float]):
    pass


class Base:
    def gain(self) -> float:
        return 1.0


class Derived(Base):
    pass


class SimpleMember:
    def __init__(self) -> None:
        self.theta = 1.0


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay_of = operator.attrgetter("config.decay")
        self.gain_of = operator.methodcaller("gain")
        self.config = Config()
        self.namespace = Namespace(theta=1.0)
        self.defaults = Defaults(a=1.0)
        self.chain = ChainMap({"b": 1.0}, {"c": 2.0})
        self.switches = Switches(on=1.0)
        self.keys = {Slotted(): 1.0}
        self.members = {SimpleMember()}
        self.derived = Derived()
        self.parent = weakref.ref(self.derived)
        self.weak = weakref.WeakKeyDictionary({self.derived: 1.0})

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.decay_of(self), self.gain_of(self.derived), self.namespace.theta]
        parts += [self.defaults["a"], self.chain["b"], self.chain["c"], self.switches.on]
        parts += [key.gain for key in self.keys] + [member.theta for member in self.members]
        parts += [self.switches.scale, SCALE.get(), 1.0 if MODE.get("") else 2.0]
        parts += [config().decay, named_config("a").decay, float(os.environ.get("GAIN", "1"))]
        parts += [self.weak[self.derived], getattr(self.parent(), "extra", 0.0)]
        return x * float(sum(parts))


CHANGES: dict[str, tuple[Callable[[Hidden], object], str]] = {
    "attrgetter": (lambda m: setattr(m.config, "decay", 0.5), "model.config.decay was 0.9"),
    "methodcaller": (lambda m: setattr(m.derived, "gain", lambda: 2.0), "derived.gain was added"),
    "argparse": (lambda m: setattr(m.namespace, "theta", 2.0), "model.namespace.theta was 1.0"),
    "UserDict": (lambda m: m.defaults.update(a=2.0), "model.defaults.data['a'] was 1.0"),
    "ChainMap": (lambda m: m.chain.maps[1].update(c=3.0), "model.chain.maps[1]['c'] was 2.0"),
    "dict subclass": (lambda m: m.switches.update(on=2.0), "model.switches['on'] was 1.0"),
    "its class": (lambda m: setattr(Switches, "scale", 2.0), "Switches.scale was 1.0"),
    "key": (
        lambda m: setattr(next(iter(m.keys)), "gain", 3.0),
        "a key of model.keys.gain was 2.0 and is now 3.0",
    ),
    "element": (
        lambda m: setattr(next(iter(m.members)), "theta", 3.0),
        "an element of model.members.theta was 1.0 and is now 3.0",
    ),
    "context variable": (
        lambda m: SCALE.set(2.0),
        "global SCALE in tests.recording.test_guard_hidden was",
    ),
    "unset context variable": (
        lambda m: MODE.set("on"),
        "global MODE in tests.recording.test_guard_hidden",
    ),
    "cache": (lambda m: setattr(config(), "decay", 0.5), "a cached result of"),
    "bounded cache": (lambda m: setattr(named_config("a"), "decay", 0.5), "a cached result of"),
    "environment": (
        lambda m: os.environ.update(GAIN="2"),
        "environment variable b'GAIN' was b'1' and is now b'2'",
    ),
    "method on a derived class": (
        lambda m: setattr(Derived, "gain", lambda self: 3.0),
        "Derived.gain was",
    ),
    "attribute on a class": (lambda m: setattr(Base, "extra", 3.0), "Base.extra was added"),
    "weak dict": (lambda m: m.weak.update({m.derived: 2.0}), "model.weak.data"),
}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    config.cache_clear()
    named_config.cache_clear()
    monkeypatch.setenv("GAIN", "1")
    monkeypatch.setattr(Switches, "scale", 1.0)
    SCALE.set(1.0)
    for cls, name in ((Base, "extra"), (Derived, "gain")):
        if name in vars(cls):
            delattr(cls, name)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_missed_and_named(name: str) -> None:
    change, said = CHANGES[name]
    model = Hidden()
    model(X)  # fills the caches
    token = MODE.set("")
    MODE.reset(token)
    guard = guarded(model, X)
    before = model(X)
    change(model)
    try:
        assert not torch.equal(model(X), before), "the change matters"
        assert not matched(guard, X)
        assert said in explained(guard, X)
    finally:
        if name == "unset context variable":
            MODE.set("")


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = MappingProxyType({"a": 1.0})
        self.bytes = bytearray(b"ab")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table["a"] * self.bytes[0]


def test_what_cannot_be_compared_is_told() -> None:
    told = {str(effect) for effect in watched(Fixed(), X).side_effects(())}
    assert {text.split(",")[0] for text in told} == {
        "model.table is a mappingproxy",
        "model.bytes is a bytearray",
    }


class Raising:
    """Answers no question at all."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = object.__hash__


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = [Raising(), object(), iter]
        self.table = {Raising(): 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return x * len(self.odd) * len(self.table)


def test_odd_objects_do_not_end_the_run() -> None:
    model = Odd()
    seen = watched(model, X)
    effects = [str(effect) for effect in seen.side_effects(())]
    guard = seen.guard()
    if effects:  # what could not be looked at is told, and the guard never matches
        assert all("could not be followed: RuntimeError" in text for text in effects), effects
        assert not matched(guard, X)
    else:
        assert matched(guard, X)
        model.odd.append(1)
        assert not matched(guard, X)


look_up = getattr


class Lookups:
    static = staticmethod(getattr)


class LookedUp(nn.Module):
    """``kind_1`` stands in no code."""

    def __init__(self, look_up: Callable[[object, str], str]) -> None:
        super().__init__()
        self.name, self.kind_1, self.look_up = "kind_" + str(1), "steep", look_up

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.look_up(self, self.name) == "steep" else x


@pytest.mark.parametrize(
    "look_up",
    [
        lambda of, name: getattr(of, name, "plain"),
        lambda of, name: next(map(getattr, (of,), (name,))),
        lambda of, name: getattr(of, name) + "",
        lambda of, name: getattr(of, "".join(name), "plain"),
        lambda of, name: getattr(of, "KIND_1".lower()),
        lambda of, name: builtins.getattr(of, name),
        lambda of, name: look_up(of, name),
        lambda of, name: Lookups.static(of, name),
        lambda of, name, given=getattr: given(of, name),
        functools.partial(lambda given, of, name: given(of, name), getattr),
        lambda of, name: inspect.getattr_static(of, name),
        lambda of, name: of.__getstate__()[name],
    ],
)
def test_computed_names_are_looked_up(
    look_up: Callable[[object, str], str],
) -> None:
    model = LookedUp(look_up)
    guard = guarded(model, X)
    model.kind_1 = "flat"
    assert not matched(guard, X)
