"""Calling CUDA kernels: what is checked and accepted, what a launch is given, who waits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable, Source, Workload
from sparsify.codegen.cuda import kernel_text, packing
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import (
    H100,
    Grid,
    Launch,
    Limits,
    Memory,
    Word,
    prepare_words,
)
from sparsify.codegen.cuda.row_per_block import RowPerBlock
from tests.codegen import test_launch
from tests.codegen.test_launch import assert_equal
from tests.kernels.emulated_kernels import emulator, load, needs_emulator
from tests.kernels.example_kernels import lif, lif_data, lif_gradient, product, schedule

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 20, 40
ROW = "row-per-block"
Tensors = dict[str, torch.Tensor]


class Log:
    """A device that keeps what it is asked to launch."""

    name = "cuda-emulated"
    type = "cpu"

    def __init__(self, resident: int = 2, packing: Log | None = None) -> None:
        self.resident = resident
        self.launches: list[tuple[Grid, list[Word]]] = []
        self.packing = self if packing is None else packing
        self.current_stream: int | None = 0
        self.prepared = 0

    def why_unavailable(self) -> None:
        return None

    def limits(self, device: torch.device) -> Limits:
        return H100

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        return Path(source.filename)

    def load(self, path: Path, entry: str, device: torch.device, title: str = "") -> Log:
        return self if not entry.startswith("run_pack") else self.packing

    def stream(self, device: torch.device) -> int | None:
        return self.current_stream

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        self.launches.append((grid, list(words)))

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        self.prepared += 1
        return prepare_words(self, grid, words, places)

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        return self.resident


class Packing(Log):
    """What packs weights, in torch's operations."""

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        super().launch(grid, words)
        for at in range(0, len(words), packing.WORDS):
            weight, packed, total = words[at : at + 3]
            numbers = [n for n in words[at + 4 : at + packing.WORDS] if isinstance(n, int)]
            rows, columns, _, down, across, _ = numbers
            if not isinstance(weight, Memory):
                continue
            read = weight.tensor.detach().as_strided((rows, columns), (down, across))
            if isinstance(packed, Memory):
                packed.tensor.zero_()[:, :columns] = read
            if isinstance(total, Memory):
                total.tensor.copy_(read.sum() * 0)


def logged(kernel: ir.Kernel, how: str = "event", resident: int = 2) -> tuple[Log, Launchable]:
    log = Log(resident, Packing())
    backend = CudaBackend(log)
    plan = schedule(kernel, ROW, "dense" if how == "dense" else "event")
    return log, backend.load(backend.compile(kernel, plan))


@pytest.fixture(scope="module")
def launch() -> Launchable:
    kernel = lif(INPUTS, HIDDEN)
    return load(kernel, schedule(kernel, ROW))


@pytest.fixture
def tensors() -> Tensors:
    data = lif_data(lif(INPUTS, HIDDEN), STEPS, BATCH)
    return {name: torch.from_numpy(value) for name, value in data.items()}


@pytest.fixture
def wanted(launch: Launchable, tensors: Tensors) -> Tensors:
    results = launch(tensors, steps=STEPS, batch=BATCH)
    assert results["spikes"].any()
    return results


# ---- the same contract as that of C++ kernels ----

SHARED = (
    "test_a_missing_tensor_is_named",
    "test_zero_steps_empty_batches_and_negative_extents",
    "test_any_strides",
    "test_expanded_operands",
    "test_given_outputs_are_written",
    "test_changed_weights_are_seen_unless_frozen",
    "test_parameters_and_inference_tensors",
)


@needs_emulator
@pytest.mark.parametrize("name", SHARED)
def test_as_for_cpp(name: str, launch: Launchable, tensors: Tensors, wanted: Tensors) -> None:
    test = getattr(test_launch, name)
    given = {"launch": launch, "tensors": tensors, "wanted": wanted}
    test(**{key: given[key] for key in test.__annotations__ if key in given})


