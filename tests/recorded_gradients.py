"""Record a model with gradients and compare those of the graph with eager's, bit for bit.

The recorded graph runs the operations of the model in the model's order, so autograd adds up the
same terms in the same order: gradients are equal, not close.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.errors import TraceError
from sparsify.recording.record import record
from sparsify.recording.recording import Recording, Unrecorded
from tests.recorded import is_pure, perturbed, same, state

Gradients = list[Tensor | None]


def tensors_in(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def loss_of(result: object) -> Tensor:
    """A sum that gives every element of every output a gradient of its own."""
    total = torch.zeros(())
    for index, output in enumerate(tensors_in(result)):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(index)
            weights = torch.randn(output.shape, generator=generator)
            total = total + (weights.to(output.dtype) * output).sum()
    return total


def leaves_of(model: nn.Module, args: object) -> list[Tensor]:
    return [leaf for leaf in [*model.parameters(), *tensors_in(args)] if leaf.requires_grad]


def gradients_of(result: object, leaves: Sequence[Tensor], retain: bool = False) -> Gradients:
    found = torch.autograd.grad(
        loss_of(result), leaves, allow_unused=True, retain_graph=retain or None
    )
    return list(found)


def recorded(model: nn.Module, *args: Any) -> Recording:
    found = record(model, args, {})
    assert isinstance(found, Recording), found.error
    return found


def refused(model: nn.Module, *args: Any) -> TraceError:
    """The reason; the run itself must have eager's result and gradients."""
    eager, given = copied(model, args)
    expected = eager(*given)
    found = record(model, args, {})
    assert isinstance(found, Unrecorded)
    assert same(found.result, expected)
    if any(t.requires_grad for t in tensors_in(expected)):
        got = gradients_of(found.result, leaves_of(model, args))
        assert same(got, gradients_of(expected, leaves_of(eager, given)))
    return found.error


def copied(model: nn.Module, args: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Copies of both; arguments keep which of them require gradients."""
    return copy.deepcopy(model), copy.deepcopy(args)


def call(recording: Recording, *args: Any) -> Any:
    """Run the graph in place of the model."""
    assert recording.guard.matches(args, {}), recording.guard.explain(args, {})
    values = fx.Interpreter(recording.graph).run(*recording.calling.operands(args, {}))
    return recording.calling.deliver(values, args, {})


def check(model: nn.Module, *args: Any, calls: int = 2) -> Recording:
    """Record, then run graph and eager on these and on other inputs.

    Results, which of them require gradients, gradients of all parameters and inputs, which of them
    are None, and states must be equal.
    """
    eager, given = copied(model, args)
    expected = eager(*given)
    recording = recorded(model, *args)
    assert_same_gradients(recording.result, expected, (model, args), (eager, given))
    for k in range(calls):
        args = perturbed_like(args, seed=k)
        given = copy.deepcopy(args)
        expected = eager(*given)
        result = call(recording, *args)
        assert_same_gradients(result, expected, (model, args), (eager, given))
    is_pure(recording.graph)
    return recording


def assert_same_gradients(
    result: object,
    expected: object,
    ours: tuple[nn.Module, tuple[Any, ...]],
    eagers: tuple[nn.Module, tuple[Any, ...]],
) -> None:
    assert same(result, expected)
    required = [t.requires_grad for t in tensors_in(expected)]
    assert [t.requires_grad for t in tensors_in(result)] == required
    assert any(required)
    wanted = gradients_of(expected, leaves_of(*eagers))
    assert any(gradient is not None and gradient.any() for gradient in wanted)
    assert same(gradients_of(result, leaves_of(*ours)), wanted)
    assert same(state(ours[0]), state(eagers[0]))


def perturbed_like(args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Other values; the same tensors require gradients."""
    flat, spec = pytree.tree_flatten(args)
    others = pytree.tree_leaves(perturbed(args, seed))
    for old, new in zip(flat, others, strict=True):
        if isinstance(new, Tensor):
            new.requires_grad_(old.requires_grad)
    made: tuple[Any, ...] = pytree.tree_unflatten(others, spec)
    return made


class Weighted(nn.Module):
    """``function(self, *args)`` with a weight and a bias that require gradients."""

    def __init__(self, function: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.decay = nn.Parameter(torch.full((4,), 0.75))
        for name, value in attributes.items():
            if type(value) is Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)
