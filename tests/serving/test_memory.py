"""Peak memory: of compiled calls no more than eager's, of compiling no more than half above it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify.api import sparsify
from sparsify.bench import measure_pairs
from sparsify.checking.fingerprint import Fingerprint
from sparsify.choosing.choose import FIRST_CALLS, seconds_of
from sparsify.codegen.cpp.cost_model import calibrate_rates
from sparsify.recording import recorder
from sparsify.recording.keep_state import Snapshot
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.rounding.bounded import is_exact, lowest_bit
from sparsify.rounding.error_bounds import ErrorBounds
from sparsify.rounding.sums import MOST_WIDENED
from sparsify.serving.engine import Engine
from tests.live_bytes import peak_of

ROOT = Path(__file__).parents[2]
MOST_OVER_EAGER = 1.5
STEPS, BATCH, INPUTS, HIDDEN = 40, 96, 128, 256


class Recurrent(nn.Module):
    """Returns all spikes: the result is half of what eager needs."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(INPUTS, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        v = spikes = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.75 * v + self.inp(x_t) + self.rec(spikes)
            spikes = (v > 0.5).to(v.dtype)
            v = v - spikes
            out.append(spikes)
        return torch.stack(out)


class Layers(nn.Module):
    """Layers one after the other; each hands all of its spikes to the next one."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [INPUTS, HIDDEN, HIDDEN, HIDDEN]
        self.linears = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            v = x.new_zeros(x.shape[1], HIDDEN)
            out = []
            for current in linear(x):
                v = 0.75 * v + current
                spikes = (v > 0.25).to(v.dtype)
                v = v - spikes
                out.append(spikes)
            x = torch.stack(out)
        return x


class Classifier(Recurrent):
    """Returns next to nothing, and counts in a buffer and in an argument of the caller's."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(BATCH, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        spikes = super().forward(x)
        self.seen.add_(spikes[-1])
        return spikes.mean((0, 1))


@pytest.fixture(autouse=True)
def rates() -> None:
    """The machine is measured once a process, in memory that does not grow with the model."""
    calibrate_rates()


MODELS = pytest.mark.parametrize("kind", [Recurrent, Layers, Classifier])


def example(kind: type[nn.Module]) -> tuple[nn.Module, Tensor, int]:
    """A model, an input, and the bytes of both, which are there whatever runs."""
    torch.manual_seed(0)
    model, x = kind().eval(), (torch.rand(STEPS, BATCH, INPUTS) < 0.2).float()
    held = [x, *model.parameters(), *model.buffers()]
    return model, x, sum(tensor.nbytes for tensor in held)


def looped(model: nn.Module, x: Tensor) -> Tensor:
    """Calls as loops make them: a result lives until the next one is there."""
    y: Tensor = model(x)
    y = model(x)
    return y


def has_compiled(fast: nn.Module) -> bool:
    engine = fast.compiled
    assert isinstance(engine, Engine)
    return bool(engine.binaries)


@MODELS
def test_compiling_an_example(kind: type[nn.Module]) -> None:
    model, x, held = example(kind)
    made: list[nn.Module] = []
    eager = held + peak_of(lambda: model(x))
    assert held + peak_of(lambda: made.append(sparsify(model, x))) <= MOST_OVER_EAGER * eager
    assert has_compiled(made[0])


@MODELS
def test_a_first_call_that_compiles(kind: type[nn.Module]) -> None:
    """Its result is made by the recording, and must be held while the recording is compiled."""
    model, x, held = example(kind)
    fast = sparsify(model)
    eager = held + peak_of(lambda: looped(model, x))
    assert held + peak_of(lambda: fast(x)) <= MOST_OVER_EAGER * eager
    assert has_compiled(fast)


@pytest.mark.parametrize("kind", [Recurrent, Layers])
def test_compiled_calls(kind: type[nn.Module]) -> None:
    model, x, _ = example(kind)
    fast = sparsify(model, x, timing=False)
    engine = fast.compiled
    assert isinstance(engine, Engine) and not engine.compiled.runs_original
    # A kernel makes all that it returns at once: the last voltages and spikes too, and it is given
    # the first ones. Eager holds one of these at its peak.
    states = 3 * BATCH * HIDDEN * x.element_size()
    assert peak_of(lambda: fast(x)) <= peak_of(lambda: model(x)) + states


def test_results_are_not_held_while_functions_are_timed() -> None:
    def make() -> Tensor:
        return torch.empty(1 << 20)

    functions = {"a": make, "b": make, "c": make}
    canary = peak_of(lambda: measure_pairs({"a": lambda: None}, 3, least_ms=0.1))
    assert peak_of(lambda: measure_pairs(functions, 3, least_ms=0.1)) <= canary + (4 << 20)


