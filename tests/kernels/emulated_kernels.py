"""Kernels for CUDA on the emulator: small devices, edited text, comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.codegen.cuda import team_kernel, team_shape
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100
from sparsify.codegen.cuda.find_shape import find_shape
from sparsify.codegen.emulator.device import EmulatedDevice, Schedule
from sparsify.reference import Array, run_reference
from tests.codegen.test_kernels import assert_same_bits
from tests.kernels.random_kernels import tensors_of

# Two blocks run at once: those of a call with more rows take several, one after the other.
TWO_BLOCKS = replace(H100, name="two blocks", multiprocessors=2, blocks_per_multiprocessor=1)

needs_emulator = pytest.mark.skipif(
    EmulatedDevice().why_unavailable() is not None, reason="no gcc for the emulator"
)


def emulator(schedule: Schedule = "random", seed: int = 1, checks: bool = True) -> EmulatedDevice:
    return EmulatedDevice(schedule, seed=seed, checks=checks, played=TWO_BLOCKS)


@cache
def load(kernel: ir.Kernel, plan: ir.Schedule, schedule: Schedule = "random") -> Launchable:
    """The kernel, with all checks."""
    backend = CudaBackend(emulator(schedule))
    return backend.load(backend.compile(kernel, plan))


def run(
    launch: Launchable, data: Mapping[str, Array], steps: int, batch: int
) -> dict[str, torch.Tensor]:
    return launch(tensors_of(launch.kernel, data), steps=steps, batch=batch)


def compare(
    launch: Launchable, kernel: ir.Kernel, data: dict[str, Array], steps: int, batch: int
) -> None:
    """All outputs, with those of the reference."""
    launch.reset_events()
    wanted = run_reference(kernel, data, steps=steps, batch=batch)
    got = run(launch, data, steps, batch)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(got[name], value, f"{name}, {steps} steps of {batch}")


def exact(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Multiples of 1/64 up to 1: sums of their products do not depend on the order."""
    return (rng.integers(-64, 65, shape) / 64).astype("float32")


@contextmanager
def four_warps() -> Iterator[None]:
    """Blocks of teams have so few: each takes several rows and blocks of senders in turn.

    Few lists are many, as they are for these.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team_shape, "MOST_WARPS", 4)
        patch.setattr(team_kernel, "MANY_LISTS", 4)
        find_shape.cache_clear()
        yield
    find_shape.cache_clear()
