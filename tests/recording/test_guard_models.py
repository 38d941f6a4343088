"""Guards on the models that people write, and no reachable scalar that they silently ignore."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparsify.recording.guard import watch
from sparsify.recording.reachable import Place, read, rebind, walk
from tests.guarded import Everything, Lif, explained, guarded, make_surrogate, matched

X = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))


class LifParameters(NamedTuple):
    """Parameters of a neuron as functional libraries pass them."""

    tau_mem_inv: float = 100.0
    v_th: Tensor = torch.as_tensor(0.3)
    v_reset: float = 0.0
    method: str = "super"
    alpha: float = 100.0


class LifState(NamedTuple):
    v: Tensor
    i: Tensor


def lif_step(x: Tensor, state: LifState, p: LifParameters, dt: float = 0.01) -> tuple[Tensor, Any]:
    v = state.v + dt * p.tau_mem_inv * (state.i - state.v)
    z = (v > p.v_th).to(v.dtype)
    return z, LifState(v * (1 - z) + p.v_reset * z, 0.8 * state.i + x)


class FunctionalCell(nn.Module):
    def __init__(self, activation: Callable[..., Any], p: LifParameters, **options: Any) -> None:
        super().__init__()
        self.activation, self.p, self.options = activation, p, options

    def forward(self, x: Tensor, state: LifState | None = None) -> tuple[Tensor, LifState]:
        state = LifState(torch.zeros_like(x), torch.zeros_like(x)) if state is None else state
        z, new = self.activation(x, state, self.p, **self.options)
        return z, new


class Functional(nn.Module):
    """A sequence of cells and layers whose states are a list of named tuples."""

    def __init__(self) -> None:
        super().__init__()
        first, second = (
            FunctionalCell(lif_step, LifParameters(v_th=torch.as_tensor(0.3)), dt=0.01)
            for _ in range(2)
        )
        self.parts = nn.Sequential(nn.Linear(4, 6), first, nn.Linear(6, 3), second)

    def forward(self, x: Tensor, states: list[LifState | None] | None = None) -> Any:
        states = states or [None] * len(self.parts)
        out = []
        for x_t in x:
            for index, part in enumerate(self.parts):
                if isinstance(part, FunctionalCell):
                    x_t, states[index] = part(x_t, states[index])
                else:
                    x_t = part(x_t)
            out.append(x_t)
        return torch.stack(out), states


def cell(model: Functional) -> Any:
    return model.parts[1]


FUNCTIONAL: dict[str, tuple[Callable[[Functional], object], str]] = {
    "parameter": (
        lambda m: setattr(cell(m), "p", cell(m).p._replace(v_reset=0.1)),
        "parts.1.p.v_reset was 0.0 and is now 0.1",
    ),
    "parameter's type": (
        lambda m: setattr(cell(m), "p", cell(m).p._replace(v_th=0.3)),
        "parts.1.p.v_th was a tensor and is now 0.3",
    ),
    "option": (
        lambda m: cell(m).options.update(dt=0.02),
        "parts.1.options['dt'] was 0.01 and is now 0.02",
    ),
    "activation": (
        lambda m: setattr(cell(m), "activation", lambda x, s, p, dt: (x, s)),
        "parts.1.activation was lif_step and is now",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_cells(name: str) -> None:
    mutate, said = FUNCTIONAL[name]
    model = Functional()
    guard = guarded(model, X)
    cell(model).p = cell(model).p._replace(v_th=torch.as_tensor(0.3))
    assert matched(guard, X), "an equal set of parameters, with another tensor"
    mutate(model)
    assert not matched(guard, X)
    assert said in explained(guard, X)


def test_states_in_the_arguments() -> None:
    model = Functional()
    with torch.no_grad():
        _, states = model(X)
        with watch(model, (X, list(states)), {}) as seen:
            model(X, list(states))
    guard = seen.guard()
    assert matched(guard, X, list(states))
    assert "argument states was a list of 4 and is now None" in explained(guard, X, None)
    states[1] = tuple(states[1])
    assert "argument states[1] was a LifState" in explained(guard, X, states)


snntorch = pytest.importorskip("snntorch", reason="snnTorch is not installed")


class Tutorial(nn.Module):
    """The network of snnTorch's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(4, 6), snntorch.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(6, 3), snntorch.Leaky(beta=0.8, threshold=0.5)

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        recorded = []
        for step in range(x.size(0)):
            spikes, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spikes, mem2 = self.lif2(self.fc2(spikes), mem2)
            recorded.append(spikes)
        return torch.stack(recorded)


