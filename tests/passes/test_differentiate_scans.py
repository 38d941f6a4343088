"""Which operands of a loop need gradients, found without running all of its steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.graphs.differentiate_scans import differentiate_scans
from sparsify.graphs.loops import BACKWARD, capture, find_scans
from sparsify.passes.results.join_slices import join_slices
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan
from tests.recording.test_compile_work import run_passes

STEPS = 40


class Delayed(nn.Module):
    """A weight reaches the second loop through two carries, two steps late."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        first = second = x.new_zeros(x.shape[1:])
        found = []
        for x_t in x:
            found.append(second * 1.0)
            second = 0.5 * first + x_t
            first = 0.5 * first + x_t * self.weight
        v = x.new_zeros(x.shape[1:])
        for z in torch.stack(found):
            v = 0.5 * v + z.sigmoid()
        return v


def test_a_few_steps_tell_what_needs_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Delayed(), torch.rand(STEPS, 2, 5)
    found = record(model, (x,), {}, restore=True)
    assert isinstance(found, Recording)
    graph = join_slices(run_passes(found.graph)).graph
    scans = find_scans(graph)
    assert len(scans) == 2
    runs: list[int] = []

    def forward(self: Scan, steps: int, *groups: object) -> object:
        runs.append(steps)
        return original(self, steps, *groups)  # type: ignore[arg-type]

    original = Scan.forward
    monkeypatch.setattr(Scan, "forward", forward)
    operands = found.calling.operands((x,), {})
    trained, refused = differentiate_scans(graph, operands, scans)
    assert not refused
    assert all(steps <= 4 for steps in runs)
    required = [m.required for m in trained.children() if isinstance(m, TrainedRegion)]
    assert len(required) == 2 and all(required)
    gradients = [
        torch.autograd.grad(run(*operands)[0].sum(), model.weight)[0] for run in (graph, trained)
    ]
    one, other = gradients
    # Positive terms, and each is a product of at most 40 roundings: both are off by 80 eps at most.
    assert torch.allclose(one, other, rtol=160 * torch.finfo(one.dtype).eps, atol=0)
    assert bool(one.all())


def test_the_last_loop_of_a_gradient_is_not_run_to_know_its_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Delayed(), torch.rand(STEPS, 2, 5)
    found = record(model, (x,), {}, restore=True)
    assert isinstance(found, Recording)
    graph = join_slices(run_passes(found.graph)).graph
    operands = found.calling.operands((x,), {})
    trained, _ = differentiate_scans(graph, operands, find_scans(graph))
    ran: set[int] = set()

    def forward(self: Scan, *groups: object) -> object:
        ran.add(id(self))
        return original(self, *groups)  # type: ignore[arg-type]

    original = Scan.forward
    monkeypatch.setattr(Scan, "forward", forward)
    captured = capture(trained, operands)
    scans = find_scans(trained)
    backward = [name for name in scans if BACKWARD in name]
    assert len(backward) == 2
    assert captured.calls.keys() == scans.keys()
    assert ran == {id(scan) for name, scan in scans.items() if name not in backward}
    assert captured.seconds.keys() == scans.keys() - set(backward)
    for name in backward:
        steps, carries, xs, consts = captured.calls[name]
        outputs = original(scans[name], steps, carries, xs, consts)
        assert steps == STEPS and any(bool(output.any()) for output in outputs)
