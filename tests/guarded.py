"""Models whose Python state hides in every place that a guard must look into."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.recording.guard import CompiledGuard, Seen, watch
from tests import guarded_settings

THRESHOLD = 1.0
SCALES: Any = {"in": 1.0, "out": [0.5, 0.25]}


def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Seen:
    """Run ``model`` once without gradients and return what was seen."""
    with torch.no_grad(), watch(model, args, kwargs) as seen:
        model(*args, **kwargs)
    return seen


def guarded(model: nn.Module, *args: Any, **kwargs: Any) -> CompiledGuard:
    """The guard of one run; it must match the very call that it was made from."""
    seen = watched(model, *args, **kwargs)
    effects = [str(effect) for effect in seen.side_effects(())]
    assert effects == [], effects
    guard = seen.guard()
    assert explained(guard, *args, **kwargs) == ""
    assert matched(guard, *args, **kwargs)
    return guard


def matched(guard: CompiledGuard, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        return guard.matches(args, kwargs)


def explained(guard: CompiledGuard, *args: Any, **kwargs: Any) -> str:
    with torch.no_grad():
        return guard.explain(args, kwargs)


class Spike(torch.autograd.Function):
    """A surrogate with a slope that only the backward uses, kept on the class."""

    slope = 25.0

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.slope = Spike.slope
        return (v > 0).to(v.dtype)


def make_surrogate(offset: float) -> Callable[[Tensor], Tensor]:
    def surrogate(v: Tensor) -> Tensor:
        return Spike.apply(v - offset)  # type: ignore

    return surrogate


class Reset(Enum):
    ZERO = 0
    SUBTRACT = 1


@dataclasses.dataclass
class Config:
    decay: float = 0.9
    reset: Reset = Reset.SUBTRACT
    name: str = "lif"  # nobody reads it


class Slotted:
    __slots__ = ("gain", "unset")
    unset: int

    def __init__(self) -> None:
        self.gain = 2.0


class Parameters(NamedTuple):
    tau: float
    v_th: float


class Lif(nn.Module):
    default_gain = 1.0

    def __init__(self, beta: float = 0.9, factor: float = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.spike = make_surrogate(0.5)
        self.combine = self.multiply if factor == 1.0 else self.add
        self.bound = functools.partial(torch.clamp, min=-9.0)
        self.transform = lambda x: x * 1.0
        self.maximum: float | None = None
        self.calls = 0

    def multiply(self, v: Tensor) -> Tensor:
        return self.beta * v * self.default_gain

    def add(self, v: Tensor) -> Tensor:
        return self.beta + v

    def forward(self, x: Tensor, v: Tensor, *, inhibit: float = 0.0) -> tuple[Tensor, Tensor]:
        v = self.combine(v) + self.bound(x) - inhibit
        if self.maximum is not None:
            v = v.clamp(max=self.maximum)
        s = self.spike(self.transform(v - THRESHOLD))  # type: ignore[no-untyped-call]
        return s, v - s * guarded_settings.neuron.reset_value


class Everything(nn.Module):
    """Two LIF layers with settings in each kind of container."""

    kind = "everything"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])
        self.cells = nn.ModuleDict({"first": Lif(), "second": Lif(0.8)})
        self.aside = [nn.Linear(3, 3)]  # not registered
        self.steps = 3
        self.config = Config()
        self.slotted = Slotted()
        self.parameters_ = Parameters(2.0, 1.0)
        self.space = SimpleNamespace(bias=0.0, dtype=torch.float32)
        self.table: Any = {"gain": [1.0, 2.0], 3: (None, True)}
        self.long = [float(i) for i in range(10_000)]
        self.lookup = {str(i): float(i) for i in range(100)}
        setattr(self.layers[0].weight, "scale", 1.0)  # noqa: B010
        self.scale = np.float32(1.0)
        self.profile = np.linspace(0.0, 1.0, 4)
        self.delays = deque([1, 2])
        self.flags = {"a", "b"}
        self.nan = float("nan")
        self.zero = 0.0
        self.one = 1
        self.unread = 5
        self.mask: Tensor | None = None

    def scalars(self) -> float:
        config, space = self.config, self.space
        parts = [config.decay, float(config.reset is Reset.ZERO), self.slotted.gain, space.bias]
        parts += [self.parameters_.tau, self.parameters_.v_th, *self.table["gain"], self.zero]
        parts += [len(self.flags), self.delays[0], float(self.scale), self.long[7], self.one]
        parts += [SCALES["out"][0], *guarded_settings.RATES, float(self.profile[1])]
        parts += [guarded_settings.nested.inner.value, 0.0 if self.nan == self.nan else 1.0]
        parts += [self.lookup["7"], self.layers.get_parameter("0.weight").scale]  # type: ignore
        return float(sum(parts))

    def forward(self, x: Tensor, options: dict[str, Any] | None = None) -> Tensor:
        offset = self.scalars()
        states = [torch.zeros(x.shape[0], 5), torch.zeros(x.shape[0], 3)]
        out = []
        for _ in range(self.steps):
            s = x.to(self.space.dtype)
            for index, (layer, name) in enumerate(zip(self.layers, self.cells, strict=True)):
                s, states[index] = self.cells[name](layer(s), states[index])
            out.append(self.aside[0](s) + offset)
        if self.mask is not None:
            out = [o * self.mask for o in out]
        gain: float = (options or {}).get("gain", 1.0)
        return torch.stack(out) * gain


class Counting(nn.Module):
    """Forward changes Python's state in the way that ``change`` says."""

    def __init__(self, change: Callable[[Counting, Tensor], object]) -> None:
        super().__init__()
        self.change = change
        self.calls = 0
        self.history: list[int] = []
        self.seen: defaultdict[str, int] = defaultdict(int)
        self.names: set[str] = set()
        self.settings = Config()
        self.slotted = Slotted()
        self.nested = {"inner": [1, 2]}
        self.batch_size = 0
        self.mem: Tensor | None = None
        self.ticks = itertools.count()
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self, x)
        return x * 2
