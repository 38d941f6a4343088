"""A guard must miss whatever changes the recorded run, and name it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests import guarded as here
from tests import guarded_settings
from tests.guarded import (
    Everything,
    Lif,
    Parameters,
    Reset,
    Spike,
    explained,
    guarded,
    make_surrogate,
    matched,
    watched,
)

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
Mutate = Callable[[Everything, pytest.MonkeyPatch], object]


def assign(path: str, value: Any) -> Mutate:
    """Set an attribute or item at a dotted path below the model."""

    def mutate(model: Everything, patch: pytest.MonkeyPatch) -> None:
        *way, last = path.split(".")
        holder: Any = model
        for name in way:
            inside = isinstance(holder, (dict, nn.ModuleDict))
            holder = holder[name] if inside else getattr(holder, name)
        setattr(holder, last, value)

    return mutate


def in_module(owner: object, name: str, value: object) -> Mutate:
    return lambda model, patch: patch.setattr(owner, name, value)


def do(act: Callable[[Everything], object]) -> Mutate:
    return lambda model, patch: act(model)


def cell_of(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)]


def set_closure(model: Everything) -> None:
    cell_of(model.cells["first"].spike, "offset").cell_contents = 0.25


MUTATIONS: dict[str, tuple[Mutate, str]] = {
    "beta": (assign("cells.first.beta", 0.8), "cells.first.beta was 0.9 and is now 0.8"),
    "other layer": (assign("cells.second.beta", 0.7), "cells.second.beta was 0.8"),
    "int to float": (assign("one", 1.0), "model.one was 1 and is now 1.0"),
    "int to bool": (assign("one", True), "model.one was 1 and is now True"),
    "signed zero": (assign("zero", -0.0), "model.zero was 0.0 and is now -0.0"),
    "nan to number": (assign("nan", 1.0), "model.nan was nan and is now 1.0"),
    "steps": (assign("steps", 4), "model.steps was 3 and is now 4"),
    "none to number": (assign("cells.first.maximum", 3.0), "cells.first.maximum was None"),
    "none to tensor": (assign("mask", torch.ones(3)), "model.mask was None and is now a tensor"),
    "dataclass": (assign("config.decay", 0.5), "model.config.decay was 0.9 and is now 0.5"),
    "enum": (assign("config.reset", Reset.ZERO), "model.config.reset was <Reset.SUBTRACT: 1>"),
    "slot": (assign("slotted.gain", 3.0), "model.slotted.gain was 2.0 and is now 3.0"),
    "named tuple": (assign("parameters_", Parameters(2.0, 0.9)), "model.parameters_.v_th was 1.0"),
    "namespace": (assign("space.bias", 1.0), "model.space.bias was 0.0"),
    "dtype": (assign("space.dtype", torch.float64), "model.space.dtype was torch.float32"),
    "numpy scalar": (assign("scale", np.float32(2)), "model.scale was np.float32(1.0)"),
    "numpy dtype": (assign("scale", np.float64(1)), "model.scale was"),
    "list item": (do(lambda m: m.table["gain"].__setitem__(0, 4.0)), "model.table['gain'][0] was"),
    "list length": (
        do(lambda m: m.table["gain"].append(1.0)),
        "length of model.table['gain'] was",
    ),
    "dict entry": (do(lambda m: m.table.update(new=1)), "model.table['new'] was added"),
    "dict value": (do(lambda m: m.table.update({3: (None, False)})), "model.table[3][1] was True"),
    "dict key": (
        do(lambda m: m.table.update({4: m.table.pop(3)})),
        "model.table[4] was added",
    ),
    "dict order": (
        do(lambda m: m.table.update(gain=m.table.pop("gain"))),
        "the order of model.table changed",
    ),
    "long dict": (
        do(lambda m: m.lookup.__setitem__("7", 7.5)),
        "model.lookup['7'] was 7.0 and is now 7.5",
    ),
    "order of modules": (
        do(lambda m: m.cells.update({"first": m.cells.pop("first")})),
        "the order of cells changed",
    ),
    "on a parameter": (
        do(lambda m: setattr(m.layers[0].weight, "scale", 2.0)),
        "layers.0.weight.scale was 1.0 and is now 2.0",
    ),
    "deque": (do(lambda m: m.delays.appendleft(m.delays.pop())), "model.delays[0] was 1"),
    "set": (do(lambda m: m.flags.remove("a")), "the contents of model.flags changed"),
    "set element": (assign("flags", {"a", "c"}), "the contents of model.flags changed"),
    "long list": (
        do(lambda m: m.long.__setitem__(7, -1.0)),
        "model.long[7] was 7.0 and",
    ),
    "long list type": (do(lambda m: m.long.__setitem__(7, 7)), "model.long[7] was 7.0"),
    "array": (do(lambda m: m.profile.__setitem__(1, 9.0)), "contents of model.profile changed"),
    "closure": (
        do(set_closure),
        "closure variable offset of make_surrogate",
    ),
    "surrogate": (assign("cells.first.spike", make_surrogate(0.5)), "cells.first.spike was"),
    "lambda": (assign("cells.first.transform", lambda x: x + 1), "cells.first.transform was"),
    "partial": (
        assign("cells.first.bound", functools.partial(torch.clamp, min=-8.0)),
        "cells.first.bound['min'] was -9.0 and is now -8.0",
    ),
    "partial of another": (
        assign("cells.first.bound", functools.partial(torch.clip, min=-9.0)),
        "cells.first.bound was clamp and is now clip",
    ),
    "bound method": (
        do(lambda m: setattr(m.cells["first"], "combine", m.cells["first"].add)),
        "cells.first.combine was Lif.multiply and is now Lif.add",
    ),
    "other's method": (
        do(lambda m: setattr(m.cells["first"], "combine", m.cells["second"].multiply)),
        "cells.first.combine.__self__",
    ),
    "global": (in_module(here, "THRESHOLD", 0.5), "global THRESHOLD in tests.guarded was 1.0"),
    "global list": (
        lambda model, patch: patch.setitem(here.SCALES, "out", [1.0, 0.25]),
        "global SCALES['out'][0] in tests.guarded was 0.5 and is now 1.0",
    ),
    "module attribute": (
        in_module(guarded_settings, "RATES", [0.1, 0.3]),
        "tests.guarded_settings.RATES[1] was 0.2 and is now 0.3",
    ),
    "global object": (
        in_module(guarded_settings.nested.inner, "value", 1.5),
        "nested.inner.value was 0.5 and is now 1.5",
    ),
    "class of a global": (
        in_module(guarded_settings.Neuron, "reset_value", 0.5),
        "Neuron.reset_value was 1.0 and is now 0.5",
    ),
    "instance hides class": (
        in_module(guarded_settings.neuron, "reset_value", 0.5),
        "tests.guarded_settings.neuron.reset_value was added",
    ),
    "class attribute": (in_module(Lif, "default_gain", 2.0), "Lif.default_gain was 1.0"),
    "hidden class attribute": (
        assign("cells.first.default_gain", 2.0),
        "cells.first.default_gain was added",
    ),
    "patched method": (in_module(Lif, "multiply", Lif.add), "Lif.multiply was Lif.multiply and"),
    "patched forward": (
        in_module(nn.Linear, "forward", lambda self, x: x),
        "Linear.forward was Linear.forward and is now",
    ),
    "patched surrogate": (in_module(Spike, "slope", 5.0), "Spike.slope was 25.0 and is now 5.0"),
    "kwdefault": (
        lambda m, patch: patch.setitem(Lif.forward.__kwdefaults__ or {}, "inhibit", 1.0),
        "default of inhibit of Lif.forward was 0.0 and is now 1.0",
    ),
    "default": (
        in_module(Everything.forward, "__defaults__", ({"gain": 2.0},)),
        "default 0 of Everything.forward was None",
    ),
    "code": (
        in_module(Lif.multiply, "__code__", Lif.add.__code__),
        "the code of Lif.multiply was",
    ),
    "eval": (do(lambda m: m.eval()), "model.training was True and is now False"),
    "eval of one": (do(lambda m: m.cells["second"].eval()), "cells.second.training was True"),
    "hook": (
        do(lambda m: m.layers[0].register_forward_hook(lambda *a: None)),
        "forward hook added on layers.0",
    ),
    "pre-hook": (
        do(lambda m: m.cells["first"].register_forward_pre_hook(lambda *a: None)),
        "forward pre-hook added on cells.first",
    ),
    "hook of the model": (
        do(lambda m: m.register_forward_hook(lambda *a: None)),
        "forward hook added on model",
    ),
    "own forward": (
        do(lambda m: setattr(m.layers[0], "forward", lambda x: x)),
        "layers.0.forward was added",
    ),
    "replaced module": (
        do(lambda m: m.layers.__setitem__(0, nn.Linear(4, 5))),
        "layers.0 was a Linear and is now another Linear",
    ),
    "appended module": (
        do(lambda m: m.layers.append(nn.Linear(3, 3))),
        "layers.2 was added",
    ),
    "removed module": (do(lambda m: m.cells.pop("second")), "cells.second was removed"),
    "unregistered module": (
        do(lambda m: m.aside.__setitem__(0, nn.Linear(3, 3))),
        "model.aside[0] was a Linear",
    ),
    "its training": (do(lambda m: m.aside[0].eval()), "model.aside[0].training was True"),
    "parametrization": (
        do(lambda m: parametrize.register_parametrization(m.layers[0], "weight", nn.Identity())),
        "the class of layers.0 was Linear and is now ParametrizedLinear",
    ),
    "no bias": (do(lambda m: setattr(m.layers[0], "bias", None)), "layers.0.bias was a parameter"),
    "registered buffer": (
        do(lambda m: m.layers[0].register_buffer("mask", torch.ones(1))),
        "layers.0.mask was added",
    ),
    "deleted attribute": (do(lambda m: delattr(m, "steps")), "model.steps was removed"),
    "class": (
        do(lambda m: setattr(m.cells["first"], "__class__", type("Lif2", (Lif,), {}))),
        "the class of cells.first was Lif and is now Lif2",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_missed_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, said = MUTATIONS[name]
    model = Everything()
    guard = guarded(model, X)
    mutate(model, monkeypatch)
    assert not matched(guard, X)
    assert said in explained(guard, X)


HARMLESS: dict[str, Mutate] = {
    "nothing": do(lambda m: None),
    "an equal float": assign("cells.first.beta", float("0.9")),
    "an equal int": assign("long", [float(i) for i in range(10_000)]),
    "another nan": assign("nan", -float("nan") * 2),
    "a rebuilt container": assign("table", {"gain": [1.0, 2.0], 3: (None, True)}),
    "an equal config": do(lambda m: setattr(m, "config", copy.deepcopy(m.config))),
    "an equal array": assign("profile", np.linspace(0.0, 1.0, 4)),
    "what nobody reads": assign("unread", 6),
    "what nobody reads in a config": assign("config.name", "other"),
    "an unread constant": in_module(guarded_settings, "UNREAD", 4),
    "another weight": do(lambda m: nn.init.zeros_(m.get_parameter("layers.0.weight"))),
    "a replaced parameter": do(
        lambda m: setattr(m.layers[1], "weight", nn.Parameter(torch.ones(3, 5)))
    ),
    "a loaded state": do(lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()))),
    "a hook that is gone": do(lambda m: m.register_forward_hook(lambda *a: None).remove()),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_matches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Everything()
    guard = guarded(model, X)
    HARMLESS[name](model, monkeypatch)
    assert explained(guard, X) == ""
    assert matched(guard, X)


class Plain(nn.Module):
    def forward(self, x: Any, *rest: Any, **options: Any) -> Any:
        return x


BIAS = torch.ones(3)
INT, TREE = torch.zeros(2, dtype=torch.int64), {"a": [X, (1, None)], "b": 2.0}
CALLS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str]] = {
    "dtype": ((X,), (X.double(),), "dtype of argument x was torch.float32"),
    "requires_grad": ((X,), (X.clone().requires_grad_(),), "requires_grad of argument x was False"),
    "layout": ((X,), (X.to_sparse(),), "layout of argument x was torch.strided"),
    "device": ((X,), (X.to("meta"),), "device of argument x was cpu and is now meta"),
    "subclass": ((X,), (nn.Parameter(X),), "argument x was a tensor"),
    "tensor to number": ((X,), (1.0,), "argument x was a tensor and is now 1.0"),
    "number": ((X, 3), (X, 4), "argument number 1 was 3 and is now 4"),
    "number's type": ((X, 3), (X, 3.0), "argument number 1 was 3 and is now 3.0"),
    "string": ((X, "a"), (X, "b"), "argument number 1 was 'a' and is now 'b'"),
    "more": ((X,), (X, X.clone()), "the number of positional arguments was 1 and is now 2"),
    "nested value": ((TREE,), ({**TREE, "b": 3.0},), "argument x['b'] was 2.0"),
    "nested none": ((TREE,), ({**TREE, "a": [X, (1, X)]},), "argument x['a'][1][1] was None"),
    "nested dtype": ((TREE,), ({**TREE, "a": [INT, (1, None)]},), "dtype of argument x['a'][0]"),
    "list to tuple": (([X],), ((X,),), "argument x was a list of 1 and is now a tuple of 1"),
    "longer list": (([X],), ([X, X],), "the length of argument x was 1 and is now 2"),
    "same twice": ((X, X), (X, X.clone()), "argument number 1 and argument x were one object"),
    "named tuple": ((Parameters(1.0, 2.0),), ((1.0, 2.0),), "argument x was a Parameters"),
    "object": ((here.Config(),), (here.Slotted(),), "argument x was a Config and is now a Slotted"),
    "function": ((X, torch.sin), (X, torch.cos), "argument number 1 was sin and is now cos"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments(name: str) -> None:
    first, second, said = CALLS[name]
    guard = guarded(Plain(), *first)
    assert not matched(guard, *second)
    assert said in explained(guard, *second)


def test_keyword_arguments() -> None:
    guard = guarded(Plain(), X, gain=1.0, bias=BIAS)
    assert matched(guard, X, bias=torch.zeros(9), gain=1.0)
    assert "argument gain was 1.0 and is now 2.0" in explained(guard, X, gain=2.0, bias=BIAS)
    assert "the keyword arguments are now ['gain']" in explained(guard, X, gain=1.0)
    assert not matched(guard, X, gain=1.0, bias=BIAS, more=1)
    assert not matched(guard, gain=1.0, bias=BIAS, x=X)


def test_shapes_are_not_the_guards() -> None:
    guard = guarded(Plain(), X)
    assert matched(guard, torch.zeros(7, 9, 2)) and matched(guard, X.t())


def test_an_options_object_is_read_at_each_call() -> None:
    model = Everything()
    guard = guarded(model, X, {"gain": 2.0})
    assert matched(guard, X, {"gain": 2.0})
    assert "argument options['gain'] was 2.0" in explained(guard, X, {"gain": 3.0})
    assert not matched(guard, X, {})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


def test_untied_weights() -> None:
    model = Twice()
    guard = guarded(model, X)
    model.b.weight = nn.Parameter(model.b.weight.detach().clone())
    assert not matched(guard, X)
    assert "b.weight and a.weight were one object" in explained(guard, X)


def test_a_guard_keeps_no_tensor_alive() -> None:
    import gc
    import weakref

    model, x = Lif(), torch.zeros(1, 3)
    model.maximum = torch.tensor(5.0)  # type: ignore[assignment]
    held = weakref.ref(model.maximum)
    guard = guarded(model, x, torch.zeros(1, 3))
    kept = weakref.ref(x)
    del x
    model.maximum = torch.tensor(4.0)  # type: ignore[assignment]
    gc.collect()
    assert kept() is None and held() is None
    assert matched(guard, torch.ones(1, 3), torch.zeros(1, 3))


def test_a_guard_is_for_the_state_before_the_run() -> None:
    class Lazy(nn.Module):
        mem: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mem is None:
                self.mem = torch.zeros_like(x)
            self.mem = self.mem * 0.5 + x
            return self.mem

    model = Lazy()
    first = watched(model, X)
    handled = {(id(vars(model)), "mem")}
    assert len(first.side_effects(())) == 1 and first.side_effects(handled) == []
    assert not matched(first.guard(), X), "the first run started without mem"
    second = watched(model, X)
    assert matched(second.guard(), X)
    model.mem = None
    assert "model.mem was a tensor and is now None" in explained(second.guard(), X)


def test_nothing_left_on_the_thread() -> None:
    import sys

    def profiler(frame: Any, event: str, arg: Any) -> None:
        return None

    sys.setprofile(profiler)
    try:
        watched(Lif(), X, X)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)


def test_a_run_that_raises_restores_the_profiler() -> None:
    import sys

    with pytest.raises(RuntimeError):
        watched(nn.Linear(3, 3), X)
    assert sys.getprofile() is None


def test_under_cprofile() -> None:
    import cProfile

    with cProfile.Profile() as profile:
        guard = guarded(Lif(), X, X)
    assert matched(guard, X, X)
    assert profile.getstats()


def test_nan_payload_and_sign() -> None:
    model = Everything()
    guard = guarded(model, X)
    model.nan = math.nan
    assert matched(guard, X)
