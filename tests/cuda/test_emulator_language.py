"""CUDA C++ on the emulator computes what it computes on a GPU: against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import H100, Grid, Memory
from sparsify.codegen.cuda.nvrtc import compile_cubin
from sparsify.codegen.emulator.device import EmulatedDevice
from tests.cuda_wheels import needs_nvrtc

pytestmark = pytest.mark.skipif(
    EmulatedDevice().why_unavailable() is not None, reason="gcc on x86-64 Linux is needed"
)
TEXT = (Path(__file__).parent / "language.cu").read_text()
BOTH = pytest.mark.parametrize("checks", [False, True], ids=["unchecked", "checked"])
LANES = np.arange(64)
A = np.linspace(-3.7, 4.1, 64, dtype=np.float32)
B = np.cos(np.arange(64)).astype(np.float32)
I = (np.arange(64) * 2654435 % 1000).astype(np.int32)  # noqa: E741


class Results:
    """Runs one kernel of language.cu; what it left in each of its arrays."""

    def __init__(self, name: str, checks: bool, grid: Grid) -> None:
        device = EmulatedDevice("random", seed=3, checks=checks)
        floats = torch.full((64, 16), -1.0)
        ints = torch.full((64, 16), -1, dtype=torch.int32)
        doubles = torch.zeros(64, dtype=torch.float64)
        counters = torch.zeros(16, dtype=torch.int32)
        counters[2] = 1000
        function = device.load(
            device.compile(Source(TEXT, "language.cu", name), {}), name, torch.device("cpu")
        )
        inputs = {"a": torch.from_numpy(A), "b": torch.from_numpy(B), "i": torch.from_numpy(I)}
        outputs = {"floats": floats, "ints": ints, "doubles": doubles, "counters": counters}
        words = [
            *(Memory(tensor, each) for each, tensor in inputs.items()),
            *(Memory(tensor, each, written=True) for each, tensor in outputs.items()),
        ]
        function.launch(grid, words)
        self.floats, self.ints = floats.numpy().T, ints.numpy().T
        self.doubles, self.counters = doubles.numpy(), counters.numpy()


@BOTH
def test_arithmetic_rounds_once_per_operation(checks: bool) -> None:
    out = Results("rounded", checks, Grid(1, 64))
    a, b = A.astype(np.float64), B.astype(np.float64)
    floats = np.float32
    expected = [
        A + B,
        A * B,
        # The product of two floats is exact in double, and so is rounding the sum twice here: the
        # sums lie further from a midpoint than the first rounding moves them.
        (a * b + 1).astype(floats),
        A * B + floats(1),
        A / B,
        np.sqrt(np.abs(A)),
        np.minimum(A, B),
        np.maximum(A, B),
        np.floor(A) + np.ceil(B),
        np.copysign(A, B),
        A * floats(1e-42),
        np.fmod(A, B),
        np.rint(4 * A) + np.trunc(4 * B),
        4.0 * np.signbit(A),
        np.minimum(A, B) - np.maximum(A, B),
        np.zeros(64),
    ]
    for row, (found, wanted) in enumerate(zip(out.floats, expected, strict=True)):
        np.testing.assert_array_equal(found, wanted.astype(floats), err_msg=str(row))
    assert (out.floats[10] != 0).all()
    assert (out.floats[2] != out.floats[3]).any()
    np.testing.assert_array_equal(out.doubles, (a * b + 1) + (a + b))


def test_denormals_are_not_flushed_where_torch_flushes_them() -> None:
    assert torch.set_flush_denormal(True)
    try:
        out = Results("rounded", False, Grid(1, 64))
        assert float(torch.tensor(1e-40) * 0.5) == 0  # the process's setting is as it was
    finally:
        torch.set_flush_denormal(False)
    assert (out.floats[10] != 0).all()


@BOTH
def test_bits(checks: bool) -> None:
    out = Results("bits", checks, Grid(1, 64))
    numbers = [int(i) for i in I]
    reverse = [int(f"{i:032b}"[::-1], 2) for i in numbers]
    expected = [
        [i.bit_count() for i in numbers],
        [32 - i.bit_length() for i in numbers],
        [(i & -i).bit_length() for i in numbers],
        reverse,
        [i.bit_count() for i in numbers],
        [64 - i.bit_length() for i in numbers],
        [(i & -i).bit_length() + 16 if i else 0 for i in numbers],
        [i * 2**20 >> 32 for i in numbers],
        [i * 2**20 >> 32 for i in numbers],
        [((t << 32 | i) << 8) >> 32 & 0xFFFFFFFF for t, i in enumerate(numbers)],
        [(t << 32 | i) >> 8 & 0xFFFFFFFF for t, i in enumerate(numbers)],
        A.view(np.int32),
        numbers,
        np.rint(A * 8) + np.trunc(B * 8),
        [i + t for t, i in enumerate(numbers)],
        [
            (i >> 16 & 255) | (i & 0xFF00) | (t & 255) << 16 | (0xFF000000 if i & 128 else 0)
            for t, i in enumerate(numbers)
        ],
    ]
    for row, (found, wanted) in enumerate(zip(out.ints, expected, strict=True)):
        np.testing.assert_array_equal(
            found.astype(np.uint32), np.asarray(wanted).astype(np.int64).astype(np.uint32), str(row)
        )


@BOTH
def test_collectives(checks: bool) -> None:
    out = Results("shuffles", checks, Grid(1, 64))
    lane, first = LANES % 32, LANES // 32 * 32
    warps = I.reshape(2, 32)
    odd = [sum(1 << k for k in range(32) if warp[k] & 1) for warp in warps]
    alike = [sum(1 << k for k in range(32) if I[f + k] % 4 == i % 4) for f, i in zip(first, I)]  # noqa: B905
    expected = [
        first + 5,
        LANES // 8 * 8 + 3,
        np.where(lane >= 2, LANES - 2, LANES),
        np.where(LANES % 16 < 14, LANES + 2, LANES),
        LANES ^ 16,
        np.repeat(odd, 32),
        np.repeat((warps == 7).any(1), 32),
        np.ones(64),
        alike,
        np.repeat(warps.sum(1), 32),
        np.repeat(warps.min(1) + warps.max(1), 32),
        np.repeat(np.bitwise_xor.reduce(warps, axis=1), 32),
        31 + np.repeat([1, 33], 32),
        np.repeat(LANES.reshape(2, 32).sum(1), 32),
        (I == 7).any() + 2 * (I < 1000).all() + np.zeros(64),
        np.full(64, (I % 2).sum()),
    ]
    for row, (found, wanted) in enumerate(zip(out.ints, expected, strict=True)):
        np.testing.assert_array_equal(
            found.astype(np.uint32), np.asarray(wanted).astype(np.int64).astype(np.uint32), str(row)
        )


@BOTH
def test_atomics(checks: bool) -> None:
    counters = Results("atomics", checks, Grid(3, 64)).counters
    assert counters[:5].tolist() == [192, 191, 0, -1, 0]
    assert counters[6:8].view(np.uint64)[0] == 192 * 2**31
    assert counters[8:9].view(np.float32)[0] == 96.0
    assert counters[9:12].tolist() == [192 % 10, -2 * 192, 3 * 192]


@BOTH
def test_vectors_and_hints(checks: bool) -> None:
    out = Results("vectors", checks, Grid(1, 64, shared_bytes=64 * 16)).floats.T
    four = np.tile(np.array([1, 2, 3, 4], dtype=np.float32), (64, 1))
    four[:16] = A.reshape(16, 4)
    other = 63 - LANES
    second = np.stack([A[other], other, 2 * other, four[:, 0] + four[:, 3]], axis=1)
    np.testing.assert_array_equal(out[:, :4], four)
    np.testing.assert_array_equal(out[:, 4:8], second.astype(np.float32))
    np.testing.assert_array_equal(out[:, 8:], out[:, :8])


@BOTH
@pytest.mark.parametrize("size", [2, 4])
def test_clusters(checks: bool, size: int) -> None:
    out = Results("clusters", checks, Grid(8, 32, cluster=size)).ints.T
    for block in range(8):
        first = block // size * size
        assert out[block, :size].tolist() == list(range(first, first + size))
        assert out[block, 8] == block - first + 10 * size
        assert out[block, 9] == block // size + 10 * (8 // size)
        assert out[block, 10:12].tolist() == [1, 8 + 3200]


@BOTH
def test_declarations(checks: bool) -> None:
    out = Results("declarations", checks, Grid(1, 64))
    assert out.ints[0].tolist() == [17 + 63 * 32 + 32 + 32] * 64


@needs_nvrtc
def test_nvrtc_accepts_the_same_text() -> None:
    source = Source(TEXT, "language.cu", "language")
    assert compile_cubin(source, {}, H100.architecture).exists()