@needs_emulator
@pytest.mark.parametrize("name", ["x", "v0", "w_rec"])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.double(), TypeError),
        (lambda t: t[..., 1:], ValueError),
        (lambda t: t.to("meta"), ValueError),
        (lambda t: t.to_sparse(), ValueError),
        (lambda t: t.tolist(), TypeError),
        (lambda t: None, ValueError),
    ],
)
def test_what_does_not_fit_is_named(
    launch: Launchable, tensors: Tensors, name: str, change: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=repr(name)):
        launch({**tensors, name: change(tensors[name])}, steps=STEPS, batch=BATCH)


@needs_emulator
def test_threads_may_call_at_once() -> None:
    kernel = lif(INPUTS, HIDDEN)
    backend = CudaBackend(emulator("forward", checks=False))
    shared = backend.load(backend.compile(kernel, schedule(kernel, ROW)))
    sets = []
    for seed in range(4):
        data = lif_data(kernel, STEPS, BATCH, seed)
        sets.append({name: torch.from_numpy(value) for name, value in data.items()})
    alone = [shared(given, steps=STEPS, batch=BATCH) for given in sets]
    shared.reset_events()
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(shared, given, steps=STEPS, batch=BATCH) for given in sets * 5]
        for index, job in enumerate(jobs):
            assert_equal(job.result(), alone[index % 4])
    assert shared.events["drive"][1] == 20 * STEPS * BATCH * INPUTS


# ---- what a launch is given ----


def test_words_are_the_members_of_the_struct(tensors: Tensors) -> None:
    kernel = lif(INPUTS, HIDDEN)
    log, launch = logged(kernel)
    launch(tensors, steps=STEPS, batch=BATCH)
    [(_, words)] = log.launches
    plan = RowPerBlock().plan(kernel, schedule(kernel, ROW))
    assert len(words) == 2 + sum(1 + len(member.axes) for member in plan.members)
    assert words[:2] == [STEPS, BATCH]
    at = 2
    for member in plan.members:
        word = words[at]
        assert isinstance(word, Memory)
        assert word.written == (member.role in ("output", "active", "scratch"))
        if member.role in ("operand", "output"):
            lead = word.tensor.stride()[: len(member.axes)]
            assert words[at + 1 : at + 1 + len(member.axes)] == list(lead)
            assert word.name == member.of
            assert word.fresh == (member.role == "output")
        at += 1 + len(member.axes)


def test_weights_are_packed_in_padded_rows(tensors: Tensors) -> None:
    log, launch = logged(lif(INPUTS, HIDDEN))
    launch(tensors, steps=STEPS, batch=BATCH)
    memories = {w.name: w.tensor for w in log.launches[0][1] if isinstance(w, Memory)}
    assert memories["w_in"].shape == (INPUTS, 64)
    assert torch.equal(memories["w_in"][:, :HIDDEN], tensors["w_in"].t())
    assert memories["total of w_in"].isfinite()
    tensors["w_in"][3, 3] = float("nan")
    launch(tensors, steps=STEPS, batch=BATCH)
    memories = {w.name: w.tensor for w in log.launches[1][1] if isinstance(w, Memory)}
    assert not memories["total of w_in"].isfinite()
    assert memories["total of w_rec"].isfinite()


def packed_weight(log: Log) -> torch.Tensor:
    memory = log.launches[-1][1][5]
    assert isinstance(memory, Memory)
    return memory.tensor


def test_weights_that_lie_as_kernels_read_them_are_not_copied() -> None:
    kernel = product(64, 64)
    x, w = torch.zeros(1, 2, 64), torch.rand(64, 64)
    for given, same in ((w, False), (w.clone().t(), True), (w[:, :32].repeat(1, 2).t(), True)):
        log, launch = logged(kernel)
        launch({"x": x, "w": given}, steps=1, batch=2)
        assert (packed_weight(log).data_ptr() == given.data_ptr()) == same
        assert torch.equal(packed_weight(log), given.t())


