"""Recordings replayed under their guards give what eager gives, whatever was changed in between."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.recording.reachable import Place, rebind, walk
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests import guarded as here
from tests.guarded import Lif
from tests.recording.test_guard import cell_of
from tests.recording.test_guard_models import Functional, Hierarchy, Tutorial, X, other, scalars

STEPS = 12


class Replay:
    """A model's recordings: the first whose guard matches runs, else one is added."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.recordings, self.replayed = model, list[Recording](), 0

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            for made in self.recordings:
                if made.guard.matches(args, {}):
                    self.replayed += 1
                    values = made.graph(*made.calling.operands(args, {}))
                    return made.calling.deliver(values, args, {})
            made_now = record(self.model, args, {})
        if isinstance(made_now, Recording):
            self.recordings.append(made_now)
        return made_now.result


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """The leaves of the result, or the type of what was raised."""
    try:
        with torch.no_grad():
            return pytree.tree_leaves(call(*args))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return type(error)


def assert_same(got: Any, expected: Any, what: str) -> None:
    if isinstance(expected, type):
        assert got is expected, what
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=what)


class Stateful(nn.Module):
    """State in a buffer and in attributes, settings everywhere."""

    trace: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.fc = Lif(), nn.Linear(4, 4)
        self.register_buffer("trace", torch.zeros(4))
        self.v: Tensor | None = None
        self.decay, self.reset_every_call = 0.5, False

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None or self.reset_every_call:
            self.v = torch.zeros_like(x[0])
        out = []
        for x_t in x:
            s, self.v = self.cell(self.fc(x_t), self.v)
            self.trace = self.trace * self.decay + s.mean(0)
            out.append(s * self.trace)
        return torch.stack(out)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("make", [Hierarchy, Functional, Tutorial, Stateful])
def test_random_changes(make: Callable[[], nn.Module], seed: int) -> None:
    torch.manual_seed(seed)
    choose = random.Random(seed)
    eager = make()
    fast = copy.deepcopy(eager)
    replay = Replay(fast)
    changed: list[tuple[Place, Place]] = []
    try:
        for step in range(STEPS):
            what = change_one(choose, eager, fast, changed)
            for _ in range(2):
                x = torch.randn(X.shape)
                assert_same(outcome(replay, x), outcome(eager, x), f"step {step}: {what}")
    finally:
        for place, _ in changed:
            rebind(place.owner, place.key, place.value)
    assert replay.replayed >= STEPS // 3, (replay.replayed, len(replay.recordings))


def change_one(
    choose: random.Random,
    eager: nn.Module,
    fast: nn.Module,
    changed: list[tuple[Place, Place]],
) -> str:
    """Change one scalar of both models in the same way, or put the last one back."""
    if changed and choose.random() < 0.5:
        for place in changed.pop():
            rebind(place.owner, place.key, place.value)
        return "undone"
    twins = {place.path: place for place in scalars(fast)}
    pair = choose.choice([(a, twins[a.path]) for a in scalars(eager) if a.path in twins])
    value = other(pair[0].value)
    for place in pair:
        rebind(place.owner, place.key, value)
    changed.append(pair)
    return pair[0].path


def test_the_listed_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beta, a surrogate's offset, a closure, a global, a hook, train and eval, grad mode."""
    model = Stateful()
    twin = copy.deepcopy(model)
    replay = Replay(model)
    cell = cell_of(twin.cell.spike, "offset")
    changes: list[Callable[[Stateful], object]] = [
        lambda m: None,
        lambda m: setattr(m.cell, "beta", 0.3),
        lambda m: setattr(cell, "cell_contents", 0.1),
        lambda m: monkeypatch.setattr(here, "THRESHOLD", 0.2),
        lambda m: m.fc.register_forward_hook(lambda module, args, result: result * 2),
        lambda m: m.eval(),
        lambda m: setattr(m, "v", None),
        lambda m: setattr(m.cell, "combine", m.cell.add),
        lambda m: setattr(m.cell, "transform", torch.negative),
        lambda m: m.fc.weight.data.mul_(2),
        lambda m: setattr(m, "fc", nn.Identity()),
        lambda m: m.double(),
    ]
    for number, change in enumerate(changes):
        change(model)
        change(twin)
        x = torch.randn(X.shape, dtype=model.trace.dtype)
        for _ in range(3):
            assert_same(outcome(replay, x), outcome(twin, x), f"change {number}")
    assert replay.replayed >= len(changes), replay.replayed


def test_grad_mode() -> None:
    model = Lif()
    with torch.no_grad():
        made = record(model, (X[0], X[1]), {})
    assert isinstance(made, Recording)
    assert not made.guard.matches((X[0], X[1]), {})
    with torch.no_grad():
        assert made.guard.matches((X[0], X[1]), {})
    assert "gradients enabled was False" in made.guard.explain((X[0], X[1]), {})


def test_places_are_found() -> None:
    """The changes above are drawn from places that matter: closures and inner objects, too."""
    paths = [place.path for place in walk([("model", Hierarchy())])]
    assert any("offset" in path for path in paths)
    assert any("theta" in path for path in paths)
