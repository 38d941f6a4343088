"""Gradients of event-based gated units are computed where their units fired or nearly did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.graphs.loops import BACKWARD
from sparsify.plan import GRADIENT
from tests.models.zoo_feedforward import IN
from tests.models.zoo_training import EGRU, TOKENS, EGRULanguageModel, EventGate, TwoExchangeEGRU
from tests.training_harness import (
    Gradients,
    assert_same_gradients,
    assert_trained,
    gradients_of,
    sparsify_training,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STEPS, B = 7, 4
EPSILON = 8.0  # of the window: units further than 1/8 from threshold pass nothing on
# As for MOST_RELATIVE of the harness, for sums that cancel down to a hundredth of their terms.
MOST_RELATIVE = 1e-10

# The network, its sites, and the products of each gradient that are restricted: with two exchanges
# that of the candidate is not, as the reset gate multiplies it in the step that computes it. With
# several layers each one computes the product of what reads its events, too.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "trace": (EGRU, ("layer.rec",), 3),
    "clamped in place": (lambda: EGRU(in_place=True), ("layer.rec",), 3),
    "three layers": (EGRULanguageModel, tuple(f"layers.{i}.rec" for i in range(3)), 4),
    "two exchanges": (TwoExchangeEGRU, ("u", "r"), 1),
}


def inputs_of(model: nn.Module) -> Tensor:
    if isinstance(model, EGRULanguageModel):
        return torch.randint(TOKENS, (STEPS, B))
    return torch.randn(STEPS, B, IN, dtype=torch.float64)


def gradients_and_distances(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[Gradients, Tensor]:
    """Eager's gradients, and how far units are above threshold: ``[layers, T, B, N]``."""
    seen: list[Tensor] = []
    fire = EventGate.forward

    def watched(ctx: Any, above: Tensor) -> Tensor:
        seen.append(above.detach())
        return fire(ctx, above)

    with monkeypatch.context() as patch:
        patch.setattr(EventGate, "forward", staticmethod(watched))
        gradients = gradients_of(model, x)
    return gradients, torch.stack(seen).reshape(-1, STEPS, *seen[0].shape)


@pytest.mark.parametrize("case", CASES)
def test_products_are_restricted_to_units_that_fired_or_nearly_did(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, sites, restricted = CASES[case]
    torch.manual_seed(0)
    model = make().double()
    x = inputs_of(model)
    monkeypatch.setattr(EventGate, "epsilon", EPSILON)
    expected, above = gradients_and_distances(model, x, monkeypatch)
    wanted = (above > 0) | (EPSILON * above.abs() < 1)
    fast = sparsify_training(model, x.clone().requires_grad_(x.is_floating_point()))
    got = gradients_of(fast, x)
    assert_same_gradients(got, expected, MOST_RELATIVE)
    assert_trained(fast, sites)
    kernels = [kernel for name, kernel in fast.kernels.items() if BACKWARD in name]
    counts = [
        kernel.events[gather.result]
        for kernel in kernels
        for gather in kernel.kernel.gathers
        if gather.only is not None
    ]
    assert len(counts) == restricted * len(sites)
    shares = [float(layer.double().mean()) for layer in wanted]
    assert all(0 < share < 0.9 for share in shares)
    assert sorted(n / total for n, total in counts) == pytest.approx(
        sorted(share for share in shares for _ in range(len(counts) // len(shares)))
    )
    if case != "two exchanges":
        for site, share in zip(sites, shares, strict=True):
            assert fast.report[f"{site}{GRADIENT}"].activity == pytest.approx(share)
