from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.passes.gradients.differentiate import differentiate
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.scans.differentiated import Differentiated, Operand
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan
from tests.models.step_bodies import BODIES, Body, Operands
from tests.steps import make_scan

LOWERED = [body for body in BODIES if body.lowered != "none"]


def eager_gradients(
    scan: Scan, steps: int, operands: Operands, required: set[Operand], read: Sequence[int]
) -> tuple[tuple[Tensor, ...], dict[Operand, Tensor | None]]:
    """Results, and gradients by torch through the Scan's own operations."""
    places = operands.places()
    leaves = {k: t.clone().requires_grad_(k in required) for k, t in places.items()}
    groups = [[t for (r, _), t in leaves.items() if r == role] for role in ("carry", "x", "const")]
    with torch.enable_grad():
        results = scan(steps, *groups)
    chosen = [i for i in read if results[i].requires_grad]
    wanted = [leaves[key] for key in sorted(required)]
    if not chosen:
        return results, dict.fromkeys(sorted(required), None)
    found = torch.autograd.grad(
        [results[i] for i in chosen],
        wanted,
        [random_like(results[i], i) for i in chosen],
        allow_unused=True,
    )
    return results, dict(zip(sorted(required), found, strict=True))


def own_gradients(
    parts: Differentiated, steps: int, operands: Operands, read: Sequence[int]
) -> tuple[tuple[Tensor, ...], dict[Operand, Tensor | None]]:
    """Results, and gradients by the backward graph, in torch."""
    count = len(parts.forward.results) - parts.saved
    with torch.no_grad():
        values = parts.forward(steps, *operands.groups())
        known: dict[Any, Tensor] = dict(operands.places())
        known |= {("saved", i): value for i, value in enumerate(values[count:])}
        for i, value in enumerate(values[:count]):
            dtype = value.dtype if value.is_floating_point() else torch.float64
            given = random_like(value, i) if i in read else torch.zeros_like(value, dtype=dtype)
            known["d_result", i] = given
        found = parts.backward(*(known[key] for key in parts.inputs))
    by_operand = dict(zip(parts.outputs, found, strict=True))
    reached = {key for result, key in parts.reaches if result in read}
    return values[:count], {key: by_operand[key] for key in reached}


def random_like(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(
        value.dtype if value.is_floating_point() else torch.float64
    )


def differentiated(scan: Scan, required: set[Operand], steps: int) -> Differentiated:
    parts = differentiate(scan, required, steps)
    assert isinstance(parts, Differentiated), str(parts)
    return parts


def floats(operands: Operands) -> set[Operand]:
    return {key for key, tensor in operands.places().items() if tensor.is_floating_point()}


def assert_close(got: Tensor | None, expected: Tensor | None, name: object) -> None:
    """float64 roundings: each is 1.1e-16 of a term, of which sums here have below a thousand.

    Values pass some ten operations in each of at most 5 steps. 1e-11 of the largest element leaves
    a factor of 50 for cancellation.
    """
    assert (got is None) == (expected is None), name
    if got is None or expected is None:
        return
    assert got.shape == expected.shape, name
    assert got.dtype == expected.dtype, name
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    distance = float((got - expected).abs().max()) if expected.numel() else 0.0
    assert distance <= 1e-11 * scale, f"{name}: {distance} of {scale}"


@pytest.mark.parametrize(("steps", "batch"), [(1, 3), (2, 1), (5, 3)])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_gradients_are_those_of_autograd(body: Body, steps: int, batch: int) -> None:
    operands = body.operands(steps, batch)
    scan = make_scan(body.step, *operands.groups())
    required = floats(operands)
    everything = list(range(len(scan.results)))
    parts = differentiated(scan, required, steps)
    for read in (everything, *([i] for i in everything)):
        expected_results, expected = eager_gradients(scan, steps, operands, required, read)
        results, got = own_gradients(parts, steps, operands, read)
        for a, b in zip(results, expected_results, strict=True):
            assert torch.equal(a, b)
        for key in sorted(required):
            assert_close(got.get(key), expected[key], (read, key))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_only_what_is_required_is_differentiated(body: Body) -> None:
    operands = body.operands(3, 2)
    scan = make_scan(body.step, *operands.groups())
    everything = list(range(len(scan.results)))
    for key in sorted(floats(operands)):
        parts = differentiated(scan, {key}, 3)
        assert {operand for _, operand in parts.reaches} <= {key}
        assert set(parts.outputs) <= {key} | {("carry", i) for i in range(scan.carries)}
        _, expected = eager_gradients(scan, 3, operands, {key}, everything)
        _, got = own_gradients(parts, 3, operands, everything)
        assert_close(got.get(key), expected[key], key)


@pytest.mark.parametrize("body", LOWERED, ids=lambda body: body.name)
def test_loops_of_gradients_become_kernels(body: Body) -> None:
    operands = body.operands(5, 3)
    scan = make_scan(body.step, *operands.groups())
    parts = differentiated(scan, floats(operands), 5)
    scans = [m for m in parts.backward.modules() if isinstance(m, Scan)]
    assert scans
    is_lowered = isinstance(lower_scan(parts.forward, "forward"), Lowered)
    assert is_lowered == (body.lowered == "both")  # others need passes before
    for index, each in enumerate(scans):
        assert each.reverse
        lowered = lower_scan(each, f"backward_{index}")
        assert isinstance(lowered, Lowered), f"{lowered}\n{each.body.code}"
