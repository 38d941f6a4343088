"""What a run changes in Python's state is found, named with its line, and can be undone."""

from __future__ import annotations

import gc
import io
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import guarded_settings
from tests.guarded import Config, Counting, guarded, matched, watched

X = torch.ones(2, 3)
TOTAL = 0
COLLECTIONS = 0
CACHE: dict[str, int] = {}


def count(model: Counting, x: Tensor) -> None:
    model.calls += 1


def append(model: Counting, x: Tensor) -> None:
    model.history.append(3)


def add_entry(model: Counting, x: Tensor) -> None:
    model.seen["calls"] += 1


def add_name(model: Counting, x: Tensor) -> None:
    model.names.add("x")


def change_dataclass(model: Counting, x: Tensor) -> None:
    model.settings.decay *= 0.5


def change_slot(model: Counting, x: Tensor) -> None:
    model.slotted.gain += 1


def fill_slot(model: Counting, x: Tensor) -> None:
    model.slotted.unset = 1


def change_nested(model: Counting, x: Tensor) -> None:
    model.nested["inner"][1] = 7


def create(model: Counting, x: Tensor) -> None:
    model.width = x.shape[1]  # type: ignore[assignment]


def create_on_class(model: Counting, x: Tensor) -> None:
    Counting.last_width = x.shape[1]  # type: ignore[attr-defined]


def delete(model: Counting, x: Tensor) -> None:
    del model.batch_size


def rebind_global(model: Counting, x: Tensor) -> None:
    global TOTAL
    TOTAL += 1


def change_global(model: Counting, x: Tensor) -> None:
    CACHE["width"] = x.shape[1]


def change_module(model: Counting, x: Tensor) -> None:
    guarded_settings.neuron.reset_value += 1


def change_by_name(model: Counting, x: Tensor) -> None:
    for name in ("calls",):
        setattr(model, name + "", 3)


def change_vars(model: Counting, x: Tensor) -> None:
    vars(model)["calls"] = 9


def create_by_name(model: Counting, x: Tensor) -> None:
    for layer in range(1):
        setattr(model, f"width_{layer}", x.shape[1])


def make_counter() -> Callable[[Counting, Tensor], None]:
    total = 0

    def counter(model: Counting, x: Tensor) -> None:
        nonlocal total
        total += 1

    return counter


def replace_module(model: Counting, x: Tensor) -> None:
    model.inner = nn.Identity()


def add_hook(model: Counting, x: Tensor) -> None:
    model.register_forward_hook(lambda *args: None)


def set_mode(model: Counting, x: Tensor) -> None:
    model.train(not model.training)


def tensor_state(model: Counting, x: Tensor) -> None:
    model.mem = x + 1


