"""What ``test_emulated_zoo`` leaves out because it takes long: run before a release.

    python -m pytest tests/release_emulated_zoo.py

Every network that trains, and every network in three orders of threads, every access checked.
"""

from __future__ import annotations

import pytest

from sparsify.codegen.emulator.device import Schedule
from tests.emulated import SCHEDULES, check_forward, check_training
from tests.test_emulated_zoo import COMPILED, TRAINED
from tests.training_nets import NETS, ZOO_NETS, TrainingNet
from tests.zoo import Entry

TRAINING = [each for each in (*NETS, *ZOO_NETS) if each.code is None]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("entry", TRAINING, ids=lambda entry: entry.name)
def test_gradients(entry: TrainingNet, schedule: Schedule) -> None:
    check_training(entry, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES[1:])
@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.name)
def test_every_network_runs(entry: Entry, schedule: Schedule) -> None:
    check_forward(entry, schedule)


def test_the_ordinary_tests_take_a_part_of_this() -> None:
    assert {*TRAINED} <= {each.name for each in TRAINING}