def test_a_snapshot_keeps_what_was_written_only() -> None:
    model, x, y = Classifier(), torch.zeros(1 << 16), torch.zeros(1 << 16)
    before = Snapshot(model, [x, y])
    x.add_(1)
    model.seen.add_(2)
    assert peak_of(before.now) < 1.5 * x.nbytes  # x and the buffer, but not y
    after = before.now()
    before.put_back()
    assert x.count_nonzero() == model.seen.count_nonzero() == 0
    after.put_back()
    assert bool((x == 1).all()) and bool((model.seen == 2).all())


@pytest.mark.parametrize("exact", [True, False])
def test_bounds_of_a_product_take_no_copies_of_a_large_weight(exact: bool) -> None:
    """Resident memory follows live memory here: parts are as large as mapped blocks."""
    size, batch = 2048, 8
    weight = torch.randint(-8, 8, (size, size)) / 64 if exact else torch.rand(size, size)
    bias, x = torch.zeros(size), (torch.rand(batch, size) < 0.1).float()
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in ("x", "weight", "bias")]
    graph.output((graph.call_function(torch.ops.aten.linear.default, tuple(given)),))
    bounds = ErrorBounds(fx.GraphModule({}, graph))
    # Of a part the values, their magnitudes, and what these are computed from; then the sums.
    most = (4 * MOST_WIDENED + 20 * batch * size) * torch.float64.itemsize
    assert most < weight.nbytes / 2
    assert peak_of(lambda: bounds.evaluate([x, weight, bias])) <= most
    (found,) = bounds.evaluate([x, weight, bias]).outputs
    assert is_exact(found) is exact
    # Both add up to ``size`` positive numbers in float64, in orders of their own.
    rtol = 0.0 if exact else 2 * size * torch.finfo(torch.float64).eps
    wanted = F.linear(x.double(), weight.double())
    torch.testing.assert_close(found.value, wanted, rtol=rtol, atol=0.0)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


HOLES = """
import os, runpy, sys

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

free_memory = runpy.run_path(sys.argv[1])["free_memory"]
size, count = 64 << 10, 1000  # bytes; below what malloc asks of the system one by one
blocks, pins = [], []
for index in range(count):
    blocks.append(b"x" * size)
    pins.append(bytes([index % 256]) * 600)  # more than Python's own allocator takes
blocks.clear()
before = resident()
free_memory()
assert len(pins) == count
assert before - resident() > size * count // 2, (before, resident())
"""


def test_holes_between_objects_are_given_back() -> None:
    """In a process of its own: where there are holes already, the pins do not make any."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has malloc_trim")
    command = [sys.executable, "-c", HOLES, str(ROOT / "sparsify" / "free_memory.py")]
    done = subprocess.run(command, text=True, stderr=subprocess.PIPE)
    assert not done.returncode, done.stderr


def test_functions_that_are_timed_leave_no_holes() -> None:
    """glibc may not take a freed result again, where something small is made meanwhile."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc has malloc_trim")
    torch.empty(24 << 20, dtype=torch.uint8)  # from now on, smaller blocks are not mapped ones
    kept = []

    def call() -> Tensor:
        result = torch.ones(2 << 20)
        kept.append(torch.empty(3))
        return result

    before, size = resident(), call().nbytes
    for _ in range(10):
        seconds_of(call)
    assert len(kept) > 10
    assert resident() - before <= (FIRST_CALLS + 2) * size


ALONE = """
import sys, threading, torch
from tests.serving.test_memory import Recurrent, has_compiled
from sparsify.api import sparsify

before = threading.enumerate()
fast = sparsify(Recurrent(), torch.ones(4, 2, 128), timing=True)
assert has_compiled(fast)
assert "numpy.random" not in sys.modules and "multiprocessing.synchronize" not in sys.modules
assert threading.enumerate() == before
"""


def test_compiling_loads_no_libraries_and_leaves_no_threads() -> None:
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert not done.returncode, done.stderr


def test_fingerprints_leave_no_holes() -> None:
    """Copies of parts that are freed one by one are not always taken again by glibc."""
    tensor = torch.rand(12 << 20)
    Fingerprint.of(tensor[: 1 << 20])
    before = resident()
    Fingerprint.of(tensor)
    assert resident() - before < tensor.nbytes // 8


def test_recording_gives_memory_back_after_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = example(Recurrent)
    least = STEPS * BATCH * HIDDEN * x.element_size()
    calls: list[None] = []
    monkeypatch.setattr(recorder, "free_memory", lambda: calls.append(None))
    monkeypatch.setattr(recorder, "FREED_BYTES", least)
    with torch.no_grad():
        assert isinstance(record(model, (x,), {}, restore=True), Recording)
    assert 4 <= len(calls) <= 10  # of eight results of such a size in a step, and some smaller ones


def test_bits_of_a_large_matrix_are_looked_at_in_parts() -> None:
    matrix = torch.full((512, 1024), 0.75, dtype=torch.float64)
    matrix[300, 5] = 2.0**-40
    assert lowest_bit(matrix) == lowest_bit(matrix.t()) == 2.0**-40
    # Of 2^16 elements it makes at most ten copies.
    assert peak_of(lambda: lowest_bit(matrix)) <= 10 * 8 * 2**16
