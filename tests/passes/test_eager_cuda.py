"""Where eager torch rounds on CUDA otherwise than on the CPU: lowered so, and within the bounds.

No device is needed: what is tested is the kernel that lowering writes, and what its bound allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.passes.lowering.expansion import Eager
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.reference import run_reference
from sparsify.rounding.bounded import Bounded, Precision, exact
from sparsify.rounding.rows import ROWS
from sparsify.scans.lowered import Lowered
from tests.run_lowered import one_scan
from tests.unrolled import Tape

STEPS, BATCH, NEURONS = 3, 2, 8
EAGERS: tuple[Eager, ...] = ("cpu", "cuda")
X = torch.randn(STEPS, BATCH, NEURONS, generator=torch.Generator().manual_seed(0))
TENTH, THREE = torch.full((NEURONS,), 0.1), torch.tensor(3.0)


def kernel_of(function: Callable[[Tensor, Tensor], Tensor], eager: Eager) -> ir.Kernel:
    def model(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros(BATCH, NEURONS)
        kept = []
        for t in tape.loop(range(STEPS)):
            v = function(v + x[t], TENTH)
            kept.append(v)
        return torch.stack(kept)

    scan = one_scan(model, X, {"w0": TENTH})
    lowered = lower_scan(scan, "kernel", eager)
    assert isinstance(lowered, Lowered), lowered
    return lowered.kernel


def operations(kernel: ir.Kernel) -> list[tuple[str, tuple[ir.Arg, ...]]]:
    return [(s.op, s.args) for p in kernel.phases for s in p.body if isinstance(s, ir.Let)]


def test_a_number_divides_by_its_reciprocal_on_cuda() -> None:
    on_cpu = operations(kernel_of(lambda v, w: v / 3.0, "cpu"))
    on_cuda = operations(kernel_of(lambda v, w: v / 3.0, "cuda"))
    inverse = float(np.float32(1) / np.float32(3))
    assert [op for op, _ in on_cpu] == ["add", "div"]
    assert [op for op, _ in on_cuda] == ["add", "mul"]
    assert on_cpu[1][1][1] == ir.Const(3.0)
    assert on_cuda[1][1][1] == ir.Const(inverse)


def test_the_text_says_so() -> None:
    for eager, found in zip(EAGERS, ("/ 3.0f", "* 0.3333333"), strict=True):
        kernel = kernel_of(lambda v, w: v / 3.0, eager)
        text = CppBackend().render(kernel, ir.Schedule("rows-per-thread", ())).text
        assert found in text


def test_the_results_are_those_of_the_reciprocal() -> None:
    kernel = kernel_of(lambda v, w: v / 3.0, "cuda")
    start = np.zeros((BATCH, NEURONS), np.float32)
    given = {o.name: X.numpy() if "T" in o.axes else start for o in kernel.operands}
    results = run_reference(kernel, given, steps=STEPS, batch=BATCH)
    stored = next(results[o.name] for o in kernel.outputs if "T" in o.axes)
    v, inverse = start, np.float32(1) / np.float32(3)
    for t in range(STEPS):
        v = (v + X[t].numpy()) * inverse
        assert np.array_equal(stored[t], v)
    assert not np.array_equal(v / np.float32(3), v * inverse)  # it is a difference


@pytest.mark.parametrize("eager", EAGERS)
def test_tensors_divide_on_both(eager: Eager) -> None:
    assert [op for op, _ in operations(kernel_of(lambda v, w: v / w, eager))] == ["add", "div"]


def test_a_tensor_on_the_cpu_is_a_number_to_one_on_cuda() -> None:
    """As torch has it for tensors without dims."""
    scan = one_scan(_divided, X, {"w0": THREE})
    for node in scan.body.graph.nodes:
        info = node.meta.get("val")
        if info is not None and info.shape:
            node.meta["val"] = type(info)(
                info.shape, info.stride, info.dtype, torch.device("cuda", 0)
            )
    lowered = lower_scan(scan, "kernel", "cuda")
    assert isinstance(lowered, Lowered)
    assert [op for op, _ in operations(lowered.kernel)] == ["add", "reciprocal", "mul"]


def _divided(tape: Tape, x: Tensor) -> Tensor:
    v = torch.zeros(BATCH, NEURONS)
    for t in tape.loop(range(STEPS)):
        v = (v + x[t]) / THREE
    return v


def test_levels_are_truncated_quotients() -> None:
    def levels(v: Tensor, w: Tensor) -> Tensor:
        return torch.div(v, 0.3, rounding_mode="trunc")

    on_cpu, on_cuda = (operations(kernel_of(levels, eager)) for eager in EAGERS)
    assert [op for op, _ in on_cpu] == ["add", "div", "trunc"]
    assert [op for op, _ in on_cuda] == ["add", "mul", "trunc"]


@pytest.mark.parametrize("divisor", [3.0, 0.1, 1e-3, 7e20, -2.5, 4.0])
def test_the_bound_of_a_division_covers_the_reciprocal(divisor: float) -> None:
    precision = Precision(torch.float32)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    bounded = ROWS[torch.ops.aten.div.Tensor](precision, exact(x, precision), divisor)
    by_reciprocal = x * (1 / torch.tensor(divisor))
    for quotient in (x / divisor, by_reciprocal):
        assert bool(((quotient.double() - bounded.value).abs() <= bounded.full_error).all())


# Errors in units of the last place, the larger of those that editions of the guide list:
# CUDA C++ Programming Guide, "Mathematical Functions", single and double precision.
UNITS: dict[str, tuple[float, float]] = {
    "exp": (2, 1),
    "expm1": (1, 1),
    "tanh": (2, 2),
    "log": (1, 1),
    "log1p": (1, 1),
    "erf": (2, 2),
    "sqrt": (0, 0),
    "rsqrt": (2, 1),
    # 1 / (1 + exp(-x)): two units of the exponential, weakened by the sum, and two roundings.
    "sigmoid": (3, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNITS)
def test_bounds_cover_the_errors_of_cudas_functions(name: str, dtype: torch.dtype) -> None:
    precision = Precision(dtype)
    x = torch.linspace(0.01, 4.0, 20_001, dtype=dtype)
    row: Any = ROWS[getattr(torch.ops.aten, name).default]
    bounded: Bounded = row(precision, exact(x, precision))
    units = UNITS[name][dtype is torch.float64]
    spacing = np.spacing(np.abs(bounded.value.to(dtype).numpy())).astype(np.float64)
    assert (bounded.full_error.numpy() >= units * spacing).all()
