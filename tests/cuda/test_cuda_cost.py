"""Predictions of CUDA kernels, against figures that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.device import H100, MIB
from sparsify.codegen.cuda.predict_cost import predict_cost, predict_seconds
from sparsify.codegen.cuda.rates import H100_RATES
from sparsify.codegen.predict_cost import count_work
from tests.kernels.example_kernels import lif, product, schedule

STEPS, B, H = 100, 4, 1024
PAIRS = 2 * H * H  # of the weights of inputs and of the recurrence


def cost_of(how: str = "event", share: float = 0.05, neurons: int = H, **given: object) -> Cost:
    kernel = lif(neurons, neurons)
    options = {"rows_per_block": 1, "blocks": B, "meets": "block", "barriers_per_step": 2.0}
    return predict_cost(
        kernel,
        ir.Schedule("row-per-block", tuple((g.result, how) for g in kernel.gathers)),  # type: ignore[misc]
        Workload(STEPS, B, {g.result: share for g in kernel.gathers}),
        limits=H100,
        **{**options, **given},  # type: ignore[arg-type]
    )


def test_events_cost_their_share_of_additions_and_bytes() -> None:
    cost = cost_of()
    assert cost.event_adds == pytest.approx(STEPS * B * 0.05 * PAIRS)
    assert cost.weight_bytes == pytest.approx(4 * cost.event_adds)  # each row reads for itself
    assert (cost.dense_macs, cost.weights_from) == (0.0, "l2")
    assert cost.barriers == 2 * STEPS  # rows side by side
    assert cost_of("dense").dense_macs == STEPS * B * PAIRS


def test_a_weight_that_is_read_twice_is_there_once() -> None:
    kernel = lif(H, H)
    (phase,) = kernel.phases
    again = ir.Gather("again", "w_rec", "s", "binary")
    twice = replace(kernel, phases=(replace(phase, body=(again, *phase.body)),))
    found = [
        count_work(
            each,
            schedule(each, "row-per-block"),
            Workload(STEPS, B, {gather.result: 0.1 for gather in each.gathers}),
            groups=B,
        )
        for each in (kernel, twice)
    ]
    assert found[0].resident_bytes == found[1].resident_bytes == 4 * PAIRS
    assert found[1].weight_bytes == pytest.approx(1.5 * found[0].weight_bytes)


def test_rows_that_share_a_step_read_an_active_row_once() -> None:
    shared = cost_of(rows_per_block=B, blocks=128, meets="grid")
    touched = 1 - 0.95**B
    assert shared.weight_bytes == pytest.approx(STEPS * touched * PAIRS * 4)
    assert shared.barriers == 2 * STEPS
    assert cost_of(rows_per_block=1, blocks=128, meets="grid").barriers == 2 * STEPS * B


def test_weights_that_do_not_fit_the_cache_come_from_memory() -> None:
    assert cost_of(neurons=4096).weights_from == "hbm"  # 128 MiB
    assert cost_of(neurons=4096, weights_from="shared").weights_from == "shared"
    assert H100.l2_bytes == 50 * MIB


def test_a_row_that_streams_from_the_cache_takes_as_long_as_published() -> None:
    """Events * row bytes over 42 KB per microsecond: 5 us for each of two layers of 1024 at 5 %.

    The rest is what the first weight of each and the barriers take.
    """
    a_step = predict_seconds(cost_of(), H100) / STEPS
    assert a_step == pytest.approx(0.05 * PAIRS * 4 / 42e9, rel=0.2)


def test_a_resident_step_takes_no_less_than_its_barrier() -> None:
    cost = cost_of(rows_per_block=B, blocks=132, meets="grid", weights_from="shared")
    a_step = predict_seconds(replace(cost, barriers=float(STEPS)), H100) / STEPS
    assert H100_RATES.grid_barrier < a_step < 3e-6
    inside = replace(cost, barriers=float(STEPS), meets="cluster", parts=8)
    assert predict_seconds(inside, H100) / STEPS > H100_RATES.cluster_barrier


def test_what_runs_while_others_wait_is_not_waited_for() -> None:
    """A barrier takes 1.1 us: of 0.5 us that run meanwhile 0.6 are left, of 2 us nothing."""
    resident = cost_of(rows_per_block=B, blocks=132, meets="grid", weights_from="shared")
    cost = replace(resident, barriers=1.0, clocks=1e6)
    whole = predict_seconds(cost, H100)
    hz = H100_RATES.clock_hz
    some = predict_seconds(replace(cost, hidden_clocks=0.5e-6 * hz), H100)
    assert whole - some == pytest.approx(0.5e-6)
    all_of_it = predict_seconds(replace(cost, hidden_clocks=2e-6 * hz), H100)
    assert whole - all_of_it == pytest.approx(H100_RATES.grid_barrier)


def test_more_blocks_than_multiprocessors_are_no_faster() -> None:
    cost = cost_of(blocks=132)
    assert predict_seconds(cost, H100) == predict_seconds(replace(cost, parts=1000), H100)
    assert predict_seconds(cost, H100) < predict_seconds(replace(cost, parts=4), H100)


def test_operands_are_read_from_memory_once() -> None:
    """Inputs and spikes [T, B, N] of float32, states [B, N], the weight packed and read."""
    cost = cost_of()
    a_step, packed = B * H * 4, 2 * 4 * PAIRS
    assert cost.other_bytes - packed == pytest.approx(2 * STEPS * a_step, rel=0.05)
    floor = 1e12 / H100_RATES.hbm_bytes
    assert predict_seconds(replace(cost, other_bytes=1e12), H100) > floor


def test_what_runs_in_turns_waits_in_turns() -> None:
    """For barriers, and for the first weight of each of the two sums."""
    together = cost_of(rows_per_block=1, blocks=132, meets="grid", side_by_side=B)
    assert (together.barriers, together.waits) == (2 * STEPS, 2 * STEPS)
    one_by_one = cost_of(rows_per_block=1, blocks=132, meets="grid")
    assert (one_by_one.barriers, one_by_one.waits) == (2 * STEPS * B, 2 * STEPS * B)
    latency = predict_seconds(together, H100) - predict_seconds(replace(together, waits=0.0), H100)
    assert latency == pytest.approx(2 * STEPS * H100_RATES.l2_latency)
    resident = replace(together, weights_from="shared")
    assert predict_seconds(resident, H100) == predict_seconds(replace(resident, waits=0.0), H100)


def test_steps_of_a_product_without_states_wait_together() -> None:
    kernel = product(H, H)
    cost = predict_cost(
        kernel,
        schedule(kernel, "row-per-block"),
        Workload(STEPS, B, {g.result: 0.1 for g in kernel.gathers}),
        limits=H100,
        rows_per_block=1,
        blocks=STEPS * B // 2,
        meets="block",
        barriers_per_step=0.0,
    )
    assert cost.waits == 2


def test_nothing_to_do_takes_a_launch() -> None:
    kernel = lif(H, H)
    cost = predict_cost(
        kernel,
        schedule(kernel, "row-per-block"),
        Workload(0, 0, {g.result: 0.1 for g in kernel.gathers}),
        limits=H100,
        rows_per_block=1,
        blocks=0,
        meets="block",
        barriers_per_step=2.0,
    )
    packing = cost.other_bytes / H100_RATES.hbm_bytes
    assert predict_seconds(cost, H100) == pytest.approx(H100_RATES.launch + packing)
