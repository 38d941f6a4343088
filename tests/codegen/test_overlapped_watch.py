"""Whether weights were written to is asked while the kernel runs: what it finds is acted upon."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.codegen import contents as contents_module
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.launch import CppLaunchable
from sparsify.codegen.cpp.prepared_call import Prepared
from sparsify.serving.engine import Engine
from tests.codegen.test_packed_weight import (
    CHANGED_WEIGHTS,
    Change,
    change_only_a_sign_of_zero,
    transpose_parameter,
)
from tests.kernels.example_kernels import OF_INPUTS, lif, lif_data, schedule
from tests.natively import WAYS, call_in
from tests.threads import torch_threads
from tests.watched import can_watch, count_reads

STEPS, BATCH, INPUTS, HIDDEN = 12, 2, 260, 260  # weights of 264 KiB are watched

pytestmark = pytest.mark.skipif(not can_watch(), reason="needs Linux 6.7 and no filter of calls")


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents_module, "SETTLING_S", 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    return count_reads(monkeypatch)


@pytest.fixture(params=WAYS)
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many bytes of questions went along with each run of a kernel."""
    found = call_in(request.param, monkeypatch)
    launch = Prepared.launch

    def counted(self: Prepared, pointers: list[int], questions: bytes = b"") -> bool:
        found.append(len(questions))
        return launch(self, pointers, questions)

    monkeypatch.setattr(Prepared, "launch", counted)
    yield found


def loaded(strategy: str) -> CppLaunchable:
    kernel, backend = lif(INPUTS, HIDDEN), CppBackend()
    launch = backend.load(backend.compile(kernel, schedule(kernel, strategy)))
    assert isinstance(launch, CppLaunchable)
    return launch


def data() -> dict[str, Tensor]:
    made = lif_data(lif(INPUTS, HIDDEN), STEPS, BATCH)
    return {name: torch.from_numpy(value) for name, value in made.items()}


def run(launch: CppLaunchable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return launch(tensors, steps=STEPS, batch=BATCH)


def settle(launch: CppLaunchable, tensors: dict[str, Tensor], asked: list[int]) -> None:
    for _ in range(64):
        asked.clear()
        run(launch, tensors)
        if asked == [2 * 24]:
            return
    raise AssertionError("nothing is asked while the kernel runs")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("strategy", OF_INPUTS)
@pytest.mark.parametrize("name", ["w_in", "w_rec"])
def test_a_write_is_seen_by_the_next_call(
    strategy: str, threads: int, name: str, reads: list[Tensor], asked: list[int]
) -> None:
    with torch_threads(threads):
        launch, tensors = loaded(strategy), data()
        settle(launch, tensors, asked)
        for value in (3.0, -3.0, float("inf"), 0.5):
            launch.reset_events()
            tensors[name].numpy()[7, :] = value
            wanted, anew = run(launch, tensors), loaded(strategy)
            for output, expected in run(anew, tensors).items():
                assert torch.equal(wanted[output].nan_to_num(9), expected.nan_to_num(9)), output
            assert launch.events == anew.events, "a run that was void is not counted"


def test_a_write_of_the_same_changes_nothing(reads: list[Tensor], asked: list[int]) -> None:
    launch, tensors = loaded("inputs-ahead"), data()
    settle(launch, tensors, asked)
    launch.reset_events()
    wanted, events = run(launch, tensors), launch.events
    launch.reset_events()
    tensors["w_in"].numpy()[...] = tensors["w_in"].numpy().copy()
    asked.clear()
    got = run(launch, tensors)
    assert asked == [2 * 24, 0], "the kernel ran once more"
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert launch.events == events


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(INPUTS, HIDDEN, bias=False)
        self.inp.weight.data.abs_()  # all of them fire
        self.rec = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.9 * v + self.inp(x_t) + self.rec(z)
            z = (v > 0.1).to(v.dtype)
            v = v - z * 0.1
            out.append(v)
        return torch.stack(out)


# Not those after which nothing runs, or a recording does.
CHANGES = [change for change in CHANGED_WEIGHTS[:-1] if change is not transpose_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_of_changing_a_weight_of_a_model(
    change: Change, reads: list[Tensor], asked: list[int]
) -> None:
    model, x = Net().eval(), data()["x"]
    plan = cast(Engine, sparsify(model, x, timing=False).compiled).plan
    for site in ("inp", "rec"):
        plan = plan.pin(site, "event")
    fast = sparsify(model, x, plan=plan, timing=False)
    with torch.no_grad():
        for _ in range(64):
            asked.clear()
            before = fast(x)
            if asked == [2 * 24]:
                break
        assert asked == [2 * 24], "nothing is asked while the kernel runs"
    change(model.rec)
    with torch.no_grad():
        after = fast(x)
        assert torch.equal(after, sparsify(model, x, plan=plan, timing=False)(x))
        assert before.isfinite().all() and after.isfinite().all()
        if change is not change_only_a_sign_of_zero:
            assert not torch.equal(before, after)


def test_threads_that_call_at_once(reads: list[Tensor], asked: list[int]) -> None:
    """Questions go with the calls of the thread that asks them."""
    launch, tensors = loaded("inputs-ahead"), data()
    settle(launch, tensors, asked)
    wanted = run(launch, tensors)["spikes"]
    wrong: list[int] = []

    def call() -> None:
        for _ in range(50):
            if not torch.equal(run(launch, tensors)["spikes"], wanted):
                wrong.append(1)

    workers = [threading.Thread(target=call) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