EFFECTS: dict[str, tuple[Callable[[Counting, Tensor], object], str]] = {
    "counter": (count, "changed model.calls from 0 to 1"),
    "append": (append, "changed model.history from 0 entries to 1 entries"),
    "defaultdict": (add_entry, "changed model.seen from 0 entries to 1 entries"),
    "set": (add_name, "changed model.names from 0 entries to 1 entries"),
    "dataclass": (change_dataclass, "changed model.settings.decay from 0.9 to 0.45"),
    "slot": (change_slot, "changed model.slotted.gain from 2.0 to 3.0"),
    "empty slot": (fill_slot, "changed model.slotted.unset from absent to 1"),
    "nested": (change_nested, "changed model.nested['inner'][1] from 2 to 7"),
    "new attribute": (create, "changed model.width from absent to 3"),
    "new class attribute": (create_on_class, "changed Counting.last_width from absent to 3"),
    "deleted attribute": (delete, "changed model.batch_size from 0 to absent"),
    "global": (
        rebind_global,
        "changed global TOTAL in tests.recording.test_guard_effects from 0 to 1",
    ),
    "global dict": (
        change_global,
        "changed global CACHE in tests.recording.test_guard_effects from 0",
    ),
    "other module": (
        change_module,
        "changed tests.guarded_settings.neuron.reset_value from",
    ),
    "setattr": (change_by_name, "changed model.calls from 0 to 3"),
    "setattr, new": (create_by_name, "changed model.width_0 from absent to 3"),
    "vars": (change_vars, "changed model.calls from 0 to 9"),
    "closure": (make_counter(), "changed closure variable total of make_counter"),
    "hook": (add_hook, "forward changed the hooks of model"),
    "submodule": (replace_module, "changed inner from absent to a Identity"),
    "mode": (set_mode, "changed model.training from True to False"),
    "tensor": (tensor_state, "changed model.mem from None to a tensor"),
}


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals as they were, whatever a test leaves."""
    monkeypatch.setitem(globals(), "TOTAL", 0)
    monkeypatch.setitem(globals(), "CACHE", {})
    monkeypatch.setattr(guarded_settings, "neuron", guarded_settings.Neuron())


@pytest.mark.parametrize("name", EFFECTS)
def test_a_change_is_told_and_undone(name: str) -> None:
    change, said = EFFECTS[name]
    model = Counting(change)
    del model.ticks
    before = state_of(model)
    seen = watched(model, X)
    told = [str(effect) for effect in seen.side_effects(())]
    assert len(told) == 1 and said in told[0], told
    assert state_of(model) != before
    seen.restore_python()
    assert state_of(model) == before


def state_of(model: Counting) -> tuple[Any, ...]:
    slots = (model.slotted.gain, getattr(model.slotted, "unset", None))
    own = {key: repr(value) for key, value in vars(model).items() if key != "generator"}
    cell = getattr(model.change, "__closure__", None)
    inside = cell[0].cell_contents if cell else None
    reset = guarded_settings.neuron.reset_value
    last = vars(Counting).get("last_width")
    return (own, slots, TOTAL, dict(CACHE), inside, reset, last)


def test_python_s_own_marks_of_functions_are_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """An abstract method is marked so; code that sets attributes by computed names ran, too."""
    monkeypatch.setattr(change_by_name, "__isabstractmethod__", True, raising=False)
    monkeypatch.setattr(change_by_name, "kept", 1, raising=False)
    model = Counting(change_by_name)
    del model.ticks
    told = [str(effect) for effect in watched(model, X).side_effects(())]
    assert len(told) == 1 and "changed model.calls" in told[0], told


def test_the_line_is_named() -> None:
    (effect,) = watched(Counting(count), X).side_effects(())
    assert effect.location is not None
    assert Path(effect.location.file).name == "test_guard_effects.py"
    assert effect.location.line == count.__code__.co_firstlineno + 1


def test_handled_places_are_not_told() -> None:
    model = Counting(tensor_state)
    seen = watched(model, X)
    assert seen.side_effects({(id(vars(model)), "mem")}) == []
    assert seen.side_effects({(id(model), "mem")}) == []
    assert len(seen.side_effects({(id(model), "other")})) == 1


def write_and_restore(model: Counting, x: Tensor) -> None:
    model.calls += 1
    model.history.append(1)
    model.calls -= 1
    model.history.pop()


def set_size(model: Counting, x: Tensor) -> None:
    model.batch_size = x.shape[0]


def test_written_and_restored_is_no_effect() -> None:
    assert matched(guarded(Counting(write_and_restore), X), X)


def test_the_same_value_every_time_is_an_effect_once() -> None:
    model = Counting(set_size)
    (effect,) = watched(model, X).side_effects(())
    assert effect.path == "model.batch_size"
    guard = guarded(model, X)
    model.batch_size = 5
    assert not matched(guard, X)


def draw_python(model: Counting, x: Tensor) -> None:
    random.random()


def draw_numpy(model: Counting, x: Tensor) -> None:
    np.random.rand(2)


def draw_generator(model: Counting, x: Tensor) -> None:
    model.generator.random()


def seed(model: Counting, x: Tensor) -> None:
    torch.manual_seed(torch.initial_seed())


def seed_generator(model: Counting, x: Tensor) -> None:
    torch.default_generator.manual_seed(torch.initial_seed())


def fork(model: Counting, x: Tensor) -> None:
    with torch.random.fork_rng(devices=()):
        torch.rand(2)


def draw_iterator(model: Counting, x: Tensor) -> None:
    next(model.ticks)


def read_clock(model: Counting, x: Tensor) -> None:
    time.perf_counter()


def tell(model: Counting, x: Tensor) -> None:
    print("shape", x.shape)


def log_shape(model: Counting, x: Tensor) -> None:
    logging.getLogger("tests.guards").warning("shape %s", x.shape)


def write_file(model: Counting, x: Tensor) -> None:
    LOG.write("called")


LOG = io.StringIO()
TABLE = np.zeros(200_000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (draw_python, "forward draws random numbers from Python's random."),
        (draw_numpy, "forward draws random numbers from Python's numpy.random."),
        (draw_generator, "forward draws from model.generator."),
        (seed, "forward calls torch.manual_seed()"),
        (seed_generator, "forward calls manual_seed()"),
        (fork, "forward calls torch.set_rng_state()"),
        (draw_iterator, "model.ticks is an iterator"),
        (read_clock, "forward calls perf_counter()"),
        (tell, "forward calls print()"),
    ],
)
def test_what_no_graph_repeats(change: Callable[[Counting, Tensor], object], said: str) -> None:
    effects = [str(effect) for effect in watched(Counting(change), X).side_effects(())]
    assert len(effects) == 1 and said in effects[0], effects


def test_a_generator_that_forward_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy loads it when it is first named: nobody knows what its state was."""

    def load(model: Counting, x: Tensor) -> None:
        sys.modules["numpy.random"] = np.random
        np.random.random()

    monkeypatch.delitem(sys.modules, "numpy.random")
    effects = watched(Counting(load), X).side_effects(())
    told = [effect for effect in effects if "forward loads Python's numpy.random" in str(effect)]
    assert len(told) == 1 and told[0].may_settle, effects


