"""Networks that draw random numbers in every step, with and without gradients.

python examples/benchmarks/drawing.py
python examples/benchmarks/drawing.py --hidden 1024 --rounds 7

Two recurrent layers are trained with dropout behind each, and an image is shown to two layers as
random spikes. Both draw the numbers that eager draws from the same seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from networks import LEAK
from torch import Tensor, nn
from training_networks import UnitTriangle

import sparsify
from sparsify.bench import measure_pairs

STEPS = 100

spike: Any = UnitTriangle.apply


class Dropping(nn.Module):
    """``[steps, batch, inputs]`` through two recurrent layers, each step with masks of its own."""

    def __init__(self, hidden: int, inputs: int = 100, classes: int = 10) -> None:
        super().__init__()
        self.encode, self.up = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.first = nn.Linear(hidden, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden, bias=False)
        self.read, self.dropout = nn.Linear(hidden, classes), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        v = u = y = z = x.new_zeros(x.shape[1], self.read.in_features)
        votes = []
        for x_t in x:
            v = LEAK * v + self.encode(x_t) + self.first(y)
            y = spike(v - 1)
            v = v - y.detach()
            u = LEAK * u + self.up(self.dropout(y)) + self.second(z)
            z = spike(u - 1)
            u = u - z.detach()
            votes.append(self.read(self.dropout(z)))
        return torch.stack(votes)


class Encoded(nn.Module):
    """``[batch, inputs]`` as spikes whose rates are the values, through two layers."""

    def __init__(self, hidden: int, inputs: int = 784, classes: int = 10) -> None:
        super().__init__()
        self.encode, self.up = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.read = nn.Linear(hidden, classes)

    def forward(self, image: Tensor) -> Tensor:
        v = u = image.new_zeros(image.shape[0], self.read.in_features)
        votes = []
        for _ in range(STEPS):
            v = LEAK * v + self.encode((torch.rand_like(image) < image).to(image.dtype))
            y = spike(v - 1)
            v = v - y
            u = LEAK * u + self.up(y)
            z = spike(u - 1)
            u = u - z
            votes.append(self.read(z))
        return torch.stack(votes).mean(0)


def train(parameters: list[nn.Parameter], module: Callable[[Tensor], Tensor], x: Tensor) -> None:
    for parameter in parameters:
        parameter.grad = None
    module(x).square().mean().backward()  # type: ignore[no-untyped-call]


def measure(model: nn.Module, x: Tensor, training: bool, rounds: int) -> None:
    model.train(training)
    with torch.set_grad_enabled(training):
        fast: Any = sparsify.sparsify(model, x)
        run = partial(train, list(model.parameters())) if training else _call
        functions = {"eager": partial(run, model), "sparsify": partial(run, fast)}
        timings = measure_pairs(functions, rounds, inputs=[x])
    name = f"{type(model).__name__}, {'a training step' if training else 'a call'}"
    ours = timings.median_ms("sparsify")
    print(f"{name}: {ours:.1f} ms, {timings.ratio('eager', 'sparsify')} over eager")
    print(f"  {[(site.name, site.decision) for site in fast.report.sites]}")
    if timings.why_contended:
        print(f"  NOT VALID: {timings.why_contended}")


def _call(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return module(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.batch, args.rounds = 32, 4, 3
    torch.manual_seed(0)
    spikes = (torch.rand(STEPS, args.batch, 100) < 0.1).float()
    measure(Dropping(args.hidden), spikes, True, args.rounds)
    measure(Encoded(args.hidden), 0.3 * torch.rand(args.batch, 784), False, args.rounds)


if __name__ == "__main__":
    main()
