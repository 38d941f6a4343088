"""The gradients of one call, for checks and timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.arrangement import leaves_of

SEED = 1  # of the gradients of the results


def requirement(operands: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which operands require grad in this call; empty if none does, or gradients are disabled."""
    if not torch.is_grad_enabled():
        return ()
    required = tuple([operand.requires_grad for operand in operands])
    return required if True in required else ()


def differentiate_result(
    result: Any, operands: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> list[Tensor | None]:
    """Gradients of the ``operands`` that require grad, from ``weights``, those of all results.

    ``result`` is what a call returned, in any structure. None for what no result depends on.
    ``weights`` are random where none are given. Nothing is accumulated in ``.grad``, and the graph
    can be differentiated again.
    """
    results = _differentiable(result)
    sources = [operand for operand in operands if operand.requires_grad]
    if not results or not sources:
        return [None for _ in sources]
    if weights is None:
        weights = random_gradients(result)
    return propagate(results, weights, sources)


def propagate(
    results: Sequence[Tensor], gradients: Sequence[Tensor], sources: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``sources`` from those of ``results``, None for what none depends on.

    ``torch.autograd.grad`` imports sympy where it is given gradients: half a second, once.
    """
    seed: Tensor = _Seeded.apply(gradients, *results)  # type: ignore[no-untyped-call]
    return list(torch.autograd.grad(seed, sources, retain_graph=True, allow_unused=True))


class _Seeded(torch.autograd.Function):
    """A number whose derivatives with respect to the results are ``gradients``."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *results: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=results[0].device)

    @staticmethod
    def backward(ctx: Any, d_seed: Tensor) -> Any:
        return None, *ctx.gradients


def random_gradients(result: Any) -> list[Tensor]:
    """One for each tensor of ``result`` that requires grad, the same in every call."""
    return [_random_like(tensor, i) for i, tensor in enumerate(_differentiable(result))]


def _differentiable(result: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _random_like(result: Tensor, index: int) -> Tensor:
    generator = torch.Generator(result.device).manual_seed(SEED + index)
    shape, dtype, device = result.shape, result.dtype, result.device
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)
