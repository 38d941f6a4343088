"""Python blocks of the README and of docs/ run, in order, in one namespace; commands exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for file, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        assert file.startswith("http") or (page.parent / file).exists(), file
        assert file or anchor in anchors, anchor
