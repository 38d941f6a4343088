"""Loops of which some steps run, before what is compiled of them is known."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.api import sparsify
from sparsify.choosing import choose, chooser
from sparsify.choosing.choose import Choice, Task
from sparsify.graphs import few_steps
from sparsify.graphs.few_steps import FEW, FewSteps, run_steps, with_few_steps
from sparsify.graphs.loops import BACKWARD, capture
from sparsify.scans.scan import Scan
from tests.models.spiking_net import INPUTS, Spiking
from tests.models.surrogates import ATan

LONG = 2 * FEW + 5


def adding_loop(reverse: bool) -> Scan:
    """A carry that adds up what it is given, and is returned at every step."""
    graph = fx.Graph()
    carry, x = graph.placeholder("carry"), graph.placeholder("x")
    total = graph.call_function(torch.ops.aten.add.Tensor, (carry, x))
    graph.output((total, total))
    return Scan(fx.GraphModule({}, graph), 1, 1, 0, reverse=reverse)


def few(loop: Scan) -> FewSteps:
    made = few_steps.few_of(loop)
    assert isinstance(made, FewSteps)
    return made


@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_steps_that_run_stand_at_both_ends_of_time(reverse: bool) -> None:
    loop = adding_loop(reverse)
    carries, xs = [torch.zeros(3)], [torch.arange(3.0 * LONG).view(LONG, 3)]
    _, whole = loop(LONG, carries, xs, [])
    _, y = few(loop)(LONG, carries, xs, [])
    ran = whole[-FEW:] if reverse else whole[:FEW]
    assert y.shape == whole.shape and ran.any()
    assert torch.equal(y[:FEW], ran) and torch.equal(y[-FEW:], ran)
    assert not y[FEW:-FEW].any()


def test_all_steps_run_of_a_loop_that_is_not_much_longer() -> None:
    loop = adding_loop(reverse=False)
    steps = 2 * FEW - 1
    carries, xs = [torch.zeros(3)], [torch.ones(steps, 3)]
    assert run_steps(steps) == steps and run_steps(steps + 1) == FEW
    assert all(map(torch.equal, few(loop)(steps, carries, xs, []), loop(steps, carries, xs, [])))


def test_what_few_steps_take_is_without_what_stands_for_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that is a second ahead at the second look, and two more at the third."""
    graph = fx.Graph()
    carry, xs = graph.placeholder("carry"), graph.placeholder("xs")
    graph.output(graph.call_module("loop", (LONG, (carry,), (xs,), ())))
    whole = fx.GraphModule({"loop": adding_loop(reverse=False)}, graph)
    clock = itertools.accumulate(itertools.count())
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    captured = capture(with_few_steps(whole), [torch.zeros(3), torch.ones(LONG, 3)])
    assert captured.seconds == {"loop": 2.0}


def test_loops_are_decided_on_what_all_steps_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward on the states of the model, and their gradients on what the forward kernel saved."""
    given: dict[str, tuple[int, list[Tensor]]] = {}
    original = choose.choose_region

    def watched(task: Task, *rest: Any) -> Choice:
        steps, _, xs, _ = task.operands
        given[task.name] = steps, xs
        return original(task, *rest)

    monkeypatch.setattr(chooser, "choose_region", watched)
    torch.manual_seed(0)
    model = Spiking(lambda v: ATan.apply(v, 2.0))  # type: ignore[no-untyped-call]
    x = (torch.rand(LONG, 4, INPUTS) < 0.3).float() * 4
    fast: Any = sparsify(model, x)
    assert fast.compiled.kernels and any(BACKWARD in name for name in given)
    for steps, xs in given.values():
        assert steps == LONG
        # Of few steps there would be nothing in the middle.
        assert all(bool(part[FEW : FEW + 5].any()) for part in xs)


class Dropped(nn.Module):
    """A dropout before the loop, which runs whenever the loop's operands are made."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Spiking(lambda v: ATan.apply(v, 2.0))  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Any:
        return self.net(nn.functional.dropout(x, 0.5))


def test_compiling_draws_no_random_numbers() -> None:
    x = (torch.rand(LONG, 4, INPUTS) < 0.3).float() * 4
    model = Dropped()
    before = torch.get_rng_state()
    fast: Any = sparsify(model, x)
    assert fast.compiled.kernels
    assert torch.equal(torch.get_rng_state(), before)
