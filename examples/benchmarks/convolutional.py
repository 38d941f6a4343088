"""Convolutional spiking networks, written step by step, against dense convolutions.

python examples/benchmarks/convolutional.py                         # the table of sizes
python examples/benchmarks/convolutional.py --channels 64 --activity 0.02 0.05 0.1 0.2
python examples/benchmarks/convolutional.py --training              # forward, loss and backward

Three convolutions of 3 x 3 with leaky neurons on maps of 32 x 32 events of two polarities, halved
twice by max-pools or strides, and a linear readout. "hoisted" is PyTorch with each convolution
computed for all steps at once, also with channels last or with bfloat16 products. In training the
surrogate is a triangle of half-width 1.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import save
from torch import Tensor, nn
from torch.nn import functional
from training_networks import UnitTriangle

import sparsify
from sparsify.bench import measure_pairs

SIDE, INPUT_RATE, DECAY = 32, 0.05, 0.875
GRID = 2.0**-10  # weights are multiples of it below 1: sums of spikes are exact in any order
EXAMPLES = 3  # inputs that take turns
EAGER, HOISTED, FAST = "eager", "hoisted", "sparsify"
LAST, HALF, COMPILED = "hoisted, channels last", "hoisted, bfloat16", "hoisted, torch.compile"
EQUAL = (EAGER, HOISTED, LAST, FAST)


@dataclass(frozen=True)
class Size:
    """What is measured; ``activity`` is the share of neurons that fire in a step."""

    channels: int = 32
    batch: int = 16
    activity: float = 0.05
    pooled: bool = True
    steps: int = 20


SIZES = (
    Size(),
    Size(channels=64),
    Size(channels=64, batch=1),
    Size(channels=64, activity=0.1),
    Size(channels=64, pooled=False),
)


class Net(nn.Module):
    """Leaky integrate-and-fire neurons behind three convolutions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        channels, stride = size.channels, 1 if size.pooled else 2
        self.pool = nn.MaxPool2d(2) if size.pooled else nn.Identity()
        self.conv1 = nn.Conv2d(2, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.conv3 = nn.Conv2d(channels, 2 * channels, 3, stride=stride, padding=1)
        self.readout = nn.Linear(2 * channels * (SIDE // 4) ** 2, 10)
        self.thresholds = nn.Parameter(torch.ones(3), requires_grad=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.round(weight / GRID) * GRID)

    def forward(self, x: Tensor) -> Tensor:
        """Votes ``[B, 10]`` of events ``[T, B, 2, SIDE, SIDE]``."""
        votes = x.new_zeros(x.shape[1], 10)
        v1 = v2 = v3 = None
        for x_t in x:
            v1, z = self.fire(v1, self.conv1(x_t), 0)
            v2, z = self.fire(v2, self.conv2(self.pool(z)), 1)
            v3, z = self.fire(v3, self.conv3(self.pool(z)), 2)
            votes = votes + self.readout(z.flatten(1))
        return votes

    def fire(self, v: Tensor | None, current: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        v = current if v is None else DECAY * v + current
        z: Tensor = UnitTriangle.apply(v - self.thresholds[layer])  # type: ignore[no-untyped-call]
        return v - z.detach() * self.thresholds[layer], z


class Hoisted(Net):
    """The same with each convolution of all steps at once."""

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        z = x.flatten(0, 1)
        for layer, conv in enumerate((self.conv1, self.conv2, self.conv3)):
            current = conv(self.pool(z) if layer else z).unflatten(0, (steps, batch))
            v, fired = None, []
            for current_t in current:
                v, spikes = self.fire(v, current_t, layer)
                fired.append(spikes)
            z = torch.cat(fired)
        votes: Tensor = self.readout(z.flatten(1)).unflatten(0, (steps, batch)).sum(0)
        return votes


def calibrate(model: Net, x: Tensor, activity: float) -> list[float]:
    """Choose thresholds, layer by layer, and return which share of neurons then fires."""
    shares: list[float] = []
    for layer in range(3):
        low, high = 0.0, 8.0
        for _ in range(12):
            model.thresholds[layer] = round((low + high) / 2 / GRID) * GRID
            share = _rate(model, x, layer)
            low, high = (low, (low + high) / 2) if share < activity else ((low + high) / 2, high)
        shares.append(share)
    return shares


def _rate(model: Net, x: Tensor, layer: int) -> float:
    seen: list[float] = []
    fire = model.fire

    def watched(v: Tensor | None, current: Tensor, at: int) -> tuple[Tensor, Tensor]:
        state, z = fire(v, current, at)
        if at == layer:
            seen.append(float(z.mean()))
        return state, z

    model.fire = watched  # type: ignore[method-assign, assignment]
    model(x)
    del model.fire
    return sum(seen) / len(seen)


def draw(size: Size, steps: int, batch: int) -> Tensor:
    return (torch.rand(steps, batch, 2, SIDE, SIDE) < INPUT_RATE).float()


def measure(
    size: Size, rounds: int, *, compiled: bool = False, training: bool = False
) -> dict[str, Any]:
    """Measure everything, print a table and return its figures."""
    torch.manual_seed(0)
    model = Net(size).eval()
    with torch.no_grad():
        shares = calibrate(model, draw(size, 10, 2), size.activity)
    inputs = [draw(size, size.steps, size.batch) for _ in range(EXAMPLES)]
    print(
        f"\n{size.channels} channels, {'pooled' if size.pooled else 'strided'}, batch "
        f"{size.batch}, {size.steps} steps; {', '.join(f'{share:.1%}' for share in shares)} fire"
    )
    with torch.set_grad_enabled(training):
        fast: Any = sparsify.sparsify(model, inputs[0])
        functions = {EAGER: model, **dense_peers(model, size, compiled), FAST: fast}
        check = check_outputs
        if training:
            functions = {name: train_step(each) for name, each in functions.items()}
            functions[FAST](inputs[0])  # what training runs is compiled when it is called
            check = check_gradients
        print(fast.report)
        timings = measure_pairs(functions, rounds, inputs=inputs, check=check)
    print(timings)
    dense = [name for name in functions if name not in (EAGER, FAST)]
    best = min(dense, key=timings.median_ms)
    exact = min((name for name in dense if name != HALF), key=timings.median_ms)
    for name in dict.fromkeys((EAGER, exact, best)):
        print(f"sparsify over {name}: {timings.ratio(name, FAST)}")
    return {
        **asdict(size),
        "training": training,
        "shares": shares,
        "median_ms": {name: timings.median_ms(name) for name in timings.seconds},
        "over": {name: asdict(timings.ratio(name, FAST)) for name in timings.seconds},
        "contended": timings.why_contended,
    }


def dense_peers(model: Net, size: Size, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    hoisted = Hoisted(size).eval()
    hoisted.load_state_dict(model.state_dict())
    last: nn.Module = copy.deepcopy(hoisted).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def half(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            votes: Tensor = hoisted(x)
        return votes

    peers: dict[str, Callable[[Tensor], Tensor]] = {HOISTED: hoisted, LAST: last, HALF: half}
    return {**peers, COMPILED: torch.compile(hoisted)} if compiled else peers


def train_step(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], list[Tensor]]:
    """Forward, loss and backward; returns the gradients of what takes some."""

    def step(x: Tensor) -> list[Tensor]:
        labels = torch.arange(x.shape[1]) % 10
        loss = functional.cross_entropy(module(x) / len(x), labels)
        return list(torch.autograd.grad(loss, weights))

    weights = [p for p in owner_of(module).parameters() if p.requires_grad]
    return step


def owner_of(function: Any) -> nn.Module:
    """The module that a peer runs."""
    if isinstance(function, nn.Module):
        return function
    [owner] = [c.cell_contents for c in function.__closure__]
    assert isinstance(owner, nn.Module)
    return owner


def check_gradients(outputs: Mapping[str, Any]) -> None:
    """All spikes are equal, so gradients are, but for the order of some thousand additions."""
    for name in EQUAL:
        for got, expected in zip(outputs[name], outputs[EAGER], strict=True):
            distance = float((got - expected).norm())
            assert distance <= 1e-3 * float(expected.norm()), f"{name} is {distance:.3g} away"


def check_outputs(outputs: Mapping[str, Any]) -> None:
    """All spikes are equal, so votes are, but for the order in which a readout adds them up."""
    expected = outputs[EAGER]
    for name in EQUAL:
        distance = float((outputs[name] - expected).abs().max())
        assert distance <= 1e-4 * float(expected.abs().max()), f"{name} is {distance:.3g} away"


def _sizes(args: argparse.Namespace) -> Iterator[Size]:
    if args.quick:
        yield Size(channels=8, batch=2, steps=4)
        return
    if not (args.channels or args.batch or args.activity or args.strided):
        yield from SIZES
        return
    for channels in args.channels or [32]:
        for batch in args.batch or [16]:
            for activity in args.activity or [0.05]:
                yield Size(channels, batch, activity, not args.strided)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sizes that the arguments give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--channels", type=int, nargs="+", help="of the first two convolutions")
    parser.add_argument("--batch", type=int, nargs="+", help="samples a call")
    parser.add_argument("--activity", type=float, nargs="+", help="share of neurons that fire")
    parser.add_argument("--strided", action="store_true", help="strides in place of max-pools")
    parser.add_argument("--training", action="store_true", help="forward, loss and backward")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    rounds = 3 if args.quick else args.rounds
    options = {"compiled": args.compile, "training": args.training}
    figures = [measure(size, rounds, **options) for size in _sizes(args)]
    save(args.json, figures=figures)


if __name__ == "__main__":
    main()
