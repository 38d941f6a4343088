"""C++ kernels against the reference interpreter, bit for bit, for every strategy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cpp import CppBackend
from sparsify.reference import Array, run_reference
from tests.random_kernels import Drawn, draw_data, kernels

BACKEND = CppBackend()

pytestmark = pytest.mark.skipif(
    BACKEND.why_unavailable() is not None, reason=str(BACKEND.why_unavailable())
)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
    return BACKEND.load(BACKEND.compile(kernel, schedule))


def assert_same_bits(got: torch.Tensor, wanted: Array, what: str) -> None:
    """Equal bits; NaN equals NaN, because its sign and payload are the processor's choice."""
    array = got.numpy()
    assert array.shape == wanted.shape and array.dtype == wanted.dtype, what
    unsigned = f"u{array.dtype.itemsize}"
    equal = array.view(unsigned) == wanted.view(unsigned)
    if array.dtype.kind == "f":
        equal = equal | (np.isnan(array) & np.isnan(wanted))
    assert equal.all(), f"{what}: {(~equal).sum()} of {equal.size} differ"


def compare(
    launch: Launchable, kernel: ir.Kernel, data: dict[str, Array], steps: int, batch: int
) -> None:
    wanted = run_reference(kernel, data, steps=steps, batch=batch)
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    got = launch(tensors, steps=steps, batch=batch)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, f"{name}, {steps} steps of {batch}")


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,  # a fresh machine compiles every kernel, so the same ones each time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=kernels(), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    launch = load(drawn.kernel, drawn.schedule)
    for steps, batch, threads, activity in (
        (4, 3, 2, 0.2),
        (3, 3, 1, 0.2),
        (1, 1, 2, 1.0),
        (2, 2, 2, 0.0),
        (2, 0, 2, 0.5),
    ):
        torch.set_num_threads(threads)
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, data, steps, batch)
