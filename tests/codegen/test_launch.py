"""Calling kernels: what is checked, what is accepted, and what several threads may do at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable, Workload
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.strategies import find_strategy
from sparsify.codegen.given_weights import gathers_ahead
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from tests.kernels.example_kernels import STRATEGIES, gate_of_bits, lif, lif_data, product, schedule

BACKEND = CppBackend()
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 20, 40

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def launch() -> Launchable:
    kernel = lif(INPUTS, HIDDEN)
    return BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "rows-per-thread")))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    data = lif_data(lif(INPUTS, HIDDEN), STEPS, BATCH)
    return {name: torch.from_numpy(value) for name, value in data.items()}


@pytest.fixture
def wanted(launch: Launchable, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    results = launch(tensors, steps=STEPS, batch=BATCH)
    assert results["spikes"].any()
    return results


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("name", ["x", "v0", "w_rec"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.double(), TypeError),
        (lambda t: t.long(), TypeError),
        (lambda t: t[..., 1:], ValueError),
        (lambda t: t[None], ValueError),
        (lambda t: t.to("meta"), ValueError),
        (lambda t: t.to_sparse(), ValueError),
        (lambda t: t.tolist(), TypeError),
        (lambda t: None, ValueError),
    ],
)
def test_what_does_not_fit_is_named(
    launch: Launchable,
    tensors: dict[str, torch.Tensor],
    name: str,
    change: Any,
    error: type[Exception],
) -> None:
    with pytest.raises(error, match=repr(name)):
        launch({**tensors, name: change(tensors[name])}, steps=STEPS, batch=BATCH)


def test_a_missing_tensor_is_named(launch: Launchable, tensors: dict[str, torch.Tensor]) -> None:
    del tensors["s0"]
    with pytest.raises(ValueError, match=r"'s0' is missing: expected \[B, 40\]"):
        launch(tensors, steps=STEPS, batch=BATCH)


def test_zero_steps_empty_batches_and_negative_extents(
    launch: Launchable, tensors: dict[str, torch.Tensor]
) -> None:
    empty = {**tensors, "x": tensors["x"][:0]}
    with pytest.raises(ValueError, match="zero steps"):
        launch(empty, steps=0, batch=BATCH)
    nobody = {n: t if n[0] == "w" else t.narrow(-2, 0, 0) for n, t in tensors.items()}
    results = launch(nobody, steps=STEPS, batch=0)
    assert results["spikes"].shape == (STEPS, 0, HIDDEN)
    assert results["last_v"].shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="-1 steps"):
        launch(tensors, steps=-1, batch=BATCH)


def test_zero_steps_of_outputs_with_time() -> None:
    kernel = product(5, 6)
    run = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "rows-per-thread")))
    given = {"x": torch.zeros(0, 2, 5), "w": torch.zeros(6, 5)}
    assert run(given, steps=0, batch=2)["out"].shape == (0, 2, 6)


def test_any_strides(
    launch: Launchable, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    batch_first = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.zeros(STEPS, BATCH, 2 * INPUTS)[..., ::2].copy_(tensors["x"])
    weight = tensors["w_rec"].t().contiguous().t()
    backwards = torch._neg_view(tensors["v0"].neg())
    for changed in ({"x": batch_first}, {"x": apart}, {"w_rec": weight}, {"v0": backwards}):
        assert_equal(launch({**tensors, **changed}, steps=STEPS, batch=BATCH), wanted)


def test_expanded_operands(launch: Launchable, tensors: dict[str, torch.Tensor]) -> None:
    row = tensors["v0"][:1].expand(BATCH, HIDDEN)
    flat = tensors["v0"][:1, :1].expand(BATCH, HIDDEN)
    for value in (row, flat):
        got = launch({**tensors, "v0": value}, steps=STEPS, batch=BATCH)
        whole = launch({**tensors, "v0": value.contiguous()}, steps=STEPS, batch=BATCH)
        assert_equal(got, whole)


def test_given_outputs_are_written(
    launch: Launchable, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    spikes = torch.full((BATCH, STEPS, HIDDEN + 8), 7.0)
    inner = spikes[:, :, :HIDDEN].transpose(0, 1)
    got = launch(tensors, steps=STEPS, batch=BATCH, outputs={"spikes": inner})
    assert got["spikes"] is inner
    assert_equal(got, wanted)
    assert (spikes[:, :, HIDDEN:] == 7.0).all()


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.empty(STEPS, BATCH, HIDDEN + 1), ValueError, "'spikes' is"),
        (torch.empty(STEPS, BATCH, HIDDEN, dtype=torch.float64), TypeError, "'spikes' is"),
        (torch.empty(STEPS, BATCH, 2 * HIDDEN)[..., ::2], ValueError, "must be contiguous"),
        (torch.empty(STEPS, 1, HIDDEN).expand(STEPS, BATCH, HIDDEN), ValueError, "overlaps"),
    ],
)
def test_given_outputs_are_checked(
    launch: Launchable,
    tensors: dict[str, torch.Tensor],
    output: torch.Tensor,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        launch(tensors, steps=STEPS, batch=BATCH, outputs={"spikes": output})


def test_changed_weights_are_seen_unless_frozen(
    launch: Launchable, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    tensors["w_in"].numpy()[...] = 0.0  # no version counter sees this
    tensors["w_rec"].numpy()[...] = 0.0
    kept = launch(tensors, steps=STEPS, batch=BATCH, frozen=True)
    assert_equal(kept, wanted)
    seen = launch(tensors, steps=STEPS, batch=BATCH)
    assert not torch.equal(seen["last_v"], wanted["last_v"])


def test_parameters_and_inference_tensors(
    launch: Launchable, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> None:
    tensors["w_in"] = torch.nn.Parameter(tensors["w_in"])
    assert_equal(launch(tensors, steps=STEPS, batch=BATCH), wanted)
    with torch.inference_mode():
        made = {name: t.clone() for name, t in tensors.items()}
    assert_equal(launch(made, steps=STEPS, batch=BATCH), wanted)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threads_may_call_at_once(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.codegen.cpp.launch.ALONE", 0)  # teams, however small the work
    kernel = lif(INPUTS, HIDDEN)
    shared = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, strategy)))
    sets = []
    for seed in range(8):
        data = lif_data(kernel, STEPS, BATCH, seed)
        sets.append({name: torch.from_numpy(value) for name, value in data.items()})
    alone = [shared(given, steps=STEPS, batch=BATCH) for given in sets]
    shared.reset_events()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(shared, given, steps=STEPS, batch=BATCH) for given in sets * 25]
        for index, job in enumerate(jobs):
            assert_equal(job.result(), alone[index % 8])
    assert shared.events["drive"][1] == 200 * STEPS * BATCH * INPUTS


def test_a_schedule_must_name_every_gather() -> None:
    kernel = lif(INPUTS, HIDDEN)
    with pytest.raises(ValueError, match="the schedule names gathers"):
        BACKEND.why_not(kernel, ir.Schedule("rows-per-thread", (("drive", "event"),)))
    with pytest.raises(ValueError, match="no strategy 'nobody'"):
        BACKEND.why_not(kernel, schedule(kernel, "nobody"))
    with pytest.raises(ValueError, match="tile 5"):
        BACKEND.why_not(kernel, schedule(kernel, "rows-per-thread", tile=5))


def test_predicted_costs() -> None:
    kernel = lif(100, 200)
    activity = {"drive": 0.1, "recurrent": 0.5}
    event, dense = (schedule(kernel, "rows-per-thread", how) for how in ("event", "dense"))
    rows = find_strategy("rows-per-thread")
    cost = rows.predict(kernel, event, Workload(10, 1, activity))
    pairs = 0.1 * 100 * 200 + 0.5 * 200 * 200
    assert cost.event_adds == pytest.approx(10 * pairs)  # floats of sums, in any order
    assert cost.weight_bytes == pytest.approx(40 * pairs)
    assert (cost.dense_macs, cost.pointwise, cost.barriers, cost.parts) == (0, 2000, 0, 1)
    cost = rows.predict(kernel, dense, Workload(10, 6, activity))
    assert (cost.dense_macs, cost.event_adds, cost.parts) == (60 * 300 * 200, 0, 6)
    assert cost.weight_bytes == 10 * 300 * 200 * 4
    cost = find_strategy("neurons-per-thread").predict(kernel, event, Workload(10, 1, activity))
    assert (cost.barriers, cost.parts) == (10, 4)
    ahead = find_strategy("inputs-ahead").predict(kernel, event, Workload(10, 1, activity))
    assert ahead.event_adds == cost.event_adds
    assert [g.event_adds for g in ahead.gathers_beside] == [pytest.approx(10 * 0.1 * 100 * 200)]
    assert [g.event_adds for g in ahead.gathers] == [pytest.approx(10 * 0.5 * 200 * 200)]
    assert (ahead.barriers, ahead.parts) == (1, 1)


def test_what_can_run_ahead() -> None:
    """Products of inputs that nothing else of the loop reads; a kernel without one is refused."""
    assert gathers_ahead(lif(70, 130), schedule(lif(70, 130), "inputs-ahead")) == {"drive"}
    kernel = gate_of_bits(70)
    refusal = BACKEND.why_not(kernel, schedule(kernel, "inputs-ahead"))
    assert refusal is not None
    assert str(refusal).startswith("[no-gain] No product of this kernel reads inputs alone.")
