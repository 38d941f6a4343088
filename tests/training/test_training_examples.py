"""What the examples in ``examples/training`` decide by themselves; CI runs them whole."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "examples" / "training"
SETTINGS = {"hidden": 4}


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def run_with(*losses: float) -> Any:
    loop: Any = importlib.import_module("training_loop")
    return loop.Run("net", 0, tuple(loop.Point(9.0, 1.0, loss, loss, 0.1) for loss in losses))


def test_updates_to_a_loss_are_counted_between_evaluations() -> None:
    pace: Any = importlib.import_module("pace")
    run = run_with(4.0, 3.0, 1.0, 2.0)
    assert pace.updates_to(run, 5.0, 10) == 10
    assert pace.updates_to(run, 4.0, 10) == 10
    assert pace.updates_to(run, 2.0, 10) == 25
    assert pace.updates_to(run, 1.0, 10) == 30
    assert pace.updates_to(run, 0.5, 10) == math.inf


def test_a_run_takes_its_updates_at_the_measured_pace() -> None:
    pace: Any = importlib.import_module("pace")
    run = pace.at_pace(run_with(4.0, 3.0), pace.Pace(5.0, 0.5, 0.4, 0.6), 10)
    assert [point.seconds for point in run.points] == [10.0, 15.0]
    table = pace.compare_times([run], {"net": pace.Pace(5.0, 0.5, 0.4, 0.6)}, 10)
    assert table.splitlines()[0].startswith("training to a held-out loss of 3.000 (4.328 bits)")
    assert table.splitlines()[-1].split() == ["net", "20", "[20,", "20]", "15.0"]


def test_a_finished_run_is_kept_with_its_weights(tmp_path: Path) -> None:
    kept_runs: Any = importlib.import_module("kept_runs")
    kept = kept_runs.KeptRuns(tmp_path / "runs", SETTINGS, 2)
    run, layer = run_with(4.0, 3.0), nn.Linear(2, 2)
    assert kept.find("net", 0) is None
    kept.keep(run, layer)
    assert kept.find("net", 0) == run
    assert kept.find("net", 1) is None
    again = nn.Linear(2, 2)
    kept.load_weights("net", 0, again)
    assert torch.equal(again.weight, layer.weight)


def test_a_longer_run_is_cut_and_a_shorter_one_trained_again(tmp_path: Path) -> None:
    kept_runs: Any = importlib.import_module("kept_runs")
    kept_runs.KeptRuns(tmp_path, SETTINGS, 2).keep(run_with(4.0, 3.0), nn.Linear(2, 2))
    assert kept_runs.KeptRuns(tmp_path, SETTINGS, 1).find("net", 0) == run_with(4.0)
    assert kept_runs.KeptRuns(tmp_path, SETTINGS, 3).find("net", 0) is None


def test_runs_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    kept_runs: Any = importlib.import_module("kept_runs")
    kept_runs.KeptRuns(tmp_path, SETTINGS, 1).keep(run_with(1.0), nn.Linear(2, 2))
    with pytest.raises(SystemExit, match=r"'hidden': 4}, not {'hidden': 8}: give the same options"):
        kept_runs.KeptRuns(tmp_path, {"hidden": 8}, 1).find("net", 0)
