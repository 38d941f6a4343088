"""How blocks divide a layer among them, what is refused, and what a step is predicted to take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sparsify import ir
from sparsify.codegen.backend import Workload
from sparsify.codegen.cuda import find_shape as search
from sparsify.codegen.cuda.device import A100, H100, RTX5090, Limits
from sparsify.codegen.cuda.event_tiles import EventTiles
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerCluster, NeuronsPerGrid
from sparsify.codegen.cuda.predict_cost import predict_seconds
from sparsify.codegen.cuda.rates import H100_RATES
from sparsify.codegen.cuda.team_clocks import step_clocks, told_clocks
from sparsify.codegen.cuda.team_groups import Division
from sparsify.codegen.cuda.team_mail import is_mailable
from tests.kernels.example_kernels import gate_of_bits, lif, product, schedule, two_layers
from tests.kernels.gated_kernels import egru

ACTIVE = {"q_z": 0.12, "q_r": 0.12, "q_g": 0.12}
GRID, CLUSTER, TILES = NeuronsPerGrid(H100), NeuronsPerCluster(H100), EventTiles(H100)


def microseconds_per_step(
    strategy: NeuronsPerGrid | NeuronsPerCluster,
    kernel: ir.Kernel,
    batch: int,
    activity: float,
) -> float:
    """Of a long call: what happens once is not counted."""
    plan = schedule(kernel, strategy.name, "dense" if strategy is TILES else "event")
    assert strategy.why_not(kernel, plan) is None
    active = {gather.result: activity for gather in kernel.gathers}
    seconds = [
        predict_seconds(strategy.predict(kernel, plan, Workload(steps, batch, active)), H100)
        for steps in (1000, 2000)
    ]
    return (seconds[1] - seconds[0]) / 1000 * 1e6


def test_small_batches_of_what_fits_shared_memory_take_two_microseconds() -> None:
    """One barrier (1.1 us in a grid, 0.65 us in a cluster), and one latency after the other.

    These are some 0.6 us at these sizes: a load from the second cache, listing, adding 13 events,
    the neurons.
    """
    for hidden in (256, 512, 1024):
        for batch in (1, 4):
            assert 1.5 < microseconds_per_step(GRID, lif(4, hidden), batch, 0.05) < 2.0
    for batch in (1, 4):
        assert 1.0 < microseconds_per_step(CLUSTER, lif(4, 512), batch, 0.05) < 1.4
        assert 1.5 < microseconds_per_step(GRID, egru(590), batch, 0.12) < 2.05


def test_weights_of_a_gated_layer_fill_the_shared_memory_of_the_device() -> None:
    """Slices of 11 neurons: 123 blocks with 174 KiB of weights each, and sixteen rows.

    For eight of them a block is sent 1296 events and adds them to 32 sums, four lists at a time:
    each event reads all banks of shared memory once, and so do zeros that fill up 48 lists to
    multiples of four, 0.8 us. The 33rd sums are added by lanes that have a list each, 0.15 us. Then
    mail of the other eight rows arrives and is sorted in 0.7 us, while three warps compute the
    neurons. The barrier is over before the other eight have taken as long. Both halves are 3.6 us.
    docs/cuda.md says what 2.6 us would take.
    """
    kernel, plan = egru(1350), schedule(egru(1350), "neurons-per-grid")
    team, shape = GRID.team(kernel, plan), GRID.shape(kernel, plan)
    assert (shape.blocks, shape.slices, shape.rows) == (123, {"hidden": 11}, 16)
    assert shape.resident == {"r_z", "r_r", "r_g"} and shape.warps == 16
    assert team.paired_from(shape) == 6
    assert 3.4 < microseconds_per_step(GRID, kernel, 16, 0.12) < 3.8
    assert (team.neuron_warps(shape), shape.warps) == (3, 16)  # 88 neurons of a half
    wide = step_clocks(team, replace(shape, resident=frozenset()), 16, ACTIVE)
    assert step_clocks(team, shape, 16, ACTIVE) < 0.6 * wide  # one by one


def test_mail_is_shorter_than_values_and_lists() -> None:
    """Of eight rows of 1350 neurons: 123 * 160 bytes, or 43200; 1296 events, or 48 lists."""
    kernel, plan = egru(1350), schedule(egru(1350), "neurons-per-grid")
    team, shape = GRID.team(kernel, plan), GRID.shape(kernel, plan)
    (mail,) = team.mails(shape)
    assert (mail.rows, mail.words, mail.count_bytes) == (8, 2, 20)
    assert mail.room == 512  # of 8 * 256: a quarter
    told = told_clocks(team, team.usage.sources["y"], 8) / H100_RATES.clock_hz
    assert told == pytest.approx(8 * 1350 * 4 / 42e9)  # 1.0 us
    with_mail = [step_clocks(team, shape, 8, dict.fromkeys(ACTIVE, a)) for a in (0.06, 0.12, 0.24)]
    assert with_mail[0] < with_mail[1] < with_mail[2]
    # What has no room is added up row by row, of which there is no more than 18 lists at a time.
    crowded = step_clocks(team, shape, 8, dict.fromkeys(ACTIVE, 0.26))
    assert crowded > 1.5 * with_mail[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(team), "mails", lambda *_: [])
        assert step_clocks(team, shape, 8, ACTIVE) > 1.5 * with_mail[1]


@pytest.mark.parametrize(
    "kernel, strategy",
    [
        (lif(4, 1024), "neurons-per-grid"),  # binary: told as bits
        (egru(590), "neurons-per-grid"),  # 24 lists of a half: warps make them sooner
        (egru(590), "neurons-per-cluster"),
        (egru(2048), "neurons-per-grid"),  # weights are not all in shared memory
    ],
)
def test_what_is_told_without_mail(kernel: ir.Kernel, strategy: str) -> None:
    strategies = {"neurons-per-grid": GRID, "neurons-per-cluster": CLUSTER}
    plan = schedule(kernel, strategy)
    team = strategies[strategy].team(kernel, plan)
    assert team.mails(strategies[strategy].shape(kernel, plan)) == []


@pytest.mark.parametrize(
    ("neurons", "width", "is_told"),
    [(1350, 12, True), (512, 8, True), (300, 9, True), (270, 7, False), (90, 36, False)],
)
def test_slices_of_mail(neurons: int, width: int, is_told: bool) -> None:
    """A lane for each neuron of a slice, and for each slice of a block of senders."""
    assert is_mailable(neurons, width) == is_told


def test_weights_of_halves_leave_room_for_two_teams() -> None:
    """Slices are twice as wide, and half of the rows are carried by each of two teams.

    63 columns are filled up to 64: sixteen lanes read four each, two lists at a time.
    """
    kernel = egru(1350, "bfloat16")
    plan = schedule(kernel, "neurons-per-grid")
    team, shape = GRID.team(kernel, plan), GRID.shape(kernel, plan)
    assert (shape.blocks, shape.slices) == (65, {"hidden": 21})
    phase = kernel.phases[0]
    grouped = team.grouped(phase, team.usage.sources["y"], shape)
    assert grouped is not None
    division = grouped.division
    assert (division.columns, division.per, division.lanes, division.many) == (64, 4, 16, 2)
    took = microseconds_per_step(GRID, kernel, 16, 0.12)
    assert took < microseconds_per_step(GRID, egru(1350), 16, 0.12)
    # One instruction converts a weight of either kind.
    assert microseconds_per_step(GRID, egru(1350, "float16"), 16, 0.12) == took


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_slices_are_those_whose_steps_take_the_shortest(
    dtype: ir.DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first multiple of four that keeps all weights."""
    kernel = egru(1350, dtype)
    took = microseconds_per_step(GRID, kernel, 16, 0.12)
    monkeypatch.setattr(search, "_quickest", lambda _team, first, *_: first)
    search.find_shape.cache_clear()
    shape = GRID.shape(kernel, schedule(kernel, GRID.name))
    assert shape.slices["hidden"] % 4 == 0 and len(shape.resident) == 3
    assert microseconds_per_step(GRID, kernel, 16, 0.12) > 1.05 * took
    search.find_shape.cache_clear()


