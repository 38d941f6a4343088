from __future__ import annotations

import functools
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.recording.reachable import Place, read, rebind, walk

SCALE = torch.full((2,), 3.0)


def scaled(x: Tensor) -> Tensor:
    return x * SCALE


class Slotted:
    __slots__ = ("decay",)

    def __init__(self) -> None:
        self.decay = torch.zeros(2)


class Net(nn.Module):
    shift = torch.ones(2)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.beta = 0.9
        self.states = [torch.zeros(1), {"v": torch.ones(1)}]
        self.config = SimpleNamespace(tau=torch.full((1,), 2.0))
        self.slotted = Slotted()
        self.recent = deque([torch.zeros(3)])
        gain = torch.full((1,), 5.0)

        def surrogate(x: Tensor, slope: Tensor = torch.tensor(25.0)) -> Tensor:  # noqa: B008
            return x * gain * slope

        self.surrogate = functools.partial(surrogate)

    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.surrogate(self.fc(x)))


def places(root: object) -> dict[str, Place]:
    return {place.path: place for place in walk([("", root)])}


def tensors(root: object) -> set[str]:
    return {path for path, place in places(root).items() if isinstance(place.value, Tensor)}


def test_every_tensor_that_forward_can_read_is_found() -> None:
    found = tensors(Net())
    assert {"fc.weight", "fc.bias", "count", "states[0]", "states[1]['v']"} <= found
    assert {"config.tau", "slotted.decay", "recent[0]", "Net.shift"} <= found
    assert any(path.endswith("surrogate.gain") for path in found)
    assert any(path.endswith("surrogate.__defaults__[0]") for path in found)
    assert f"{__name__}.SCALE" in found


def test_scalars_are_found_and_places_can_be_read_and_rebound() -> None:
    net = Net()
    place = places(net)["beta"]
    assert read(place.owner, place.key) == 0.9
    rebind(place.owner, place.key, 0.5)
    assert net.beta == 0.5
    for path in ("states[0]", "states[1]['v']", "config.tau", "slotted.decay", "count"):
        found = places(net)[path]
        new = torch.full((1,), 7.0)
        rebind(found.owner, found.key, new)
        assert read(found.owner, found.key) is new
    assert net.slotted.decay.item() == 7


def test_cells_are_rebound() -> None:
    def make() -> Any:
        threshold = 1.0

        def fire(x: Tensor) -> Tensor:
            return x * threshold

        return fire

    fire = make()
    [place] = [p for p in walk([("fire", fire)]) if p.path.endswith(".threshold")]
    rebind(place.owner, place.key, 2.0)
    assert fire(torch.ones(())).item() == 2


def test_cycles_end_and_torch_is_not_entered() -> None:
    net = Net()
    net.parent = [net]  # type: ignore[assignment]
    found = places(net)
    assert len(found) < 200
    assert not any(path.startswith(("torch.", "numpy.")) for path in found)


class LazyItems(dict[str, Any]):
    """As matplotlib's settings: reading an item may change it."""

    def __getitem__(self, key: str) -> Any:
        self[key] = "read"
        return super().__getitem__(key)

    def __iter__(self) -> Any:
        return iter([*super().__iter__()])

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


def test_looking_at_items_does_not_ask_a_dictionary_to_change_them() -> None:
    lazy = LazyItems(backend="unset")
    [place] = [p for p in walk([("", SimpleNamespace(settings=lazy))]) if p.owner is lazy]
    assert place.value == dict.__getitem__(lazy, "backend") == "unset"
