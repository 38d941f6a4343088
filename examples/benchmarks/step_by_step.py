"""A recurrent cell that is called step by step, as where inputs arrive one by one.

python examples/benchmarks/step_by_step.py
python examples/benchmarks/step_by_step.py --hidden 1024 --activity 0.05 --no-compile

Each function takes 100 steps, from zero states. Weights are exact in float32, so all give equal
spikes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from compare import CALIBRATION, INPUT_RATE, INPUTS, draw_inputs
from networks import LEAK, Recurrent, spike_trains
from torch import Tensor, nn

import sparsify
from sparsify.bench import measure_pairs

State = tuple[Tensor, Tensor]
SETTLE_SECONDS = 1.0  # of calls that read the weights, before Linux is asked about them instead


class Cell(nn.Module):
    """One step of the layer: ``x, (v, z) -> z, (v, z)``."""

    def __init__(self, layer: Recurrent) -> None:
        super().__init__()
        self.inp, self.rec, self.theta = layer.inp, layer.rec, layer.theta

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        v, z = state
        v = LEAK * v + self.inp(x) + self.rec(z)
        z = (v > self.theta).to(v.dtype)
        return z, (v - z * self.theta, z)


def take_steps(cell: Callable[..., tuple[Tensor, State]], hidden: int, x: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[1], hidden)
    state, spikes = (zeros, zeros), []
    for x_t in x:
        z, state = cell(x_t, state)
        spikes.append(z)
    return torch.stack(spikes)


def check_equal(outputs: Mapping[str, Any]) -> None:
    """Raises RuntimeError if spikes differ."""
    for name, spikes in outputs.items():
        if not torch.equal(spikes, outputs["eager"]):
            raise RuntimeError(f"{name} gives other spikes than eager")


@torch.inference_mode()
def measure(hidden: int, batch: int, activity: float, rounds: int, compiled: bool) -> None:
    torch.manual_seed(0)
    layer = Recurrent(INPUTS, hidden).eval()
    layer.calibrate(spike_trains(*CALIBRATION, INPUTS, INPUT_RATE), activity)
    inputs = draw_inputs(100, batch)
    cell = Cell(layer).eval()
    z = layer(inputs[0])[-1]
    fast: Any = sparsify.sparsify(cell, inputs[0][0], (torch.zeros_like(z), z))
    cells: dict[str, Any] = {"eager": cell, "sparsify": fast}
    if compiled:
        cells["compile"] = torch.compile(cell)
    functions = {name: partial(take_steps, each, hidden) for name, each in cells.items()}
    began = time.monotonic()
    while time.monotonic() - began < SETTLE_SECONDS:
        functions["sparsify"](inputs[0])
    timings = measure_pairs(functions, rounds, inputs=inputs, check=check_equal)
    rate = float(functions["eager"](inputs[0]).mean())
    print(f"hidden {hidden}, batch {batch}, {rate:.1%} firing: microseconds a step")
    for name in functions:
        us = timings.median_ms(name) / inputs[0].shape[0] * 1e3
        print(f"  {name:<10}{us:8.1f}   {timings.ratio(name, 'sparsify')} of ours")
    print(f"  {[(site.name, site.decision) for site in fast.report.sites]}")
    if timings.why_contended:
        print(f"  NOT VALID: {timings.why_contended}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--activity", type=float, default=0.075)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.rounds, args.no_compile = [64], 3, True
    for hidden in args.hidden:
        measure(hidden, args.batch, args.activity, args.rounds, not args.no_compile)


if __name__ == "__main__":
    main()
