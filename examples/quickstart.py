"""A spiking network in plain PyTorch, made fast by one call."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

import sparsify  # noqa: F401  gives every nn.Module the method `sparsify`

STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 100, 1, 700, 512, 20


class Spike(torch.autograd.Function):
    """A step whose gradient is a fast sigmoid's."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        slopes: Tensor = grad / (1 + 10 * above.abs()) ** 2
        return slopes


class SpikingNet(nn.Module):
    """Recurrent leaky integrate-and-fire neurons and a readout that counts their votes."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, HIDDEN, bias=False)
        self.recur = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.vote = nn.Linear(HIDDEN, CLASSES)
        nn.init.normal_(self.encode.weight, std=0.3)
        nn.init.normal_(self.recur.weight, std=0.3 / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = x.new_zeros(x.shape[1], CLASSES)
        for x_t in x:
            v = 0.9 * v + self.encode(x_t) + self.recur(z)
            z = Spike.apply(v - 2)
            v = v - 2 * z
            votes = votes + self.vote(z)
        return votes


def milliseconds(model: nn.Module, x: Tensor) -> float:
    """The best of ten calls."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    torch.manual_seed(0)
    model = SpikingNet().eval()
    x = (torch.rand(STEPS, BATCH, INPUTS) < 0.02).float()
    with torch.no_grad():
        fast = model.sparsify(x)
        print(fast.report)
        # The same model to everybody else: parameters, state_dict, .to(), pickle, other sizes.
        print("the same classes:", bool((fast(x).argmax(1) == model(x).argmax(1)).all()))
        print(f"before {milliseconds(model, x):.2f} ms, now {milliseconds(fast, x):.2f} ms a call")
    assert fast.original is model


if __name__ == "__main__":
    main()