def test_a_weight_that_is_elsewhere_in_every_call_is_copied_to_where_kernels_look() -> None:
    """Then a call writes a pointer less, and needs no preparation of its own."""
    log, launch = logged(product(64, 64))
    kept = []
    for _ in range(4):
        kept.append(torch.rand(64, 64).t())
        launch({"x": torch.zeros(1, 2, 64), "w": kept[-1]}, steps=1, batch=2)
        assert torch.equal(packed_weight(log), kept[-1].t())
    assert packed_weight(log).data_ptr() not in {w.data_ptr() for w in kept}
    assert log.prepared == 2


def test_calls_of_the_same_sizes_are_prepared_once(tensors: Tensors) -> None:
    """Also with other tensors, and weights; another batch or layout is prepared on its own."""
    log, launch = logged(lif(INPUTS, HIDDEN))
    for _ in range(3):
        moved = {name: tensor.clone() for name, tensor in tensors.items()}
        results = launch(moved, steps=STEPS, batch=BATCH)
    assert log.prepared == 1 and log.packing.prepared == 1
    grid, words = log.launches[-1]
    pointers = [w.tensor.data_ptr() for w in words if isinstance(w, Memory)]
    for tensor in (moved["x"], moved["v0"], *results.values()):
        assert tensor.data_ptr() in pointers
    assert words[:2] == [STEPS, BATCH] and grid == log.launches[0][0]
    half = {n: t if n.startswith("w") else t[..., :2, :] for n, t in tensors.items()}
    launch(half, steps=STEPS, batch=2)
    assert log.prepared == 2
    strided = {**tensors, "x": tensors["x"].repeat(1, 2, 1)[:, ::2]}
    launch(strided, steps=STEPS, batch=BATCH)
    x = log.launches[-1][1][2]
    assert isinstance(x, Memory) and x.tensor.data_ptr() == strided["x"].data_ptr()
    assert log.launches[-1][1][3] == strided["x"].stride(0)


def test_memory_is_not_kept_while_a_graph_is_captured(tensors: Tensors) -> None:
    log, launch = logged(lif(INPUTS, HIDDEN))
    launch(tensors, steps=STEPS, batch=BATCH)
    log.current_stream = None
    seen = set()
    for _ in range(2):
        launch(tensors, steps=STEPS, batch=BATCH, frozen=True)
        seen |= {id(w) for w in log.launches[-1][1] if isinstance(w, Memory) and "w_" in w.name}
    assert log.prepared == 1 and len(seen) == 8  # two weights and their totals, in each call
    assert len(log.packing.launches) == 3


def test_streams_have_memory_of_their_own(tensors: Tensors) -> None:
    log, launch = logged(lif(INPUTS, HIDDEN))
    places = []
    for stream in (0, 7, 0):
        log.current_stream = stream
        launch(tensors, steps=STEPS, batch=BATCH, frozen=True)
        places.append([w.tensor for w in log.launches[-1][1] if isinstance(w, Memory)][3])
    assert places[0] is places[2] and places[0] is not places[1]


def test_a_frozen_call_is_short(tensors: Tensors) -> None:
    """Counted, because times are not steady: the functions that a call enters, Python's or C's."""
    _, launch = logged(lif(INPUTS, HIDDEN))
    for _ in range(2):
        launch(tensors, steps=STEPS, batch=BATCH, frozen=True)
    prepared: list[Launch] = [lambda tensors: None]
    launch._prepared = {k: p._replace(launch=prepared[0]) for k, p in launch._prepared.items()}  # type: ignore[attr-defined]
    calls: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            calls.append(getattr(function, "__name__", frame.f_code.co_name))

    sys.setprofile(note)
    try:
        launch(tensors, steps=STEPS, batch=BATCH, frozen=True)
    finally:
        sys.setprofile(None)
    assert calls.count("empty_like") == 3  # the outputs
    assert len(calls) <= 40, calls


def test_rows_of_receivers_for_restricted_products() -> None:
    kernel = lif_gradient(40)
    log, launch = logged(kernel)
    w = torch.randn(40, 40)
    v = torch.zeros(2, 3, 40)
    launch({"v": v, "g": v, "d0": v[0], "w_rec": w}, steps=2, batch=3)
    memories = {m.name: m.tensor for m in log.launches[0][1] if isinstance(m, Memory)}
    assert torch.equal(memories["w_rec"][:, :40], w)
    assert "total of w_rec" not in memories  # they skip no sender


