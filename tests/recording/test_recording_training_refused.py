"""What cannot be recorded with gradients: the message names what, the line and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.recording.record import record
from sparsify.recording.recording import Recording, Unrecorded
from tests.models.surrogates import ATan, Gaussian
from tests.recorded_gradients import Weighted, check, refused

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.clamp_(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (torch.rand_like(x) < x).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def saved_by_hand(self: Any, x: Tensor) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return (x @ self.weight).sigmoid()


def inner_gradient(self: Any, x: Tensor) -> Any:
    h = (x @ self.weight).sin()
    [slope] = torch.autograd.grad(h.sum(), x, create_graph=True)
    return h * slope.detach()


def inner_backward(self: Any, x: Tensor) -> Any:
    y = (x.detach().requires_grad_() * 2).sum()
    torch.autograd.backward([y])
    return x @ self.weight


def retained(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    h.retain_grad()
    return h * 2


def hooked(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    h.register_hook(lambda gradient: gradient * 2)
    return h * 2


def maker_of(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    return h if h.grad_fn is None else h * 2


def own_leaf(self: Any, x: Tensor) -> Any:
    v = torch.zeros(3, 4, requires_grad=True)
    return x @ self.weight, v * 2


def sets_requires_grad(self: Any, x: Tensor) -> Any:
    self.scale.requires_grad_()
    return x @ self.weight * self.scale


def reentrant(self: Any, x: Tensor) -> Any:
    result: Tensor = checkpoint(lambda h: (h @ self.weight).sin(), x, use_reentrant=True)
    return result


class ReadsOthers(torch.autograd.Function):
    """Its forward reads a tensor that a function among its arguments holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any) -> Tensor:
        result: Tensor = (x > 0).float() * shape(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Holder:
    """Hides a tensor from who looks at closures."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self, x: Tensor) -> Any:
        return x * self.tensor


def holds_a_result(self: Any, x: Tensor) -> Any:
    gain = x.abs().mean().detach()
    return Gaussian.apply(x @ self.weight, lambda u: u * gain)


REFUSED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "mark_dirty": (
        lambda self, x: InPlace.apply(x @ self.weight),
        "InPlace.forward writes to its argument in place (mark_dirty); let it return a new tensor",
        "InPlace.apply",
    ),
    "a function that holds a result": (
        holds_a_result,
        "Gaussian is given a function that holds a tensor of this call; pass the tensor to apply",
        "Gaussian.apply",
    ),
    "a function that holds an input": (
        lambda self, x: Gaussian.apply(x @ self.weight, lambda u: u * x),
        "Gaussian is given a function that holds a tensor of this call",
        "Gaussian.apply",
    ),
    "a tensor that is no argument": (
        lambda self, x: ReadsOthers.apply(x @ self.weight, Holder(x.detach() * 2)),
        "ReadsOthers.forward reads a tensor of this call that is none of its arguments",
        "return x * self.tensor",
    ),
    "saved-tensor hooks": (saved_by_hand, "saved_tensors_hooks are used", "saved_tensors_hooks("),
    "autograd.grad": (inner_gradient, "computed inside forward", "torch.autograd.grad("),
    "autograd.backward": (inner_backward, "computed inside forward", "torch.autograd.backward"),
    "retain_grad": (retained, "retain_grad() is called inside forward", "h.retain_grad()"),
    "hook": (hooked, "a hook is put on a tensor inside forward", "register_hook"),
    "grad_fn": (maker_of, "grad_fn", "h.grad_fn is None"),
    "a leaf of its own": (own_leaf, "requires_grad is set inside forward", "v * 2"),
    "requires_grad_": (sets_requires_grad, "forward sets requires_grad of scale", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, message, line = REFUSED[name]
    error = refused(Weighted(function, scale=torch.ones(4)), X)
    assert message in str(error)
    if line:
        assert error.location is not None and line in error.location.code


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.to(grad.dtype).t(), x.to(grad.dtype).t() @ grad


def test_a_weight_that_autocast_keeps_for_a_function() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        return Product.apply(Product.apply(x, self.weight), self.weight)

    for cache, reason in ((True, "cache_enabled=False"), (False, "")):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            found = record(Weighted(forward), (X,), {})
        assert isinstance(found, Unrecorded) == cache
        if isinstance(found, Unrecorded):
            assert reason in str(found.error) and found.error.location is not None


def test_random_numbers_in_a_function() -> None:
    torch.manual_seed(0)

    found = record(Weighted(lambda self, x: Noisy.apply(x @ self.weight)), (X,), {})
    assert isinstance(found, Unrecorded)
    assert "Noisy.forward draws random numbers" in str(found.error)
    assert "pass them in" in str(found.error)


def test_a_reentrant_checkpoint() -> None:
    model = Weighted(reentrant)
    found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "give it use_reentrant=False" in str(found.error)
    found.result.sum().backward()
    assert model.weight.grad is not None


@torch.jit.script
def scripted(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight).sigmoid() * 2 + x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("then", [1.0, None])
def test_gradients_in_c(then: float | None) -> None:
    """After some runs torch.jit has a backward of its own, which the dispatcher does not show."""
    square = torch.randn(4, 4, requires_grad=True)
    for _ in range(4):
        scripted(square, square).sum().backward()
    error = refused(
        Weighted(lambda self, x: scripted(x, self.weight) * (then or self.decay)), square
    )
    assert "torch.jit.script" in str(error) and "write that part in Python" in str(error)


def test_a_gradient_that_is_read() -> None:
    model = Weighted(lambda self, x: x @ self.weight + self.weight.grad.sum())
    model.weight.grad = torch.ones(4, 4)

    found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "forward reads a tensor's .grad" in str(found.error)


def test_a_backward_hook_on_a_submodule() -> None:
    seen: list[object] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_full_backward_hook(lambda module, before, after: seen.append(module))

    found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "a backward hook is on a module" in str(found.error)
    found.result.sum().backward()
    assert seen == [model[0]]


def test_hooks_around_the_model() -> None:
    with torch.autograd.graph.save_on_cpu():
        error = refused(Weighted(lambda self, x: x @ self.weight), X)
    assert "saved_tensors_hooks are in use around the model" in str(error)


def test_a_detached_state() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.mem.detach_()
        self.mem = x @ self.weight + self.mem
        return self.mem * 2

    model = Weighted(forward, mem=torch.zeros(3, 4))

    first = record(model, (X,), {})
    assert isinstance(first, Recording), first.error
    found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "forward detaches mem in place; bind the detached tensor instead" in str(found.error)


def test_checkpoint_without_reentry_is_recorded() -> None:
    """Several times: what saves the tensors of a Function runs where torch records no gradients."""

    def forward(self: Any, x: Tensor) -> Any:
        def part(h: Tensor) -> Tensor:
            spikes: Tensor = ATan.apply(h @ self.weight, 2.0)
            return spikes.sin()

        first: Tensor = checkpoint(part, x, use_reentrant=False)
        result: Tensor = checkpoint(part, x + 1, use_reentrant=False)
        return first + result * self.decay

    check(Weighted(forward), X)
