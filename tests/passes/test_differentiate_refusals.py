"""Surrogates whose gradients are refused, or wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsify.errors import Refusal, TraceError
from sparsify.passes.gradients.differentiate import differentiate
from sparsify.scans.scan import Scan
from tests.models.step_bodies import Operands
from tests.steps import apply, make_scan


def heaviside(u: Tensor) -> Tensor:
    return (u > 0).to(u.dtype)


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d * torch.rand_like(d)


class Branching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d * 2 if d.sum() > 0 else d


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return torch.from_numpy(np.tanh(d.numpy()))


SCALE = torch.rand(6, dtype=torch.float64)


class Capturing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d * SCALE


class MakesTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d * torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=d.dtype)


class WrongShape(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return d[:, :2]


class TooMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        return heaviside(u)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        return d, d


def scan_of(function: type[torch.autograd.Function]) -> Scan:
    def step(v: Tensor, x: Tensor, scale: Tensor) -> Any:
        v = v * scale + x
        z = apply(function, v - 1.0)
        return v - z, z

    carry, x = torch.rand(3, 6, dtype=torch.float64), torch.rand(4, 3, 6, dtype=torch.float64)
    operands = Operands((carry,), (x,), (torch.rand(6, dtype=torch.float64),))
    return make_scan(step, *operands.groups())


def refusal_of(function: type[torch.autograd.Function]) -> Refusal:
    scan = scan_of(function)
    refusal = differentiate(scan, {("carry", 0), ("x", 0), ("const", 0)}, 4)
    assert isinstance(refusal, Refusal)
    [use] = [n for n in scan.body.graph.nodes if str(n.target) == function.__name__]
    assert refusal.location == use.meta["location"]
    return refusal


def test_random_numbers_in_a_backward_are_refused() -> None:
    refusal = refusal_of(Noisy)
    assert refusal.code == "random"
    assert refusal.reason == "The backward of Noisy draws random numbers in every step."
    assert refusal.remedy == "Use a deterministic surrogate gradient."


@pytest.mark.parametrize("function", [Branching, InNumpy, Capturing])
def test_python_that_needs_values_is_refused(function: type[torch.autograd.Function]) -> None:
    refusal = refusal_of(function)
    assert refusal.code == "unsupported-op"
    start = f"The backward of {function.__name__} cannot be traced without values: "
    assert refusal.reason.startswith(start)
    assert "torch.where instead of if" in refusal.remedy


def test_a_tensor_of_numbers_in_a_backward_is_refused() -> None:
    refusal = refusal_of(MakesTensor)
    assert refusal.code == "unsupported-op"
    assert refusal.reason == "The backward of MakesTensor makes a tensor of numbers in every step."


@pytest.mark.parametrize("function", [WrongShape, TooMany])
def test_a_wrong_gradient_is_an_error_that_names_the_function(
    function: type[torch.autograd.Function],
) -> None:
    with pytest.raises(TraceError, match=rf"model.py.*{function.__name__}.backward is wrong"):
        differentiate(scan_of(function), {("carry", 0)}, 4)


def test_a_loop_within_the_loop_is_refused() -> None:
    scan = scan_of(Noisy)
    graph = scan.body.graph
    scan.body.add_module("inner", torch.nn.Identity())
    with graph.inserting_before(next(n for n in graph.nodes if n.op == "call_function")):
        graph.call_module("inner", ())
    refusal = differentiate(scan, {("carry", 0)}, 4)
    assert isinstance(refusal, Refusal)
    assert refusal.code == "unsupported-op"
    assert "runs another loop" in refusal.reason
