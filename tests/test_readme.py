"""The README's Python blocks run, in order, in one namespace, and its commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert found, "the README shows no Python"
    # One file, so that line numbers in the output are those of a program a reader would save.
    path = tmp_path / "readme.py"
    path.write_text("\n".join(found), encoding="utf-8")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), {"__name__": "readme"})
    assert "event" in capsys.readouterr().out


def test_it_leads_with_the_two_commands() -> None:
    first = blocks("sh")[0].splitlines()
    assert first == [
        "pip install '.[demo]' && sparsify demo",
        "pip install '.[test]' && python -m pytest",
    ]


def test_commands_name_what_exists() -> None:
    """Extras are declared, scripts are files, entry points are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for block in blocks("sh"):
        for word in shlex.split(block, comments=True):
            if extra := re.fullmatch(r"\.\[(\w+)\]", word):
                assert extra[1] in project["optional-dependencies"]
            if word.startswith("examples/"):
                assert (ROOT / word.split(":")[0]).is_file(), word
    assert "sparsify" in project["scripts"]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
