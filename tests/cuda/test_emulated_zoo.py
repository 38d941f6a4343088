"""The zoo on the emulator: CUDA kernels of every network, compared step by step with the original.

``python -m pytest tests/release_emulated_zoo.py`` does the rest: all gradients, three orders of
threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sparsify.codegen.emulator.device import Schedule
from tests.emulated import (
    BATCH,
    SCHEDULES,
    STEPS,
    assert_same_bits,
    check_forward,
    check_training,
    emulated,
)
from tests.models import zoo_gated, zoo_recurrent, zoo_training
from tests.models.training_nets import net
from tests.models.zoo import ENTRIES, Entry

COMPILED = [entry for entry in ENTRIES if entry.code is None and entry.on_cuda]
LONG = ("nn.LSTM, pruned", "GRUCell, pruned")  # a minute each: before a release only
# One of each kind of loop: a kernel of its own for the weights' gradients, gates, two layers.
TRAINED = ("step by step", "recurrent", "LISTA", "second order", "EGRU of EvNN")
WIDE = 288  # neurons: nine warps, two blocks of 256 senders, and no multiple of a slice
WIDE_STEPS = 2
TEAMS = ("neurons-per-grid", "neurons-per-cluster")


def entry_called(name: str) -> Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (zoo_recurrent, zoo_gated, zoo_training):
        monkeypatch.setattr(module, "HIDDEN", WIDE)


@pytest.mark.parametrize(
    "entry", [e for e in COMPILED if e.name not in LONG], ids=lambda entry: entry.name
)
def test_every_network_runs(entry: Entry) -> None:
    check_forward(entry)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients(name: str) -> None:
    check_training(net(name))


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("name", ["feedback", "EGRU, two exchanges", "nn.RNN relu, two layers"])
def test_in_another_order_of_threads(name: str, schedule: Schedule) -> None:
    check_forward(entry_called(name), schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
def test_gradients_in_another_order_of_threads(schedule: Schedule) -> None:
    check_training(net("recurrent"), schedule)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("recurrent", "row-per-block"),
        ("recurrent", "neurons-per-grid"),
        ("recurrent", "neurons-per-cluster"),
        ("graded recurrent", "neurons-per-grid"),
    ],
)
def test_several_warps_and_blocks(name: str, strategy: str) -> None:
    check_forward(entry_called(name), "random", [strategy], WIDE_STEPS)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("strategy", TEAMS)
def test_gradients_of_several_warps_and_blocks(strategy: str) -> None:
    check_training(net("recurrent"), "random", [strategy], WIDE_STEPS)


def test_bits_that_depend_on_the_order_of_threads_are_found() -> None:
    """As `assert_same_bits` is to; and that no kernel ran."""
    entry = entry_called("step by step")
    fast, x = emulated(entry.model()), entry.inputs(STEPS, BATCH)

    def launch() -> Mapping[str, Tensor]:
        with torch.no_grad():
            return {"result": fast(x)[0].sum()}

    def turn() -> Mapping[str, Tensor]:
        order = fast.compiled.entries[0].backend.device.schedule
        return {"result": launch()["result"] + SCHEDULES.index(order)}

    launch()
    assert_same_bits(fast, x, launch, "forward", SCHEDULES)
    with pytest.raises(AssertionError, match="in order reverse"):
        assert_same_bits(fast, x, turn, "forward", SCHEDULES)
    with pytest.raises(AssertionError):
        assert_same_bits(fast, x, lambda: {"result": torch.ones(1)}, "forward", ["reverse"])
