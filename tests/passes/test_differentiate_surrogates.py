"""The surrogates of SNN libraries, each with its formula, and what they make a forward save."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan
from tests.models.step_bodies import Body, N, Operands
from tests.passes.test_differentiate import (
    assert_close,
    differentiated,
    eager_gradients,
    floats,
    own_gradients,
)
from tests.steps import apply, make_scan


def _halved_in_a_view(value: Tensor) -> Tensor:
    """A write that only a view shows."""
    value.view(value.shape).mul_(0.5)
    return value


Factor = Callable[[Tensor], Tensor]

# Of the distance u from the threshold. snnTorch, SpikingJelly, Norse, Sinabs, EvNN.
SMOOTH: dict[str, Factor] = {
    "ATan": lambda u: 1 / (1 + (math.pi * u) ** 2),
    "FastSigmoid": lambda u: 1 / (25 * u.abs() + 1) ** 2,
    "Sigmoid of snnTorch": lambda u: 25 * torch.exp(-25 * u) / (torch.exp(-25 * u) + 1) ** 2,
    "SpikeRateEscape": lambda u: 25 * torch.exp(-(u - 1).abs()),
    "SparseFastSigmoid": lambda u: (u > 0.1) / (25 * u.abs() + 1) ** 2,
    "Sigmoid": lambda u: (1 - torch.sigmoid(4 * u)) * torch.sigmoid(4 * u) * 4,
    "PiecewiseQuadratic": lambda u: (1 - u.abs()).clamp(min=0),
    "PiecewiseExp": lambda u: torch.exp(-u.abs()) / 2,
    "Erf": lambda u: torch.exp(-(u**2)) / math.sqrt(math.pi),
    "SoftSign": lambda u: 1 / (2 * (1 + u.abs()) ** 2),
    "HeaviTanh": lambda u: 1 - torch.tanh(u) ** 2,
    "Triangle": lambda u: 0.3 * torch.relu(1 - u.abs()),
    "in place": lambda u: u.clone().pow_(2).mul_(2).add_(1).reciprocal_(),
    "through a view": lambda u: _halved_in_a_view(u.abs() + 1).reciprocal(),
    "Gaussian": lambda u: torch.exp(-0.5 * (u / 0.3) ** 2),
}
# One of two numbers: a comparison, one bit, is all that they need.
OF_A_BIT: dict[str, Factor] = {
    "Triangular": lambda u: torch.where(u < 0, 1.0, -1.0),
    "LeakySpike": lambda u: (u > 0) + (1 - (u > 0).to(u.dtype)) * 0.1,
    "Rect": lambda u: 1.0 * (u.abs() < 0.5),
    "PiecewiseLeakyReLU": lambda u: torch.where(u.abs() < 1, 0.5, 0.01),
    "window": lambda u: u.abs() <= 1,
    "window of two bounds": lambda u: torch.logical_and(u > -1, u < 1).to(u.dtype),
    "StepPWL": lambda u: torch.ge(u, -0.5).type_as(u),
}


def surrogate(name: str, factor: Factor) -> Any:
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    def backward(ctx: Any, d: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return d * factor(u)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name.replace(" ", ""), (torch.autograd.Function,), methods)


def scan_with(function: Any) -> tuple[Scan, Operands]:
    def step(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
        v = v * 0.5 + x + z @ w.t()
        z = apply(function, v - 1.0)
        return v - z.detach(), z, z

    operands = Body("", step, consts=((N, N),)).operands(4, 3)
    return make_scan(step, *operands.groups()), operands


@pytest.mark.parametrize("name", [*SMOOTH, *OF_A_BIT])
def test_surrogates_of_libraries(name: str) -> None:
    scan, operands = scan_with(surrogate(name, (SMOOTH | OF_A_BIT)[name]))
    parts = differentiated(scan, floats(operands), 4)
    read = [0, 1, 2]
    _, expected = eager_gradients(scan, 4, operands, floats(operands), read)
    _, got = own_gradients(parts, 4, operands, read)
    for key in sorted(floats(operands)):
        assert_close(got.get(key), expected[key], key)
    loops = [parts.forward, *(m for m in parts.backward.modules() if isinstance(m, Scan))]
    assert len(loops) == 2
    for loop in loops:
        assert isinstance(lower_scan(loop, "loop"), Lowered), loop.body.code

    saved = [result.meta["val"].dtype for result in parts.forward.results[len(read) :]]
    of_surrogate = torch.bool if name in OF_A_BIT else torch.float64
    assert saved == [torch.bool, of_surrogate]


class SpikeAndDistance(torch.autograd.Function):
    """Two outputs, of which the second's gradient is the first's factor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        inside = u.abs() < scale
        ctx.save_for_backward(inside)
        ctx.scale = scale
        return (u > 0).to(u.dtype), u * scale

    @staticmethod
    def backward(ctx: Any, d_spike: Tensor, d_distance: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return d_spike * inside + d_distance * ctx.scale, None


@pytest.mark.parametrize("read", [[0, 1, 2, 3], [2], [3]])
def test_a_function_with_several_outputs(read: list[int]) -> None:
    def step(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
        v = v * 0.5 + x + z @ w.t()
        z, distance = apply(SpikeAndDistance, v - 1.0, 0.5)
        return v - z, z, z, distance

    operands = Body("", step, consts=((N, N),)).operands(4, 3)
    scan = make_scan(step, *operands.groups())
    parts = differentiated(scan, floats(operands), 4)
    _, expected = eager_gradients(scan, 4, operands, floats(operands), read)
    _, got = own_gradients(parts, 4, operands, read)
    for key in sorted(floats(operands)):
        assert_close(got.get(key), expected[key], key)
