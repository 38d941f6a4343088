"""What ``test_emulated_zoo`` leaves out because it takes long: run before a release.

    python -m pytest tests/release_emulated_zoo.py

Every network that trains, and every network, every access checked. A network is compiled and
verified once: in other orders of threads its kernels have to return the same bits, which is more
than bounds ask for, and finds what depends on the order in a fraction of the time.
"""

from __future__ import annotations

import pytest

from tests.cuda.test_emulated_zoo import COMPILED, TRAINED
from tests.emulated import SCHEDULES, check_forward, check_training
from tests.models.training_nets import NETS, ZOO_NETS, TrainingNet
from tests.models.zoo import Entry

TRAINING = [each for each in (*NETS, *ZOO_NETS) if each.code is None]


@pytest.mark.parametrize("entry", TRAINING, ids=lambda entry: entry.name)
def test_gradients(entry: TrainingNet) -> None:
    check_training(entry, others=SCHEDULES)


@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.name)
def test_every_network_runs(entry: Entry) -> None:
    """Other orders of threads than in ``test_emulated_zoo`` are verified."""
    check_forward(entry, "reverse", others=SCHEDULES)


def test_the_ordinary_tests_take_a_part_of_this() -> None:
    assert {*TRAINED} <= {each.name for each in TRAINING}