def test_no_more_blocks_than_run_at_once() -> None:
    """A recurrent kernel has a block for a row, another one for each step of a row."""
    recurrent, plain = lif(INPUTS, HIDDEN), product(INPUTS, HIDDEN)
    for kernel, rows in ((recurrent, 500), (plain, 4 * 500)):
        data = {
            o.name: torch.zeros(
                [
                    {"T": 4, "B": 500}.get(a, kernel.population_size(o.population or ""))
                    for a in o.axes
                ]
            )
            for o in kernel.operands
        }
        data |= {
            w.name: torch.zeros(
                kernel.population_size(w.receivers), kernel.population_size(w.senders)
            )
            for w in kernel.weights
        }
        for resident in (1, 2, 100):
            log, launch = logged(kernel, resident=resident)
            launch(data, steps=4, batch=500)
            grid = log.launches[0][0]
            assert grid.blocks == min(rows, 132 * resident)
            assert grid.threads == 64


def test_large_layers_keep_their_states_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_text, "MOST_THREADS", 32)
    kernel = lif(20, 900)
    log, launch = logged(kernel, resident=1)
    data = {n: torch.from_numpy(v) for n, v in lif_data(kernel, 1, 2).items()}
    launch(data, steps=1, batch=2)
    grid, words = log.launches[0]
    kept = words[-1]
    assert isinstance(kept, Memory)
    assert (kept.name, kept.tensor.numel(), kept.fresh) == ("v_kept", grid.blocks * 900, True)


def test_nobody_waits_for_the_device(tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """No value of a tensor reaches Python in a call: that would wait, and break graph capture."""
    _, launch = logged(lif(INPUTS, HIDDEN))
    launch(tensors, steps=STEPS, batch=BATCH)

    def waits(*args: object) -> None:
        raise AssertionError("a call waited for the device")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    for frozen in (False, True):
        launch(tensors, steps=STEPS, batch=BATCH, frozen=frozen)
    launch.reset_events()
    with pytest.raises(AssertionError, match="waited"):
        _ = launch.events


def test_tensors_on_two_devices(launch: Launchable, tensors: Tensors) -> None:
    elsewhere = {**tensors, "w_in": tensors["w_in"].to("meta")}
    with pytest.raises(
        ValueError, match=r"'w_in' is \[40, 20\] .* on meta.*expected .* on the CPU"
    ):
        launch(elsewhere, steps=STEPS, batch=BATCH)


def test_predicted_costs() -> None:
    kernel = lif(100, 200)
    activity = {"drive": 0.1, "recurrent": 0.5}
    strategy = RowPerBlock(H100)
    plan = schedule(kernel, ROW)
    cost = strategy.predict(kernel, plan, Workload(10, 300, activity))
    pairs = 0.1 * 100 * 200 + 0.5 * 200 * 200
    assert cost.event_adds == pytest.approx(3000 * pairs)
    assert (cost.parts, cost.meets, cost.weights_from) == (300, "block", "l2")
    assert cost.barriers == 2 * 10 * 1  # two in a step; all rows run side by side
    alone = product(100, 200)
    cost = strategy.predict(alone, schedule(alone, ROW), Workload(10, 3, {"y": 0.1}))
    assert cost.parts == 30  # steps run side by side, too


def test_a_device_has_more_rows_at_once_the_less_memory_a_block_takes() -> None:
    small, large = replace(H100, threads_per_multiprocessor=512), H100
    kernel = lif(100, 200)
    plan = schedule(kernel, ROW)
    activity = {"drive": 0.1, "recurrent": 0.5}
    parts = [
        RowPerBlock(limits).predict(kernel, plan, Workload(10, 9999, activity)).parts
        for limits in (small, large)
    ]
    assert parts == [2 * 132, 9 * 132]
