"""What the GPU benchmark does when cells fail, crash or hang, and how it finds the break-even."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify.errors import KernelFault

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


@dataclass(frozen=True)
class Cell:
    does: str


def section(*cells: str, cell_s: float = 60.0) -> Any:
    def measure(place: object, cell: Cell) -> dict[str, Any]:
        if cell.does == "faults":
            raise KernelFault("lif", ["It wrote where it must not."])
        if cell.does == "fails":
            raise AssertionError("spikes differ")
        return {"did": cell.does}

    sections: Any = importlib.import_module("gpu_sections")
    return sections.Section("test", [Cell(does) for does in cells], measure, 60.0, cell_s)


# A process that takes the arguments of a section, and then does what its cells say.
CHILD = """
import json, os, pathlib, sys, time
cells = json.loads(os.environ["CELLS"])
first = int(sys.argv[sys.argv.index("--first") + 1])
path = pathlib.Path(sys.argv[sys.argv.index("--rows") + 1])
left_out = json.loads(sys.argv[-1]) if "--left-out" in sys.argv else {}
with open(path, "a") as rows:
    for cell in cells[first:]:
        if cell == "tries":
            for name in ("eager", "ours", "theirs"):
                if name not in left_out:
                    path.with_suffix(".attempt").write_text(json.dumps([name, "it fell"]))
                    if name != "eager":
                        os._exit(9)
            cell = left_out
        if cell == "crashes":
            os._exit(9)
        if cell == "hangs":
            time.sleep(600)
        faults = cell == "faults"
        rows.write(json.dumps({"error": "a fault"} if faults else {"did": cell}) + "\\n")
        rows.flush()
        if faults:
            sys.exit(3)
"""


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *cells: str, budget_s: float = 60.0
) -> list[dict[str, Any]]:
    process: Any = importlib.import_module("gpu_process")
    monkeypatch.setenv("CELLS", json.dumps(cells))
    command = [sys.executable, "-c", CHILD]
    published: list[list[dict[str, Any]]] = []
    rows: list[dict[str, Any]] = process.run_section(
        command, section(*cells, cell_s=4.0), budget_s, tmp_path / "rows.jsonl", published.append
    )
    assert rows == ([] if not rows else published[-1])
    return rows


def test_a_section_without_trouble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, "a", "b") == [{"did": "a"}, {"did": "b"}]


def test_what_crashes_faults_or_hangs_takes_only_its_own_row_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = run(monkeypatch, tmp_path, "a", "crashes", "b", "faults", "hangs", "c", "crashes")
    assert rows == [
        {"did": "a"},
        {"does": "crashes", "error": "the process ended with status 9"},
        {"did": "b"},
        {"error": "a fault"},
        {"does": "hangs", "error": "no row within 4 s"},
        {"did": "c"},
        {"does": "crashes", "error": "the process ended with status 9"},
    ]


def test_what_ends_a_process_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the cell is measured without it, as are those that follow."""
    left_out = {"ours": "it fell", "theirs": "it fell"}
    assert run(monkeypatch, tmp_path, "a", "tries", "tries") == [
        {"did": "a"},
        {"did": left_out},
        {"did": left_out},
    ]


def test_a_section_of_which_no_cell_works_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = run(monkeypatch, tmp_path, *["crashes"] * 5)
    assert [row["does"] for row in rows] == ["crashes"] * 3


def test_time_that_is_over_ends_a_section_with_the_rows_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path, "a", "hangs", "b", budget_s=3.0) == [{"did": "a"}]


def test_cells_that_fail_are_rows_and_a_fault_ends_the_process(tmp_path: Path) -> None:
    process: Any = importlib.import_module("gpu_process")
    attempts: Any = importlib.import_module("gpu_attempts")
    rows = tmp_path / "rows.jsonl"
    place = SimpleNamespace(
        attempts=attempts.Attempts(process.attempt_of(rows), {"ours": "it fell"})
    )
    process.measure_cells(place, section("a", "fails", "b"), 1, rows)
    found = process.read(rows)
    assert found[0] == {"does": "fails", "error": "AssertionError: spikes differ"}
    assert found[1]["did"] == "b" and found[1]["took_s"] >= 0
    with pytest.raises(SystemExit) as ended:
        process.measure_cells(place, section("faults", "b"), 0, rows)
    assert ended.value.code == process.FAULT
    assert "It wrote where it must not." in process.read(rows)[-1]["error"]


def test_what_is_tried_is_told_to_who_starts_it_again(tmp_path: Path) -> None:
    module: Any = importlib.import_module("gpu_attempts")
    file = tmp_path / "attempt"
    attempts = module.Attempts(file, {"ours": "it fell"})
    assert not attempts.fail("of nobody in particular")
    attempts.begin("theirs")
    assert module.read_attempt(file) == ("theirs", "")
    assert attempts.fail("KernelFault: out of bounds")
    assert module.read_attempt(file) == ("theirs", "KernelFault: out of bounds")
    with pytest.raises(RuntimeError, match="left out, because it fell"):
        attempts.begin("ours")
    assert module.read_attempt(file) == ("", "")
    assert module.read_attempt(tmp_path / "none") == ("", "")


