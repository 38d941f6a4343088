"""Other batch sizes and lengths: two recordings make one graph for all of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.serving.engine import Engine
from tests.models.small_nets import HIDDEN, RecurrentNet, fill_dyadic, spike, spikes


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
    for steps, batch in [(9, 4), (17, 7)]:  # between those that were recorded
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


class RecordsBefore(nn.Module):
    """Returns the potentials before every step: one step of it reads no weight at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> Tensor:
        v = spiked = torch.zeros(x.size(1), HIDDEN)
        before = []
        for x_t in x:
            before.append(v)
            v = 0.5 * v * (1 - spiked) + self.net.inp(x_t) + self.net.rec(spiked)
            spiked = spike(v - 1)
        return torch.stack(before)


@pytest.mark.parametrize("order", [(1, 5, 9), (5, 1, 9), (5, 9, 1)])
def test_recordings_that_read_other_tensors_are_kept_apart(order: tuple[int, ...]) -> None:
    model = RecordsBefore().eval()
    fast = sparsify(model, timing=False, strict=True)
    with torch.no_grad():
        for steps in (*order, 7, 1):
            x = spikes(steps, 3)
            assert torch.equal(fast(x), model(x))
    general = [entry for entry in engine_of(fast).entries if entry.is_general]
    assert len(general) == 1
    assert recordings(fast) == 3


class Spikes(nn.Module):
    """Has a site to replace from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = spiked = torch.zeros(x.size(1), HIDDEN)
        spikes = []
        for x_t in x:
            v = 0.5 * v + x_t + self.rec(spiked)
            spiked = spike(v - 1)
            spikes.append(spiked)
        return torch.stack(spikes)


def test_a_first_call_of_one_step_does_not_decide_for_others() -> None:
    model = Spikes().eval()
    fill_dyadic(model)
    fast = sparsify(model, spikes(1, 3).repeat(1, 1, 2), timing=False)
    assert [site.code for site in engine_of(fast).report.sites] == ["no-event"]
    assert_equal(model, fast, 2 * spikes(9, 3).repeat(1, 1, 2))
    assert [site.decision for site in engine_of(fast).report.sites] == ["event"]


class Autonomous(nn.Module):
    """Is told by one argument how many steps it runs, and by another the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.drive = nn.Parameter(torch.full((HIDDEN,), 0.75))

    def forward(self, steps: Tensor, *, like: Tensor) -> Tensor:
        v = spiked = torch.zeros(like.shape[0], HIDDEN)
        votes = []
        for _ in range(len(steps)):
            v = 0.5 * v + self.drive + self.net.rec(spiked)
            spiked = spike(v - 1)
            votes.append(self.net.out(spiked))
        return torch.stack(votes)


def test_a_tensor_may_give_nothing_but_its_sizes() -> None:
    model = Autonomous().eval()
    fast = sparsify(model, timing=False, strict=True)
    with torch.no_grad():
        for steps, batch in [(5, 3), (18, 8), (7, 2), (5, 1), (40, 3)]:
            arguments = torch.ones(steps), torch.ones(batch)
            expected = model(arguments[0], like=arguments[1])
            assert torch.equal(fast(arguments[0], like=arguments[1]), expected)
    assert expected.count_nonzero() > 0
    assert recordings(fast) == 2


class KeptState(nn.Module):
    """Keeps its potential from call to call, and starts anew where the batch is another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None or self.v.shape[0] != x.size(1):
            self.v = torch.zeros(x.size(1), HIDDEN)
        votes = []
        for x_t in x:
            v = 0.5 * self.v + self.net.inp(x_t)
            spiked = spike(v - 1)
            self.v = v - spiked
            votes.append(self.net.out(spiked))
        return torch.stack(votes)


def test_a_state_whose_sizes_decide_whether_it_is_kept() -> None:
    model = KeptState().eval()
    fast = sparsify(copy.deepcopy(model), timing=False)
    with torch.no_grad():
        for batch in (3, 3, 5, 5, 5, 3, 3, 3, 5, 5):
            x = spikes(6, batch)
            assert torch.equal(fast(x), model(x))
    assert isinstance(fast.v, Tensor) and fast.v.count_nonzero() > 0
    assert fast.kernels


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


def test_the_report_tells_once_of_each_recording_why_it_is_apart() -> None:
    """Comparisons with all others made hundreds of lines of a few sizes."""

    class More(Branching):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out.neg() if x.size(0) > 11 else out

    fast = sparsify(More().eval(), spikes(5, 3), timing=False)
    with torch.no_grad():
        for steps in (9, 13):
            fast(spikes(steps, 3))
    assert len(engine_of(fast).entries) == 3
    assert str(engine_of(fast).report).count("sizes are compiled one by one") == 2


def test_kernels_are_compiled_once_for_all_sizes() -> None:
    model = Branching().eval()
    fast = sparsify(model, spikes(5, 3), timing=False)
    made = dict(engine_of(fast).binaries)
    assert_equal(model, fast, spikes(9, 3))
    assert engine_of(fast).binaries.keys() == made.keys()


class DecidesBySize(nn.Module):
    """Does something else with long sequences, which two long ones do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return 2 * y if x.size(0) > 6 else y


@pytest.mark.parametrize("trained", [False, True])
def test_a_size_that_decides_in_python_is_seen_at_sizes_beyond_those_recorded(
    trained: bool,
) -> None:
    model = DecidesBySize().train(trained)
    fast = sparsify(model, timing=False, strict=True)
    for steps in (9, 12, 5, 10, 4, 5, 7, 6, 20, 11):
        x = spikes(steps, 3, rate=0.7)
        with torch.set_grad_enabled(trained):
            got, expected = fast(x), model(x)
        assert torch.equal(got, expected)
        assert expected.count_nonzero() > 0
    assert any(entry.is_general for entry in engine_of(fast).entries)
    assert recordings(fast) == 4  # 9 and 12, 5 and 4
    assert engine_of(fast).confirmations == 3  # 7 and 20 are as 9 and 12, 6 is as 5 and 4


class ReadsLater(nn.Module):
    """Reads its second argument from the second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        v = spiked = torch.zeros(x.size(1), HIDDEN)
        for step, x_t in enumerate(x):
            v = 0.5 * v + self.net.inp(x_t) + self.net.rec(spiked)
            v = v + y if step else v
            spiked = spike(v - 1)
        return spiked


def test_a_size_at_which_the_last_argument_is_not_read_is_an_exception() -> None:
    model = ReadsLater().eval()
    fast = sparsify(model, timing=False)
    y = torch.full((HIDDEN,), 0.25)
    with torch.no_grad():
        for steps in (5, 9, 1, 7, 1, 12):
            x = spikes(steps, 3, rate=0.7)
            expected = model(x, y)
            assert torch.equal(fast(x, y), expected)
            assert expected.count_nonzero() > 0
    general, exception = engine_of(fast).entries
    assert general.is_general
    assert exception.is_exception
    assert recordings(fast) == 3
    assert engine_of(fast).failure is None