def handled(model: nn.Module) -> set[tuple[int, Any]]:
    """The tensors that snnTorch's layers rebind, which a recorder writes back."""
    return {
        (id(owner), name)
        for layer in model.modules()
        for owner in (vars(layer), layer._buffers)
        for name in ("mem", "reset")
    }


SNNTORCH: dict[str, tuple[Callable[[Tutorial], object], str]] = {
    "reset": (lambda m: setattr(m.lif1, "reset_delay", False), "lif1.reset_delay was True"),
    "output": (lambda m: setattr(m.lif2, "output", True), "lif2.output was False"),
    "quantisation": (
        lambda m: setattr(m.lif1, "state_quant", torch.round),
        "lif1.state_quant was False and is now round",
    ),
    "slope": (
        lambda m: setattr(m.lif1.spike_grad.__closure__[0], "cell_contents", 5.0),
        "closure variable alpha of atan.<locals>.inner was 2.0 and is now 5.0",
    ),
    "surrogate": (
        lambda m: setattr(m.lif1, "spike_grad", snntorch.surrogate.fast_sigmoid()),
        "lif1.spike_grad was atan.<locals>.inner",
    ),
    "mechanism": (
        lambda m: setattr(m.lif1, "state_function", m.lif1._base_zero),
        "lif1.state_function was Leaky._base_sub and is now Leaky._base_zero",
    ),
}


@pytest.mark.parametrize("name", SNNTORCH)
def test_snntorch(name: str) -> None:
    mutate, said = SNNTORCH[name]
    model = Tutorial()
    with torch.no_grad():
        model(X)
        with watch(model, (X,), {}) as seen:
            model(X)
    assert seen.side_effects(handled(model)) == []
    guard = seen.guard()
    assert matched(guard, X)
    model.lif1.beta.fill_(0.5)
    assert matched(guard, X), "a buffer is an operand"
    mutate(model)
    assert not matched(guard, X)
    assert said in explained(guard, X)


@dataclasses.dataclass
class Settings:
    decays: tuple[float, ...] = (0.9, 0.8)
    theta: float = 1.0
    verbose: bool = False


class Hierarchy(nn.Module):
    """Settings inherited, computed by properties, looked up by name, chosen by strings."""

    order = "first"

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.beta_0, self.beta_1 = Settings(), 0.5, 0.75
        self.spikes = [make_surrogate(0.1), make_surrogate(0.2)]
        self.functions = {"first": self.first, "second": self.second}
        self.inner = Lif()

    @property
    def theta(self) -> float:
        return self.settings.theta * self.scale

    scale = 1.0

    def first(self, x: Tensor) -> Tensor:
        return x * self.settings.decays[0]

    def second(self, x: Tensor) -> Tensor:
        return x * self.settings.decays[1]

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        v = torch.zeros_like(x[0])
        for x_t in x:
            for index, spike in enumerate(self.spikes):
                v = getattr(self, f"beta_{index}") * v + self.functions[self.order](x_t)
                v = v - spike(v - self.theta)
            _, v = self.inner(x_t, v * power)
        return v


LAZY = """
FACTOR = 2.0
for name in list(globals()):
    getattr(__builtins__, name, None)  # would make every name count
"""


def test_a_module_that_forward_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazily_imported.py").write_text(LAZY)
    monkeypatch.syspath_prepend(tmp_path)

    class Importing(nn.Module):
        unread = 1

        def forward(self, x: Tensor) -> Tensor:
            import lazily_imported  # type: ignore[import-not-found]

            return x * lazily_imported.FACTOR  # type: ignore[no-any-return]

    model = Importing()
    guard = guarded(model, X)
    Importing.unread = 2
    monkeypatch.setattr("lazily_imported.FACTOR", 3.0)
    assert "lazily_imported.FACTOR was 2.0 and is now 3.0" in explained(guard, X)


def other(value: Any) -> Any:
    """A value of the same type that differs."""
    if value is None or isinstance(value, str):
        return "another"
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value * 1.5 + 0.25


@contextmanager
def changed(place: Place) -> Iterator[None]:
    rebind(place.owner, place.key, other(place.value))
    try:
        yield
    finally:
        rebind(place.owner, place.key, place.value)


