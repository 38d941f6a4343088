"""The device's constants: barriers, hops, launches, bytes and dense products."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_place import Place
from torch import Tensor

from sparsify.bench import measure_pairs, wait_for_devices
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Function, Grid, Memory, Word
from sparsify.codegen.cuda.headers import headers_of
from sparsify.codegen.cuda.neurons_per_block import COUNTER_WORDS

HERE = Path(__file__).parent
TAKEN = 5  # the best of so many
THREADS = 256


class Pieces:
    """The kernels of ``gpu_machine.cu`` and ``gpu_cluster.cu``, with the memory that they use."""

    def __init__(self, place: Place, floats: int, cluster: int) -> None:
        self.place, self.cluster = place, cluster
        self.blocks = place.limits.multiprocessors if place.is_gpu else 4
        with place.device:
            self.values = torch.zeros(floats)
            self.counters = torch.zeros(COUNTER_WORDS, dtype=torch.int32)
            self.fault = torch.zeros(1, dtype=torch.int64)
        self._paths = {
            file: place.kernels.compile(
                Source(f"#define {name} {value}\n{(HERE / file).read_text()}", file, entry),
                headers_of(header),
            )
            for file, header, name, value, entry in (
                ("gpu_machine.cu", "barrier.cuh", "GRID", self.blocks, "run_machine"),
                ("gpu_cluster.cu", "cluster.cuh", "CLUSTER", cluster, "run_cluster"),
            )
            if value > 1
        }

    def seconds(self, entry: str, grid: Grid, repeats: int) -> float:
        """Of one of ``repeats``: the difference to twice as many, so without the launch."""
        once, twice = (self.launch(entry, grid, n) for n in (repeats, 2 * repeats))
        return max(twice - once, 0.0) / repeats

    def launch(self, entry: str, grid: Grid, repeats: int) -> float:
        """Of one launch that is waited for: the best of some."""
        function, words = self._prepare(entry, repeats)

        def run() -> None:
            self.counters.zero_()
            function.launch(grid, words)

        return best_seconds(run)

    def queued_launch(self, launches: int) -> float:
        """Of one launch of many that follow each other."""
        function, words = self._prepare("run_nothing", 0)

        def run() -> None:
            for _ in range(launches):
                function.launch(Grid(1, 32), words)

        return best_seconds(run) / launches

    def _prepare(self, entry: str, repeats: int) -> tuple[Function, list[Word]]:
        of_cluster = entry == "run_cluster_barrier"
        path = self._paths["gpu_cluster.cu" if of_cluster else "gpu_machine.cu"]
        function = self.place.kernels.load(path, entry, self.place.device)
        if of_cluster:
            return function, [repeats]
        memory = [
            Memory(self.values, "values"),
            Memory(self.counters, "counters", written=True),
            Memory(self.fault, "fault", written=True),
        ]
        return function, [*memory, self.values.numel(), repeats]


def measure_machine(place: Place) -> dict[str, float]:
    """Microseconds and rates by name; what the device does not have is left out."""
    gpu = place.is_gpu
    cluster = place.limits.cluster if gpu else 2
    pieces = Pieces(place, floats=4 * 2**20 if gpu else 64, cluster=cluster)
    repeats = 2000 if gpu else 3
    everywhere = Grid(pieces.blocks, THREADS, cooperative=True)
    found = {
        "launch_us": 1e6 * pieces.queued_launch(1000 if gpu else 3),
        "launch_and_wait_us": 1e6 * pieces.launch("run_nothing", Grid(1, 32), 0),
        "grid_barrier_us": 1e6 * pieces.seconds("run_grid_barrier", everywhere, repeats),
        "block_barrier_us": 1e6 * pieces.seconds("run_block_barrier", Grid(1, THREADS), repeats),
        "atomic_hop_us": 0.5e6
        * pieces.seconds("run_atomic_hop", Grid(2, 32, cooperative=True), repeats),
    }
    if cluster > 1:
        grid = Grid(cluster, THREADS, cluster=cluster)
        found["cluster_barrier_us"] = 1e6 * pieces.seconds("run_cluster_barrier", grid, repeats)
    read = 4 * pieces.values.numel()
    rounds = 8 if gpu else 2
    for name, blocks in (("l2_read", pieces.blocks), ("l2_read_of_multiprocessor", 1)):
        seconds = pieces.seconds("run_read", Grid(blocks, 4 * THREADS if gpu else 32), rounds)
        found[f"{name}_gb_per_s"] = blocks * read / max(seconds, 1e-12) / 1e9
    return {**found, **_library_rates(place)}


def best_seconds(function: Callable[[], object]) -> float:
    """The shortest of some runs, each with the wait for its end; one more warms up."""
    function()
    return min(seconds_of(function) for _ in range(TAKEN))


def seconds_of(function: Callable[[], object]) -> float:
    """The time of one call, with the wait for its end."""
    wait_for_devices()
    start = time.perf_counter()
    function()
    wait_for_devices()
    return time.perf_counter() - start


def median_ms(
    place: Place, functions: Mapping[str, Callable[[Any], object]], given: Any, rounds: int
) -> dict[str, float]:
    """The median over interleaved rounds of each; of one call where times mean nothing."""
    if not place.is_gpu:
        return {name: 1e3 * seconds_of(partial(f, given)) for name, f in functions.items()}
    timings = measure_pairs(functions, rounds, inputs=[given])
    return {name: timings.median_ms(name) for name in functions}


def release() -> None:
    """Give memory back, so that the next cell has all of it."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _library_rates(place: Place) -> dict[str, float]:
    """Copies and dense products as torch has them."""
    with place.device:
        source = torch.zeros(64 * 2**20 if place.is_gpu else 2**10)
        side = 4096 if place.is_gpu else 64
        a = torch.rand(side, side)
    copied = torch.empty_like(source)
    seconds = best_seconds(lambda: copied.copy_(source))
    found = {"copy_gb_per_s": 2 * 4 * source.numel() / seconds / 1e9}
    before = torch.get_float32_matmul_precision()
    for name, precision, dtype in (
        ("float32", "highest", torch.float32),
        ("tf32", "high", torch.float32),
        ("bfloat16", "highest", torch.bfloat16),
    ):
        torch.set_float32_matmul_precision(precision)
        found[f"{name}_tflop_per_s"] = _product_rate(a.to(dtype))
    torch.set_float32_matmul_precision(before)
    return found


def _product_rate(a: Tensor) -> float:
    seconds = best_seconds(lambda: torch.mm(a, a))
    return float(2 * a.shape[0] ** 3 / seconds / 1e12)
