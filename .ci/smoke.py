"""Compile a kernel with the installed wheel and check its numbers; run outside the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsify


class Recurrent(nn.Module):
    """One recurrent layer of leaky integrate-and-fire neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(16, 64, bias=False)
        self.rec = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], 64)
        spikes = []
        for x_t in x:
            v = 0.5 * v + self.inp(x_t) + self.rec(z)
            z = (v > 1).to(v.dtype)
            v = v - z
            spikes.append(z)
        return torch.stack(spikes)


def make() -> tuple[nn.Module, Tensor]:
    """A model whose sums are exact in any order, and an input."""
    torch.manual_seed(0)
    model = Recurrent().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-24, 25, weight.shape) / 64)
    return model, torch.randint(0, 2, (6, 4, 16)).float()


def main() -> None:
    checkout = Path(__file__).resolve().parent / "sparsify"
    assert not checkout.exists() and "site-packages" in str(sparsify.__file__), sparsify.__file__
    model, x = make()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, timing=False)
        expected = model(x)
        assert expected.any(), "no neuron fired"
        assert torch.equal(fast(x), expected)
    print(fast.report)
    assert any(site.decision == "event" for site in fast.report.sites)
    print("the installed wheel compiles and agrees")


if __name__ == "__main__":
    main()
