"""Functions of tensors as graphs: gradients, writes, constants, and what ends the run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.passes.nodes.trace_operations import Tracer, UntraceableError, trace_operations

aten = torch.ops.aten
X, Y = torch.randn(3, 4), torch.randn(3, 4)


def traced(function: Callable[..., Tensor], *examples: Tensor) -> fx.Graph:
    def run(tracer: Tracer, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [function(*tensors)]

    return trace_operations(run, examples)


def check(function: Callable[..., Tensor], *operands: Tensor) -> list[Any]:
    """The graph, traced on other values, gives the function's result; returns its operations."""
    graph = traced(function, *(torch.zeros_like(operand) for operand in operands))
    [result] = fx.GraphModule(nn.Module(), graph)(*operands)
    assert torch.equal(result, function(*operands))
    assert all(not n.target._schema.is_mutable for n in graph.nodes if n.op == "call_function")
    return [node.target for node in graph.nodes if node.op == "call_function"]


def gradient(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad((torch.relu(leaf) * 3).sum(), leaf)[0]


def test_gradients_are_taken_apart() -> None:
    assert aten.threshold_backward.default not in check(gradient, X)


def test_writes_are_new_values() -> None:
    assert aten.pow.Tensor_Scalar in check(lambda x: (x * 2).pow_(2), X)

    def through_a_view(x: Tensor, y: Tensor) -> Tensor:
        z = x * 1
        z[1].copy_(y[0])
        z.view(-1)[2:5].mul_(3)
        return z

    check(through_a_view, X, Y)


def test_a_tensor_of_one_number_is_a_literal() -> None:
    assert aten.full.default in check(lambda x: x * torch.tensor([2.0, 2.0, 2.0, 2.0]), X)
    graph = traced(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]), X)
    assert [node.op for node in graph.nodes].count("get_attr") == 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x * 2 if x.sum() > 0 else x, "value reaches Python"),
        (lambda x: x * float(x[0, 0]), "value reaches Python"),
        (lambda x: x[x > 0], "depends on values"),
        (lambda x: x * Y, "no recorded operation made"),
    ],
)
def test_what_only_these_values_decide_ends_the_run(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(UntraceableError, match=reason):
        traced(function, X)


class Swallows(torch.autograd.Function):
    """Uses a value in its backward, and hides the error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        try:
            return d * float(d.tolist()[0][0])
        except RuntimeError:
            return d


def test_an_error_that_is_caught_is_not_forgotten() -> None:
    def run(tracer: Tracer, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaf = tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            result = tracer.watched(Swallows).apply(leaf)
            return torch.autograd.grad((result * result).sum(), leaf)

    with pytest.raises(UntraceableError, match="leave torch through tolist"):
        trace_operations(run, [X])


def test_random_numbers_are_drawn_for_nobody() -> None:
    before = torch.get_rng_state()
    graph = traced(lambda x: x * torch.rand_like(x), X)
    assert torch.equal(torch.get_rng_state(), before)
    assert aten.rand_like.default in [node.target for node in graph.nodes]


def test_training_does_not_import_the_compiler_of_torch_or_sympy() -> None:
    program = """
import sys, torch, sparsify
from tests.models.spiking_net import Spiking, spike_trains
from tests.models.zoo_surrogates import FastSigmoid
model = Spiking(FastSigmoid.apply)
fast = sparsify.sparsify(model, spike_trains().float(), timing=False)
assert fast.compiled.is_compiled and fast.compiled.entries[-1].required
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"
