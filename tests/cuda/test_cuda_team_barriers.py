"""Barriers of teams: each is needed, and a block that does not come ends the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property

import numpy as np
import pytest
import torch

from sparsify import errors, ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100, KIB, Limits
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.cuda.neurons_per_block import NeuronsPerGrid
from sparsify.codegen.cuda.strategy import CudaStrategy
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.reference import Array
from tests.kernels.edited_kernels import ORDERS, Case, edited, objection
from tests.kernels.emulated_kernels import exact, four_warps, needs_emulator, run
from tests.kernels.example_kernels import (
    gradient_data,
    lif,
    lif_data,
    lif_gradient,
    schedule,
    two_layers,
)
from tests.kernels.gated_kernels import egru
from tests.without_barriers import ORDERING, Mutant, without_each_barrier

GRID, CLUSTER = "neurons-per-grid", "neurons-per-cluster"
HEADER = {GRID: "barrier.cuh", CLUSTER: "cluster.cuh"}
PATIENCE = 2000

pytestmark = needs_emulator


@pytest.fixture(autouse=True, scope="module")
def _four_warps() -> Iterator[None]:
    with four_warps():
        yield


class Impatient(CudaBackend):
    """Its blocks do not wait long for each other."""

    @cached_property
    def strategies(self) -> tuple[CudaStrategy, ...]:
        return (NeuronsPerGrid(self.limits, patience=PATIENCE),)


def small(kib: int) -> Limits:
    """Room for one team, which carries two to six rows."""
    return replace(
        H100,
        multiprocessors=12,
        blocks_per_multiprocessor=1,
        shared_per_block=kib * KIB,
        shared_per_multiprocessor=(kib + 1) * KIB,
    )


def recurrent(batch: int = 5) -> Case:
    kernel = lif(270, 270)
    return kernel, lif_data(kernel, 3, batch), 3, batch


def backwards() -> Case:
    kernel = lif_gradient(270)
    return kernel, gradient_data(kernel, 3, 5, 0.2), 3, 5


def two_exchanges() -> Case:
    kernel, rng = two_layers(300, 270), np.random.default_rng(1)
    data: dict[str, Array] = {
        "x": exact(rng, (3, 5, 300)),
        "bias": np.full(300, 0.5, "float32"),
        "h0": np.zeros((), "float32"),
        "w_back": rng.standard_normal((300, 270)).astype("float32"),
        "w_forward": rng.standard_normal((270, 300)).astype("float32"),
    }
    return kernel, data, 3, 5


def mutants(strategy: str, kernel: ir.Kernel, limits: Limits, with_headers: bool) -> list[Mutant]:
    backend = CudaBackend(EmulatedDevice(played=limits))
    source = backend.render(kernel, schedule(kernel, strategy))
    texts = {source.filename: source.text}
    if with_headers:
        known = headers_for(source)
        texts |= {name: known[name] for name in (HEADER[strategy], "exchange.cuh")}
    # What a grid leaves undone is seen by the next call alone.
    leaving = ["leave"] if strategy == CLUSTER else []
    return list(without_each_barrier(texts, [*ORDERING, "arrive", "wait", "meet", *leaving]))


@pytest.mark.parametrize(
    "strategy, case, kib, count",
    [
        (GRID, recurrent(9), 6, 10),  # six rows in two halves, and then three
        (GRID, backwards(), 5, 3),
        (CLUSTER, recurrent(), 5, 12),
        (CLUSTER, two_exchanges(), 18, 8),
    ],
    ids=lambda value: value[0].name if isinstance(value, tuple) else str(value),
)
def test_every_barrier_is_needed(strategy: str, case: Case, kib: int, count: int) -> None:
    """Of the headers, each is needed by the recurrent kernel of its strategy."""
    limits, plan = small(kib), schedule(case[0], strategy)
    assert not objection(case, plan, {}, limits)
    found = mutants(strategy, case[0], limits, case[0].name == "recurrent_lif")
    assert len(found) == count
    needless = [str(m) for m in found if not objection(case, plan, m.texts, limits)]
    assert not needless


def gates(theta: float = 0.5) -> Case:
    """Slices of 22 neurons, of which one has senders of two blocks."""
    kernel, rng = egru(260), np.random.default_rng(0)
    data = {f"p_{gate}": rng.standard_normal((2, 5, 260)).astype("float32") for gate in "zrg"}
    data |= {f"r_{gate}": rng.standard_normal((260, 260)).astype("float32") / 8 for gate in "zrg"}
    data["theta"] = np.full(260, theta, "float32")
    data["h0"] = rng.standard_normal((5, 260)).astype("float32")
    data["y0"] = data["h0"] * (data["h0"] > 1)
    return kernel, data, 2, 5


def test_groups_of_lanes_meet() -> None:
    """Before they write lists, and before they read them."""
    case, limits, plan = recurrent(9), small(100), schedule(lif(270, 270), GRID)
    source = CudaBackend(EmulatedDevice(played=limits)).render(case[0], plan)
    assert "GroupEvents<float, false, 4>" in source.text and "low, high" in source.text
    header = {"group_sums.cuh": headers_for(source)["group_sums.cuh"]}
    found = list(without_each_barrier(header, ["__syncwarp"]))
    assert len(found) == 2
    needless = [str(m) for m in found if not objection(case, plan, m.texts, limits)]
    assert not needless


MAIL = {0.5: ("room for all rows", 9), -9.0: ("room for one", 2)}


@pytest.mark.parametrize("theta", MAIL, ids=lambda theta: MAIL[theta][0])
def test_mail_is_complete(theta: float) -> None:
    """One warp sorts that of a half while others compute the neurons of the other.

    Where most neurons are active, rows are taken one by one.
    """
    case, plan = gates(theta), schedule(egru(260), GRID)
    source = CudaBackend(EmulatedDevice(played=small(96))).render(case[0], plan)
    assert "add_mail" in source.text and "low, high" in source.text
    assert "Parted<3 * SLICE_HIDDEN, 64" in source.text  # the last two columns lie apart
    assert not objection(case, plan, {}, small(96), ORDERS if theta > 0 else ORDERS[:1])
    if theta > 0:  # it is found where it has been sent to
        elsewhere = source.text.replace("is_second ? now : next", "is_second ? next : now")
        assert elsewhere != source.text
        assert objection(case, plan, {source.filename: elsewhere}, small(96))
    headers, one_by_one = headers_for(source), "mail_sums.cuh"
    texts = {name: headers[name] for name in ("mail.cuh", "mail_lists.cuh", one_by_one)}
    texts |= {source.filename: source.text}
    found = list(without_each_barrier(texts, [*ORDERING, "wait", "meet"]))
    needed = [mutant for mutant in found if (mutant.file == one_by_one) == (theta < 0)]
    assert len(needed) == MAIL[theta][1], [str(mutant) for mutant in needed]
    needless = [str(m) for m in needed if not objection(case, plan, m.texts, small(96))]
    assert not needless


def test_a_grid_leaves_its_counters_as_it_found_them() -> None:
    """They are not cleared by calls, which would be a launch of its own."""
    case, limits = recurrent(), small(5)
    source = CudaBackend(EmulatedDevice(played=limits)).render(case[0], schedule(case[0], GRID))
    text = source.text.replace("team.leave();", "")
    assert text != source.text
    for texts, is_wrong in (({}, False), ({source.filename: text}, True)):
        backend = CudaBackend(edited("forward", texts, limits))
        launch = backend.load(backend.compile(case[0], schedule(case[0], GRID)))
        run(launch, *case[1:])
        with pytest.raises(errors.KernelFault) if is_wrong else nullcontext():
            run(launch, *case[1:])


def lost(steps: int, batch: int) -> tuple[Launchable, Mapping[str, Array]]:
    """A kernel of which one block ends before its first barrier."""
    kernel = lif(70, 270)
    backend = Impatient(EmulatedDevice(played=small(8)))
    plan = schedule(kernel, GRID)
    source = backend.render(kernel, plan)
    line = "unsigned long long active[2] = {};"
    assert line in source.text
    text = source.text.replace(line, f"{line}\n  if (team.rank == 3 && call.steps > 1) return;")
    backend = Impatient(edited("forward", {source.filename: text}, small(8)))
    return backend.load(backend.compile(kernel, plan)), lif_data(kernel, steps, batch)


def test_a_block_that_does_not_come_ends_the_kernel() -> None:
    launch, data = lost(3, 2)
    with pytest.raises(errors.KernelFault) as caught:
        run(launch, data, 3, 2)
    wanted = (
        "recurrent_lif with fc.weight, rec.weight from model.py:41  s, v = self.cell(x[t], s, v)"
    )
    assert caught.value.kernel == wanted
    assert "a block did not come to a barrier" in str(caught.value)


def test_what_was_given_up_is_told_once() -> None:
    """By the next call on a GPU, which waits for nothing; the call after that runs."""
    launch, data = lost(3, 2)
    with pytest.raises(errors.KernelFault):
        run(launch, data, 3, 2)
    one = {**data, "x": data["x"][:1]}
    assert all(map(torch.isfinite, [out.sum() for out in run(launch, one, 1, 2).values()]))
    assert launch.events["drive"][1] > 0