def test_predictions_are_those_of_the_page() -> None:
    """Of docs/cuda.md, which rounds them to two digits."""
    page = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")
    kernels = [egru(1350), egru(1350, "float16", "float32")]
    took = [microseconds_per_step(GRID, kernel, 16, 0.12) for kernel in kernels]
    took.append(microseconds_per_step(TILES, egru(1350, "float16", "float16"), 16, 0.12))
    took = [microseconds_per_step(GRID, egru(590), 4, 0.12), *took]
    rows = re.findall(r"\| 12 % \| ([0-9.]+) \|", page)
    assert rows == [f"{each:.1f}" for each in took]
    fired = {f"{microseconds_per_step(GRID, lif(4, n), 4, 0.05):.1f}" for n in (256, 512, 1024)}
    assert fired == set(re.findall(r"\| 5 % \| ([0-9.]+) \|", page))


@pytest.mark.parametrize(
    ("columns", "bytes", "per", "many", "passes"),
    [
        (4, 4, 4, 4, 1),
        (32, 4, 4, 4, 1),
        (36, 4, 4, 3, 1),
        (64, 4, 4, 2, 1),
        (68, 4, 4, 1, 1),
        (128, 4, 4, 1, 1),
        (228, 4, 4, 1, 2),
        (32, 8, 2, 2, 1),
        (64, 2, 4, 2, 1),
        (72, 2, 8, 3, 1),
        (76, 2, 4, 1, 1),
    ],
)
def test_lanes_are_divided(columns: int, bytes: int, per: int, many: int, passes: int) -> None:
    division = Division(columns, bytes)
    assert (division.per, division.many, division.passes) == (per, many, passes)
    assert division.many * division.lanes <= 32 or division.many == 1


