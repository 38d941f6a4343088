"""The fixture ``sparsify_check`` in a project of its own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.programs.test_cli import MODEL

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
TEST = """
import pytest
import torch
from torch import nn

from sparsify.errors import MismatchError
from user_model import dense, make, trainable


def test_passes(sparsify_check):
    figures = sparsify_check(*make(), events=1)
    assert figures.events >= 1
    assert figures.thresholds > 0


def test_keywords(sparsify_check):
    model, x = make()
    assert sparsify_check(model, kwargs={"x": x}).events >= 1


def test_gradients(sparsify_check):
    figures = sparsify_check(*trainable(), gradients=True)
    assert {each.operand for each in figures.gradients} >= {"rec.weight"}


def test_emulated(sparsify_check):
    figures = sparsify_check(*make(), backend="cuda-emulated")
    assert figures.backend == "cuda-emulated"
    assert figures.events >= 1


def test_no_gradients(sparsify_check):
    sparsify_check(*make(), gradients=True)


def test_too_few(sparsify_check):
    sparsify_check(*make(), events=5)


def test_dense(sparsify_check):
    sparsify_check(*dense())


def test_caught(sparsify_check):
    with pytest.raises(MismatchError, match="nothing was compiled"):
        sparsify_check(*dense())
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytester.makepyfile(user_model=MODEL, test_project=TEST)
    return pytester


def test_the_fixture_passes_and_fails(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-p", "pytest_sparsify", "-q")
    result.assert_outcomes(passed=5, failed=3)
    result.stdout.fnmatch_lines(
        [
            "*MismatchError: gradients are to be checked, and no result of the model has any",
            "*MismatchError: too little was compiled: * of 2 sites run as events, 5 are asked for",
            "*MismatchError: nothing was compiled: 0 of 1 sites run as events, 1 are asked for",
        ]
    )
    # The failing line is the user's, not the fixture's.
    result.stdout.no_fnmatch_line("*return verify(*")


def test_the_fixture_is_documented(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("-p", "pytest_sparsify", "--fixtures", "-q")
    result.stdout.fnmatch_lines(["sparsify_check*", "*Verify a sparsified model*"])


def test_the_plugin_does_not_import_torch() -> None:
    code = "import sys, pytest_sparsify; print('torch' in sys.modules, 'sparsify' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_plugin_is_registered_under_its_own_name() -> None:
    """So that ``-p pytest_sparsify`` beside the installed entry point is no second registration."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"pytest_sparsify": "pytest_sparsify"}
