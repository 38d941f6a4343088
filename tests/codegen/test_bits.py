"""Operands and outputs that are bits in memory: kernels against the reference, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import Array, run_reference
from sparsify.saved_bits import pack_bits, packed_size, unpack_bits
from tests.codegen.test_kernels import assert_same_bits, compare, load
from tests.kernels.example_kernels import STRATEGIES, How, gate_of_bits, schedule

needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")

pytestmark = pytest.mark.usefixtures("all_threads_for_small_work")


def gate_data(kernel: ir.Kernel, steps: int, batch: int, seed: int = 0) -> dict[str, Array]:
    """Multiples of 1/64 up to 1, so that sums do not depend on the order of additions."""
    rng = np.random.default_rng(seed)
    neurons = kernel.population_size("hidden")
    shape = (steps, batch, neurons)
    bits = {
        name: np.packbits(rng.random(shape) < share, axis=-1, bitorder="little")
        for name, share in (("near", 0.3), ("fired", 0.1))
    }
    floats = {
        "g": rng.integers(-64, 65, shape) / 64,
        "w": rng.integers(-64, 65, (neurons, neurons)) / 64,
    }
    return bits | {name: value.astype("float32") for name, value in floats.items()}


@needs_compiler
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bits_against_the_reference(strategy: str, how: How, reverse: bool) -> None:
    """Sizes on both sides of a byte, of a word of bits and of tiles."""
    for neurons, tile in ((1, 0), (65, 16), (300, 64)):
        kernel = replace(gate_of_bits(neurons), reverse=reverse)
        launch = load(kernel, schedule(kernel, strategy, how, tile=tile))
        for steps, batch, threads in ((3, 5, 2), (2, 1, 1), (1, 70, 3)):
            torch.set_num_threads(threads)
            compare(launch, kernel, gate_data(kernel, steps, batch), steps, batch)
        active, seen = launch.events["excitation"]
        assert 0 < active < seen or neurons < 64, "the data do not exercise the kernel"


@needs_compiler
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    neurons=st.integers(1, 140),
    strategy=st.sampled_from(STRATEGIES),
    tile=st.sampled_from((0, 16, 64)),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    swapped=st.booleans(),
)
def test_strides_of_time_and_rows(
    neurons: int, strategy: str, tile: int, gaps: tuple[int, int], swapped: bool
) -> None:
    """Slices of larger tensors, batch-first ones too, are read and written in place."""
    steps, batch = 4, 3
    kernel = gate_of_bits(neurons)
    data = gate_data(kernel, steps, batch, seed=neurons)
    size = packed_size(neurons)
    sizes = (batch + gaps[0], steps) if swapped else (steps, batch + gaps[0])

    def place() -> torch.Tensor:
        """255s, of which a part is ``[T, B, bytes]``."""
        large = torch.full((*sizes, size + gaps[1]), 255, dtype=torch.uint8)
        view = large.transpose(0, 1) if swapped else large
        return view[:, :batch, :size]

    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    for name in ("near", "fired"):
        tensors[name] = place().copy_(tensors[name])
    written = place()
    launch = load(kernel, schedule(kernel, strategy, tile=tile))
    torch.set_num_threads(2)
    launch(tensors, steps=steps, batch=batch, outputs={"passed": written})
    wanted = run_reference(kernel, data, steps=steps, batch=batch)["passed"]
    assert_same_bits(written.contiguous(), wanted, f"{neurons} neurons")
    around = torch.as_strided(written, (written.untyped_storage().size(),), (1,), 0)
    untouched = around.numel() - written.numel()
    assert int((around == 255).sum()) >= untouched


@needs_compiler
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_read_or_written_behind_the_last_byte(strategy: str) -> None:
    """One row more than the call has: what lies there stays, and what it holds does not matter."""
    kernel = gate_of_bits(70)
    data = gate_data(kernel, 2, 1)
    launch = load(kernel, schedule(kernel, strategy))
    wanted = run_reference(kernel, data, steps=2, batch=1)
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    for filled in (0, 255):
        for name in ("near", "fired"):
            longer = torch.full((2, 2, 9), filled, dtype=torch.uint8)
            longer[:, :1] = tensors[name]
            tensors[name] = longer[:, :1]
        large = torch.full((2, 2, 9), filled, dtype=torch.uint8)
        got = launch(tensors, steps=2, batch=1, outputs={"passed": large[:, :1]})
        assert_same_bits(got["passed"].contiguous(), wanted["passed"], f"beside {filled}")
        assert bool((large[:, 1] == filled).all())


def test_the_reference_packs_as_pack_bits_does() -> None:
    kernel = gate_of_bits(21)
    data = gate_data(kernel, 3, 2)
    packed = run_reference(kernel, data, steps=3, batch=2)["passed"]
    near, fired = (unpack_bits(torch.from_numpy(data[name]), 21) for name in ("near", "fired"))
    assert packed.any()
    assert torch.equal(torch.from_numpy(packed), pack_bits(near & ~fired))


@needs_compiler
def test_what_is_asked_of_bits_is_said() -> None:
    kernel = gate_of_bits(70)
    launch = load(kernel, schedule(kernel, STRATEGIES[0]))
    tensors = {name: torch.from_numpy(value) for name, value in gate_data(kernel, 2, 1).items()}
    with pytest.raises(TypeError, match=r"'near' is \[2, 1, 70\] .*\[T, B, 9\] of torch.uint8"):
        launch(tensors | {"near": torch.zeros(2, 1, 70)}, steps=2, batch=1)
    with pytest.raises(ValueError, match=r"'passed' is \[2, 1, 70\] .*\[T, B, 9\] of torch.uint8"):
        wrong = torch.zeros(2, 1, 70, dtype=torch.uint8)
        launch(tensors, steps=2, batch=1, outputs={"passed": wrong})


@pytest.mark.parametrize("neurons", [1, 7, 8, 9, 64, 70])
def test_unpacked_bits_are_what_was_packed(neurons: int) -> None:
    spikes = torch.rand(3, 5, neurons, generator=torch.Generator().manual_seed(neurons)) < 0.4
    for dtype in (torch.bool, torch.float32, torch.int64):
        unpacked = unpack_bits(pack_bits(spikes), neurons, dtype)
        assert unpacked.dtype is dtype
        assert torch.equal(unpacked, spikes.to(dtype))


def test_every_byte_is_unpacked() -> None:
    values = torch.arange(256, dtype=torch.uint8)[:, None]
    wanted = torch.from_numpy(np.unpackbits(values.numpy(), axis=-1, bitorder="little"))
    assert torch.equal(unpack_bits(values, 8, torch.uint8), wanted)