def test_one_half_of_the_rows_waits_while_the_other_is_computed() -> None:
    """Where either half keeps all warps busy, and blocks meet once in a step."""
    kernel = lif(4, 1024)
    plan = schedule(kernel, "neurons-per-grid")
    team, shape = GRID.team(kernel, plan), GRID.shape(kernel, plan)
    assert (shape.warps, team.paired_from(shape)) == (16, 8)  # four blocks of senders a row
    cost = GRID.predict(kernel, plan, Workload(10, 64, {"drive": 0.1, "recurrent": 0.1}))
    assert cost.hidden_clocks == cost.clocks / 2 > 0
    alone = GRID.predict(kernel, plan, Workload(10, 1, {"drive": 0.1, "recurrent": 0.1}))
    assert alone.hidden_clocks == 0
    assert team.paired_from(replace(shape, rows=6)) is None
    in_cluster = schedule(lif(4, 512), "neurons-per-cluster")
    team = CLUSTER.team(lif(4, 512), in_cluster)
    assert team.paired_from(CLUSTER.shape(lif(4, 512), in_cluster)) is None
    twice = two_layers(1024, 1024)
    plan = ir.Schedule("neurons-per-grid", (("back", "event"), ("forward", "event")))
    team = GRID.team(twice, plan)
    assert len(team.all_meetings()) == 2
    assert team.paired_from(GRID.shape(twice, plan)) is None


def test_what_does_not_fit_is_read_from_memory() -> None:
    """A barrier, and 205 rows of 16 KiB: 1.2 us at 2.8 TB/s; within 1.5 of both together."""
    kernel = lif(4, 4096)
    shape = GRID.shape(kernel, schedule(kernel, "neurons-per-grid"))
    assert shape.resident == {"w_in"} and shape.blocks == 128
    took = microseconds_per_step(GRID, kernel, 1, 0.05)
    assert took < 1.5 * (1.1 + 205 * 4096 * 4 / 2.8e6)


def test_clocks_grow_with_what_a_warp_does_in_turn() -> None:
    kernel = lif(4, 1024)
    plan = schedule(kernel, "neurons-per-grid")
    team, shape = GRID.team(kernel, plan), GRID.shape(kernel, plan)
    quiet, busy = {"recurrent": 0.01, "drive": 0.0}, {"recurrent": 0.3, "drive": 0.0}
    assert shape.warps == 16
    one, four, sixteen = (step_clocks(team, shape, rows, quiet) for rows in (1, 4, 16))
    assert one < four < 3 * one < sixteen  # four blocks of senders a row, for sixteen warps
    assert step_clocks(team, shape, 1, busy) > 1.3 * one
    # Inputs are added up while the others are waited for.
    assert step_clocks(team, shape, 4, {**quiet, "drive": 1.0}) == four


@pytest.mark.parametrize("limits", [A100, H100, RTX5090], ids=lambda limits: limits.name)
@pytest.mark.parametrize("neurons", [1, 3, 33, 1000, 8192])
def test_slices_cover_the_layer(limits: Limits, neurons: int) -> None:
    kernel = two_layers(neurons, max(1, neurons // 3))
    strategy = NeuronsPerGrid(limits)
    plan = schedule(kernel, "neurons-per-grid")
    assert strategy.why_not(kernel, plan) is None
    shape = strategy.shape(kernel, plan)
    assert shape.blocks <= limits.multiprocessors
    for population, width in shape.slices.items():
        assert width % 4 == 0
        assert width * shape.blocks >= kernel.population_size(population)
    assert strategy.tile(kernel, plan) == shape.slices["one"]


def test_refusals() -> None:
    kernel = lif(70, 300)
    refusal = NeuronsPerCluster(A100).why_not(kernel, schedule(kernel, "neurons-per-cluster"))
    assert refusal is not None and refusal.code == "unsupported-layout"
    assert refusal.reason == "Clusters need compute capability 9.0; A100 has 8.0."
    assert refusal.remedy == "Choose neurons-per-grid."

    refusal = CLUSTER.why_not(kernel, schedule(kernel, "neurons-per-cluster", tile=16))
    assert refusal is not None and refusal.code == "unsupported-layout"
    assert refusal.reason == (
        "19 blocks of 16 neurons would share kernel 'recurrent_lif'; H100 runs 8 together."
    )
    larger = schedule(kernel, "neurons-per-cluster", tile=64)
    assert CLUSTER.why_not(kernel, larger) is None, "the remedy: a larger tile"

    told = gate_of_bits(70)  # a result of the first phase is what the second one adds up
    assert GRID.why_not(told, schedule(told, "neurons-per-grid")) is None
    refusal = GRID.why_not(product(300, 40), schedule(product(300, 40), "neurons-per-grid"))
    assert refusal is not None and refusal.code == "no-gain"
    assert "tell each other nothing" in refusal.reason

    huge = lif(70, 500_000)
    refusal = GRID.why_not(huge, schedule(huge, "neurons-per-grid"))
    assert refusal is not None and refusal.code == "unsupported-layout"
    assert "bytes of shared memory, H100 has 232448" in refusal.reason
