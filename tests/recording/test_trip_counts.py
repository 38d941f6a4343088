"""How often a loop runs that reads no element of an input: other sizes must not pass for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.serving.engine import Engine
from tests.models.small_nets import HIDDEN, fill_dyadic, spike

Ways = Callable[[Tensor], Iterable[object]]


def count_up(x: Tensor) -> Iterable[object]:
    count = 0
    for _ in range(0, x.shape[0], 3):
        count += 1
    return torch.zeros(count, 1)


THIRDS: dict[str, Ways] = {
    "computed": lambda x: range(x.shape[0] // 3),
    "range": lambda x: range(0, x.shape[0], 3),
    "rows": lambda x: x[::3],
    "parts": lambda x: torch.split(x, 3),
    "list": lambda x: list(x)[::3],
    "length": lambda x: range(len(x[::3])),
    "counted": count_up,
}


class Settles(nn.Module):
    """Lets a recurrent layer settle on the first row, for as many steps as ``way`` yields."""

    def __init__(self, way: Ways) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.way = way
        fill_dyadic(self)

    def forward(self, x: Tensor) -> Tensor:
        current = self.inp(x[0])
        v = z = torch.zeros_like(current)
        for _ in self.way(x):
            v = 0.5 * v + current + self.rec(z)
            z = spike(v - 1)
            v = v - z
        return v


def served(fast: nn.Module, model: nn.Module, sizes: Iterable[tuple[int, int]]) -> Engine:
    with torch.no_grad():
        for steps, batch in sizes:
            x = torch.rand(steps, batch, HIDDEN).gt(0.5).float()
            assert torch.equal(fast(x), model(x)), (steps, batch)
    engine = fast.compiled
    assert isinstance(engine, Engine)
    return engine


@pytest.mark.parametrize("way", THIRDS)
def test_a_batch_that_happens_to_be_a_third_of_the_length_does_not_pass_for_it(way: str) -> None:
    model = Settles(THIRDS[way]).eval()
    engine = served(sparsify(model), model, [(9, 3), (15, 5), (12, 5), (15, 3)])
    assert engine.recordings > 2 and not any(e.compiled.runs_original for e in engine.entries)


@pytest.mark.parametrize("way", ["range", "rows", "parts"])
def test_batches_of_one_length_are_served_together(way: str) -> None:
    """Where the length stays what it was, so does how often the loop runs."""
    model = Settles(THIRDS[way]).eval()
    engine = served(sparsify(model), model, [(9, 3), (9, 5), (9, 4), (12, 4), (12, 5), (12, 4)])
    assert engine.recordings == 4
    assert [entry.is_general for entry in engine.entries] == [True, True]


def test_a_length_that_varies_alone_tells_how_often_a_loop_runs() -> None:
    model = Settles(lambda x: range(x.shape[0])).eval()
    engine = served(sparsify(model), model, [(9, 3), (15, 3), (12, 3), (10, 3)])
    assert engine.recordings == 2
