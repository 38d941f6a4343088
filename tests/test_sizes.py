"""Other batch sizes and lengths: two recordings make one graph for all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.engine import Engine
from tests.small_nets import RecurrentNet, spikes


def engine_of(fast: nn.Module) -> Engine:
    engine = fast.compiled
    assert isinstance(engine, Engine)
    return engine


def assert_equal(model: nn.Module, fast: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(fast(x), expected)
    assert expected.count_nonzero() > 0 or x.numel() == 0


def recordings(fast: nn.Module) -> int:
    return engine_of(fast).recordings


@pytest.mark.parametrize("explicit", [True, False])
def test_two_recordings_serve_all_sizes(explicit: bool) -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, *[spikes(5, 3)] * explicit, timing=False)
    for steps, batch in [(5, 3), (18, 8), (18, 3), (2, 8), (40, 1), (7, 7), (5, 3)]:
        assert_equal(model, fast, spikes(steps, batch))
    assert recordings(fast) == 2
    (entry,) = engine_of(fast).entries
    assert entry.is_general
    assert "one graph for all sizes" in str(engine_of(fast).stages[-1])
    assert {site.decision for site in engine_of(fast).report.sites} == {"event", "kept"}


def test_the_kernels_ran_at_every_size() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    assert_equal(model, fast, spikes(18, 8))
    for steps, batch in [(9, 2), (30, 5)]:
        for region in engine_of(fast).compiled.regions.values():
            region.launchable.reset_events()
        assert_equal(model, fast, spikes(steps, batch))
        for region in engine_of(fast).compiled.regions.values():
            assert all(total for _, total in region.launchable.events.values())


def test_a_batch_that_varies_alone_keeps_the_length_fixed() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    for batch in (8, 2, 6, 1):
        assert_equal(model, fast, spikes(5, batch))
    assert recordings(fast) == 2
    assert_equal(model, fast, spikes(9, 4))
    assert recordings(fast) == 3


def test_a_single_step_and_empty_sizes_are_right() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    assert_equal(model, fast, spikes(9, 2))
    assert_equal(model, fast, spikes(1, 4, rate=1.0))
    assert_equal(model, fast, spikes(5, 0))


def test_no_steps_raise_what_eager_raises() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            model(spikes(0, 3))
        with pytest.raises(RuntimeError) as got:
            fast(spikes(0, 3))
    assert str(got.value) == str(expected.value)


class SizeInResult(nn.Module):
    """Returns its length as an integer, which a graph for all lengths could not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.net(x), x.size(0)


def test_an_integer_in_the_result_keeps_sizes_apart() -> None:
    model = SizeInResult().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    with torch.no_grad():
        for steps in (5, 9, 7):
            assert fast(spikes(steps, 3))[1] == steps
    assert not any(entry.is_general for entry in engine_of(fast).entries)
    assert "returns other values that are no tensors" in str(engine_of(fast).report)


class Branching(nn.Module):
    """Another program for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out.relu() if x.size(0) > 6 else out


def test_sizes_that_take_other_branches_are_compiled_apart() -> None:
    model = Branching().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    for steps in (5, 9, 5, 9):
        assert_equal(model, fast, spikes(steps, 3))
    assert recordings(fast) == 2
    assert len(engine_of(fast).entries) == 2
    assert "sizes are compiled one by one" in str(engine_of(fast).report)


def test_kernels_are_compiled_once_for_all_sizes() -> None:
    model = Branching().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    made = dict(engine_of(fast).binaries)
    assert_equal(model, fast, spikes(9, 3))
    assert engine_of(fast).binaries.keys() == made.keys()
