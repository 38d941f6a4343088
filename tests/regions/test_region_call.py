"""Regions that are called from a compiled graph: natively where a call is like the last one."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sparsify.choosing.seldom import EVERY
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.regions.region import Region
from sparsify.regions.region_call import MOST_BOUND, RegionCall
from sparsify.serving.engine import Engine
from tests.models.small_nets import RecurrentNet, spikes
from tests.natively import WAYS, call_in

pytestmark = [
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return call_in("native", monkeypatch)


@pytest.fixture
def model() -> RecurrentNet:
    torch.manual_seed(0)
    return RecurrentNet().eval()


@pytest.fixture
def fast(native: list[int], model: RecurrentNet) -> Any:
    found: Any = cast(Any, model).sparsify(spikes(6, 3), timing=False)
    plan = found.plan
    for site in ("inp", "rec"):
        plan = plan.pin(site, "event")
    found = cast(Any, model).sparsify(spikes(6, 3), plan=plan, timing=False)
    for _ in range(4):
        found(spikes(6, 3))
    native.clear()
    return found


def regions(fast: Any) -> int:
    return len(cast(Engine, fast.compiled).compiled.regions)


def region_calls(fast: Any) -> list[RegionCall]:
    engine = cast(Engine, fast.compiled)
    runs: list[Any] = [entry.forward for entry in engine.entries]
    called = [each for run in runs for each in vars(run.__self__).values()]
    return [each for each in called if isinstance(each, RegionCall)]


def steps_of_loops(found: list[int]) -> list[int]:
    """Of what a layer computes for all steps at once, the rows differ from size to size."""
    return [steps for steps in found if steps > 1]


def long_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of calls that are made in Python."""
    found: list[int] = []
    call = Region.call

    def counted(self: Region, steps: int, *rest: Any) -> tuple[Tensor, ...]:
        found.append(steps)
        return call(self, steps, *rest)

    monkeypatch.setattr(Region, "call", counted)
    return found


def test_calls_like_the_last_one_are_native(
    fast: Any, model: RecurrentNet, native: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = long_calls(monkeypatch)
    for rate in (0.2, 0.3, 0.4, 0.5, 0.6):
        x = spikes(6, 3, rate)
        assert torch.equal(fast(x), model(x))
    assert found == [] and len(native) == 5 * regions(fast)


def test_weights_are_looked_at_now_and_then(
    fast: Any, native: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look may find that many became zero. While frozen, nothing is looked at."""
    found, x = long_calls(monkeypatch), spikes(6, 3)
    for _ in range(4 * EVERY):
        fast(x)
    assert len(found) == 4 * regions(fast)
    fast.freeze()
    found.clear()
    for _ in range(4 * EVERY):
        fast(x)
    assert found == []


def test_other_sizes_and_back(
    fast: Any, model: RecurrentNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sizes in ((9, 3), (6, 2), (6, 2), (6, 2), (9, 3), (9, 3), (9, 3), *[(6, 3)] * 3):
        x = spikes(*sizes)
        assert torch.equal(fast(x), model(x)), sizes
    found = long_calls(monkeypatch)
    for steps in (9, 6, 9, 6):
        fast(spikes(steps, 3))
    assert steps_of_loops(found) == []
    for steps in range(1, 2 * MOST_BOUND):
        for _ in range(3):
            x = spikes(steps, 3)
            assert torch.equal(fast(x), model(x))
    assert all(len(call._bound) <= MOST_BOUND for call in region_calls(fast))


def test_freezing_and_its_end_are_seen_at_once(fast: Any, model: RecurrentNet) -> None:
    x = spikes(6, 3)
    before = fast(x)
    fast.freeze()
    assert torch.equal(fast(x), before)
    model.rec.weight.numpy()[...] *= -1.0
    assert torch.equal(fast(x), before), "promised"
    fast.freeze(False)
    assert torch.equal(fast(x), model(x))
    assert not torch.equal(model(x), before)


def test_states_in_another_order_in_memory(native: list[int]) -> None:
    """A kernel is called with a copy of them, and natively with those that lie as it reads them."""

    class Cell(RecurrentNet):
        def forward(self, x: Tensor, v: Tensor | None = None) -> Tensor:
            assert v is not None
            for x_t in x:
                v = self.beta * v + self.inp(x_t) + self.rec((v > 1.0).to(v.dtype))
            return v

    x, v = spikes(6, 3), torch.ones(3, 16)
    v[1:, ::2] = 2.0
    model = Cell().eval()
    fast: Any = cast(Any, model).sparsify(x, v, timing=False)
    assert regions(fast)
    for state in [v, v, v, *[v.t().contiguous().t()] * 5, v]:
        assert torch.equal(fast(x, state), model(x, state))
    assert native


def test_weights_that_need_gradients_are_not_taken(fast: Any, model: RecurrentNet) -> None:
    x = spikes(6, 3)
    with torch.enable_grad():
        for _ in range(4):
            result = fast(x)
            assert result.requires_grad and torch.equal(result, model(x))


def test_threads_that_call_with_sizes_of_their_own(fast: Any, model: RecurrentNet) -> None:
    inputs = [spikes(6, 3), spikes(9, 3), spikes(6, 2)]
    expected = [model(x) for x in inputs]
    wrong: list[int] = []

    def call(number: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(fast(inputs[number]), expected[number]):
                    wrong.append(number)

    workers = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("way", WAYS)
def test_results_are_the_callers_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call_in(way, monkeypatch)
    fast: Any = cast(Any, RecurrentNet().eval()).sparsify(spikes(6, 3), timing=False)
    assert cast(Engine, fast.compiled).compiled.regions
    x = spikes(6, 3)
    results = [fast(x) for _ in range(5)]
    kept = results[0].clone()
    for other in results[1:]:
        other.fill_(9.0)
    assert torch.equal(results[0], kept)
