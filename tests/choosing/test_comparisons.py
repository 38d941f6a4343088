"""A kernel is compared with the original once, whatever the sizes of later recordings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsify.choosing import choose
from sparsify.choosing.binaries import Binaries
from sparsify.choosing.candidates import find_candidates
from sparsify.choosing.choose import Task, choose_region
from sparsify.errors import Refusal
from tests.choosing.test_choose import BACKEND, predictor, task_of
from tests.models.looped_models import recurrent


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks whose kernels are compared."""
    found: list[Task] = []
    why_wrong = choose.why_wrong

    def counted(task: Task, region: Any) -> Refusal | None:
        found.append(task)
        return why_wrong(task, region)

    monkeypatch.setattr(choose, "why_wrong", counted)
    return found


def of_rows(task: Task, rows: int) -> Task:
    steps, carries, xs, consts = task.operands
    some = [c[:rows] for c in carries], [x[:, :rows].contiguous() for x in xs]
    return replace(task, operands=(steps, *some, consts))


def choose_for(task: Task, binaries: Binaries) -> None:
    found = find_candidates(predictor(0.01), {})[:1]
    choice = choose_region(task, found, binaries.load, False, binaries.comparisons)
    assert choice.region is not None


def test_a_kernel_is_compared_once_for_all_sizes(compared: list[Task]) -> None:
    binaries, task = Binaries(BACKEND), task_of(recurrent)
    for rows in (3, 2, 3):
        choose_for(of_rows(task, rows), binaries)
    assert len(compared) == 1
    choose_for(task, Binaries(BACKEND))
    assert len(compared) == 2, "another model"


def test_sizes_that_are_one_and_few_steps_are_compared_again(compared: list[Task]) -> None:
    binaries, task = Binaries(BACKEND), task_of(recurrent)
    choose_for(task, binaries)
    choose_for(of_rows(task, 1), binaries)
    assert len(compared) == 2
    _, carries, xs, consts = task.operands
    few = replace(task, operands=(1, carries, [x[:1] for x in xs], consts))
    choose_for(few, binaries)
    assert len(compared) == 3


def test_other_operations_and_layouts_are_compared_again(compared: list[Task]) -> None:
    binaries, task = Binaries(BACKEND), task_of(recurrent)
    choose_for(task, binaries)
    body = task.scan.body.graph
    times = next(node for node in body.nodes if node.target is torch.ops.aten.mul.Tensor)
    times.args = (times.args[0], 0.25)
    task.scan.body.recompile()
    refused = choose_region(
        task, find_candidates(predictor(0.01), {})[:1], binaries.load, False, binaries.comparisons
    )
    assert len(compared) == 2
    assert refused.region is None, "the kernel leaks less"
    times.args = (times.args[0], 0.5)
    task.scan.body.recompile()
    choose_for(task, binaries)
    assert len(compared) == 2
    steps, carries, xs, consts = task.operands
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in xs]
    choose_for(replace(task, operands=(steps, carries, turned, consts)), binaries)
    assert len(compared) == 3
