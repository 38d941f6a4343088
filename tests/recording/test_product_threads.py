"""A model is recorded on as many threads as its products are worth."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.recording.calls import Call
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.thread_count import threads

SMALL, LARGE = nn.Linear(256, 256, bias=False), nn.Linear(256, 4096)
CASES: dict[str, tuple[tuple[nn.Module, ...], tuple[int, ...], list[int]]] = {
    "small": ((SMALL, nn.Tanh(), SMALL), (4, 256), [1, 1]),
    "large behind small": ((SMALL, nn.Tanh(), LARGE), (16, 256), [1, 2]),
    "small behind large": ((LARGE, nn.Linear(4096, 2)), (16, 256), [2, 1]),
    "convolutions": ((nn.Conv2d(1, 4, 3), nn.Conv2d(4, 64, 5)), (8, 1, 34, 34), [1, 2]),
}


class SmallAndBatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = SMALL

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(self.small(x)[None], x.t()[None])


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = SMALL

    def forward(self, x: Tensor) -> Tensor:
        self.small(x)
        raise ValueError("in forward")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """On how many of two threads each product of a recorded run ran."""
    found: list[int] = []
    run = Call.run

    def noted(call: Call) -> Any:
        if call.facts.activation is not None:
            found.append(torch.get_num_threads())
        return run(call)

    monkeypatch.setattr(Call, "run", noted)
    with threads(2), torch.no_grad():
        yield found
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", CASES)
def test_small_products_run_on_one_thread(name: str, ran: list[int]) -> None:
    layers, shape, expected = CASES[name]
    found = record(nn.Sequential(*layers), (torch.rand(shape),), {}, restore=True)
    assert isinstance(found, Recording)
    assert ran == expected
    assert torch.get_num_threads() == 2


def test_products_that_are_not_looked_into_run_on_all_threads(ran: list[int]) -> None:
    record(SmallAndBatched(), (torch.rand(4, 256),), {}, restore=True)
    assert ran == [1, 2]


def test_what_the_user_is_given_is_made_on_all_threads(ran: list[int]) -> None:
    record(nn.Sequential(SMALL, SMALL), (torch.rand(4, 256),), {}, restore=False)
    assert ran == [2, 2]


def test_threads_are_put_back_when_forward_fails(ran: list[int]) -> None:
    with pytest.raises(ValueError, match="in forward"):
        record(Failing(), (torch.rand(4, 256),), {}, restore=True)
    assert ran == [1]
    assert torch.get_num_threads() == 2


def test_python_threads_that_begin_meanwhile_take_what_they_would() -> None:
    found: list[int] = []

    class Starting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            return x

    wanted = torch.get_num_threads()
    with threads(wanted + 1):
        Starting()(torch.rand(4, 256))
        assert torch.get_num_threads() == wanted + 1
    Starting()(torch.rand(4, 256))
    assert found == [wanted, wanted]