def row(activity: float, event: float, dense: float) -> dict[str, Any]:
    times = {"event, slow": event + 1, "event, fast": event, "dense, fast": dense, "eager": 0.5}
    return {"measured_activity": activity, "us_per_step": times}


def test_the_break_even_is_where_the_line_of_events_meets_the_dense_kernel() -> None:
    tables: Any = importlib.import_module("gpu_tables")
    rows = [row(0.01, 1.2, 5.0), row(0.05, 2.0, 5.0), row(0.1, 3.0, 5.0)]
    assert tables.break_even(rows) == pytest.approx(0.2)  # 1 + 20 * activity = 5
    assert tables.break_even([row(0.1, 9.0, 5.0), row(0.2, 10.0, 5.0)]) == 0.0
    assert tables.break_even([row(0.1, 3.0, 5.0), row(0.2, 3.0, 5.0)]) == 1.0
    assert math.isnan(tables.break_even(rows[:1]))


def test_tables_have_every_row_and_the_map() -> None:
    tables: Any = importlib.import_module("gpu_tables")
    made = [
        {
            **row(activity, 1 + 20 * activity, 5.0),
            **{"network": "lif", "hidden": 256, "batch": 1, "activity": activity},
            **{"predicted_us_per_step": {"event, fast": 1.5}, "failed": {"graphed": "no"}},
        }
        for activity in (0.01, 0.05)
    ]
    sections = {"machine": [{"launch_us": 3.0}], "lif": [*made, {"error": "failed"}]}
    text = "\n".join(tables.tables(sections))
    assert "launch_us 3" in text and "graphed FAILED: no" in text
    assert text.count("lif 256, batch 1") == 2 and "(predicted: event, fast 1.5 us)" in text
    assert "     H=256" in text and "20.0%" in text


def forward(network: str, hidden: int, batch: int, **us: float) -> dict[str, Any]:
    named: dict[str, Any] = {"network": network, "hidden": hidden, "batch": batch}
    named |= {"activity": 0.1, "measured_activity": 0.12}
    return {**named, "us_per_step": us, "predicted_us_per_step": {}, "failed": {}}


def test_what_to_look_at_is_what_failed_and_what_was_wished_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file that a run has left behind which was ended before its last section."""
    trained = forward("recurrent", 1024, 128) | {"surrogate": "atan"}
    wrong = {"predicted_us_per_step": {"event": 4.0, "dense": 2.9}, "failed": {"graphed": "no"}}
    content = {
        "cells": {"verify": 2, "lif": 1, "egru": 1, "training": 1, "torch.compile": 1},
        "sections": {
            "verify": [{"kind": "kernels", "error": "3 of 40 differ"}],
            "lif": [forward("lif", 2048, 1, event=9.0)],  # nobody has wished for more than 1024
            "egru": [{**forward("egru", 1350, 16, eager=1.0, event=2.5, dense=3.0), **wrong}],
            "training": [
                {
                    **trained,
                    "ms_per_step": {"eager": 9.0, "graphed eager": 5.0, "chosen": 2.0},
                    "mib_per_step": {"eager": 100.0, "chosen": 80.0},
                }
            ],
            "torch.compile": [{**trained, "ms_per_step": {"torch.compile": 3.0}}],
        },
    }
    path = tmp_path / "some.json"
    path.write_text(json.dumps({**content, "took_s": 9.0}))
    gpu: Any = importlib.import_module("gpu")
    gpu.main(["--show", str(path)])
    step = "training recurrent 1024 batch 128, 10% atan"
    figures, listed = capsys.readouterr().out.split("\nwhat to look at:\n")
    assert "egru 1350, batch 16" in figures
    assert listed.splitlines() == [
        "verify: 1 of 2 cells were not measured",
        "verify FAILED: kernels: 3 of 40 differ",
        "egru: egru 1350 batch 16, 10%: graphed failed: no",
        "egru 1350 batch 16, 10%: 2.50 us a step (event), wished 2.6: as wished",
        f"{step}: 1.50x over torch.compile, wished 2.0x: TOO SLOW",
        f"{step}: 0.80 of eager's memory, wished 0.5: TOO MUCH",
        "egru: egru 1350 batch 16, 10%: event took 2.50 us, predicted 4.00",
    ]


def test_a_machine_without_a_gpu_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = importlib.import_module("gpu")
    place: Any = importlib.import_module("gpu_place")
    errors: Any = importlib.import_module("sparsify.errors")
    refusal = errors.Refusal("backend-unavailable", "There is no NVIDIA driver.", "Install one.")
    monkeypatch.setattr(place.Gpu, "why_unavailable", lambda self: refusal)
    with pytest.raises(SystemExit, match=r"There is no NVIDIA driver\. Install one\.\n\(--backend"):
        gpu.main([])


def test_every_cell_of_the_issue_is_measured() -> None:
    sections: Any = importlib.import_module("gpu_sections")
    lif = {(c.hidden, c.batch, c.activity) for c in sections.LIF}
    assert len(lif) == len(sections.LIF) == 5 * 3 * 3
    assert len({(c.hidden, c.batch, c.activity) for c in sections.EGRU}) == 3 * 3 * 3
    assert sum(s.budget_s for s in sections.make_sections()) <= 8 * 60