def scalars(model: nn.Module) -> list[Place]:
    """Every scalar that can be rebound; of a long list the first few."""
    return [
        place
        for place in walk([("model", model)])
        if isinstance(place.value, (bool, int, float, str, type(None)))
        and not isinstance(place.owner, (tuple, property))
        and not (isinstance(place.owner, list) and place.key > 10)
        and not str(place.key).startswith("__")
    ]


def run(model: nn.Module, x: Tensor) -> Any:
    """The output, or that the run failed."""
    try:
        with torch.no_grad():
            return model(x)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return type(error)


@pytest.mark.parametrize("make", [Everything, Hierarchy, Functional, Tutorial])
def test_no_scalar_is_silently_ignored(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = X[0] if make is Everything else X
    run(model, x)
    with torch.no_grad(), watch(model, (x,), {}) as seen:
        expected = model(x)
    guard = seen.guard()
    places, hit = scalars(model), 0
    for place in places:
        with changed(place):
            if matched(guard, x):
                torch.testing.assert_close(run(model, x), expected, rtol=0, atol=0, msg=place.path)
            else:
                hit += 1
                assert explained(guard, x)
        assert read(place.owner, place.key) is place.value
    assert matched(guard, x), explained(guard, x)
    assert hit >= 5 and len(places) >= 10, (hit, len(places))


READ_ONLY = (tuple, property, type, MethodType, classmethod, staticmethod)


def restructured(place: Place) -> Iterator[Callable[[], object]]:
    """Ways to change what holds values; each is called, and undone by calling the next."""
    value = place.value
    if isinstance(value, list) and value:
        yield lambda: value.append(value[0])
        yield value.pop
        yield value.reverse
        yield value.reverse
    elif isinstance(value, dict) and value and place.key != "__dict__":
        first = next(iter(value))
        kept = value[first]
        yield lambda: value.pop(first)
        yield lambda: value.update({first: kept})  # now the last
        for key in [key for key in value if key != first]:
            value[key] = value.pop(key)
    elif isinstance(value, nn.Module):
        yield value.eval
        yield value.train
        handle = value.register_forward_hook(lambda module, args, result: None)
        yield lambda: None
        handle.remove()
    elif isinstance(value, FunctionType) and value.__code__.co_argcount == 1:
        yield lambda: rebind(place.owner, place.key, torch.sin)
        yield lambda: rebind(place.owner, place.key, value)
    elif type(value) is float:
        yield lambda: rebind(place.owner, place.key, torch.tensor(value))
        yield lambda: rebind(place.owner, place.key, value)


@pytest.mark.parametrize("make", [Everything, Hierarchy, Functional, Tutorial])
def test_no_structure_is_silently_ignored(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    x = X[0] if make is Everything else X
    run(model, x)
    with torch.no_grad(), watch(model, (x,), {}) as seen:
        expected = model(x)
    guard, hit = seen.guard(), 0
    for place in walk([("model", model)]):
        if isinstance(place.owner, READ_ONLY) or place.key == "_modules":
            continue
        if isinstance(place.owner, list) and place.key > 10:
            continue
        for change in restructured(place):
            change()
            if matched(guard, x):
                torch.testing.assert_close(run(model, x), expected, rtol=0, atol=0, msg=place.path)
            else:
                hit += 1
                assert explained(guard, x)
    assert hit >= 10, hit
    assert matched(guard, x), explained(guard, x)


def test_time_of_a_match(record_property: Callable[[str, object], None]) -> None:
    """Reported, not judged: a busy machine must not fail a test."""

    class Deep(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(layers)])
            self.cells = nn.ModuleList([Lif() for _ in range(layers)])

        def forward(self, x: Tensor) -> Tensor:
            for layer, cell in zip(self.layers, self.cells, strict=True):
                x, _ = cell(layer(x), torch.zeros_like(x))
            return x

    for layers in (4, 10):
        model = Deep(layers)
        guard = guarded(model, X[0])
        with torch.no_grad():
            start = time.perf_counter()
            for _ in range(1000):
                assert guard.matches((X[0],), {}), "the same tensor object is not needed"
            took_us = (time.perf_counter() - start) * 1e3
        record_property(f"match_us_of_{layers}_layers", took_us)
        print(f"{layers} layers: {took_us:.1f} µs")