@pytest.mark.parametrize(("change", "called"), [(write_file, "write"), (log_shape, "handle")])
def test_what_leaves_the_process(change: Callable[[Counting, Tensor], object], called: str) -> None:
    effects = watched(Counting(change), X).side_effects(())
    told = [effect for effect in effects if f"{called}(), which a replaced run" in str(effect)]
    assert len(told) == 1, effects
    line = change.__code__.co_firstlineno + 1
    assert told[0].location is not None and told[0].location.line == line


def test_a_large_array_is_refused() -> None:
    model = Counting(lambda model, x: TABLE[0])
    (effect,) = watched(model, X).side_effects(())
    assert "TABLE in tests.recording.test_guard_effects is a numpy array of 1.5 MB" in str(effect)
    assert effect.remedy


class Trainer:
    """What a training framework hangs on a module: large, cyclic, changing."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.step = model, 0
        self.samples = [{"index": i, "self": self} for i in range(1000)]


def test_what_forward_does_not_name_is_left_alone() -> None:
    model = Counting(lambda model, x: None)
    model.trainer = Trainer(model)  # type: ignore[assignment]
    guard = guarded(model, X)
    assert len(guard.source) < 20_000
    model.trainer.step += 1  # type: ignore[operator, union-attr]
    assert matched(guard, X)


def count_collections(phase: str, info: object) -> None:
    global COLLECTIONS
    COLLECTIONS += 1


def test_the_garbage_collector_is_none_of_forward() -> None:
    before = COLLECTIONS
    gc.callbacks.append(count_collections)
    try:
        seen = watched(Counting(lambda model, x: gc.collect()), X)
    finally:
        gc.callbacks.remove(count_collections)
    assert before < COLLECTIONS
    assert not seen.side_effects(())


def test_watching_warns_about_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded(Counting(lambda model, x: Config), X)
