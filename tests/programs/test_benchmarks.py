"""What the benchmarks in ``examples/benchmarks`` decide by themselves; CI runs them whole."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
MIB = 2**20


@pytest.fixture(autouse=True)
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, Any]]:
    """What is measured with these arguments, by ``Size`` and options of ``measure``."""
    command_line: Any = importlib.import_module("command_line")
    compare: Any = importlib.import_module("compare")
    seen: list[dict[str, Any]] = []

    def measure(build: object, size: Any, **options: Any) -> dict[str, Any]:
        seen.append({**vars(size), **options})
        return {"steps": size.steps}

    monkeypatch.setattr(command_line, "measure", measure)
    command_line.run("A test.", None, [compare.Size(hidden=64, batch=1)], arguments)
    return seen


def test_torch_compile_takes_part_in_all_steps_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = run(monkeypatch)
    assert (only["steps"], only["compiled"], only["memory"], only["rounds"]) == (
        100,
        True,
        True,
        30,
    )
    assert not run(monkeypatch, "--no-compile")[0]["compiled"]


def test_torch_compile_takes_part_in_a_shorter_run(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = run(monkeypatch, "--compile-steps", "10", "--hidden", "8192")
    assert (long["hidden"], long["steps"], long["compiled"]) == (8192, 100, False)
    assert (short["hidden"], short["steps"], short["compiled"]) == (8192, 10, True)
    assert long["memory"] and not short["memory"]
    (only,) = run(monkeypatch, "--compile-steps", "10", "--steps", "10")
    assert only["compiled"]
    (only,) = run(monkeypatch, "--compile-steps", "10", "--no-compile")
    assert not only["compiled"]


def test_a_quick_run_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = run(monkeypatch, "--quick")
    assert (only["steps"], only["compiled"], only["rounds"]) == (20, False, 3)


def test_figures_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    run(monkeypatch, "--json", str(path), "--batch", "1", "16")
    content = json.loads(path.read_text())
    assert content["figures"] == [{"steps": 100}, {"steps": 100}]
    assert content["machine"]["torch"] == torch.__version__


def test_a_peak_is_the_one_since_the_last_reading() -> None:
    memory: Any = importlib.import_module("memory")
    if not memory.RESET.exists():
        pytest.skip("this system does not tell the peak of a process's memory")
    peak = memory.Peak()
    block = torch.ones(64 * MIB, dtype=torch.uint8)
    first = peak.read()
    del block
    assert first >= 64
    peak.read()
    assert peak.read() < first - 32  # the block is gone, whatever else the process did meanwhile


def test_memory_is_told_of_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    memory: Any = importlib.import_module("memory")
    if not memory.RESET.exists():
        pytest.skip("this system does not tell the peak of a process's memory")
    network = ("--network", "FeedForward", "--hidden", "128")
    with torch.no_grad():
        memory.main([*network, "--batch", "1", "--steps", "6"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FeedForward, 128 neurons a layer, batch 1: peak memory beyond")
    for what in ("eager", "compiling", "compiled", "of which", "stay,", "tensors of eager", "ours"):
        assert re.search(rf"{what} -?\d+(\.\d)? MiB", line), (what, line)


def test_memory_of_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    zoo_memory: Any = importlib.import_module("zoo_memory")
    name = zoo_memory.ENTRIES[0].name
    with torch.no_grad():
        zoo_memory.main(["--only", name, "--batch", "2", "--steps", "6"])
    (line,) = capsys.readouterr().out.splitlines()
    sizes = r"eager +(\d+) KiB, ours +(\d+) KiB, +[\d.]+x( a chunk +\d+ KiB)?"
    found = re.fullmatch(rf"(.+?) +{sizes}", line)
    assert found is not None and found[1] == name and int(found[2]) > 0 and int(found[3]) > 0
