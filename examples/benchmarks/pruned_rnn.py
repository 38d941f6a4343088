"""Layers of torch whose weights are pruned, whose values are zero nowhere: GRU, LSTM, tanh RNN.

python examples/benchmarks/pruned_rnn.py                              # the table of sizes
python examples/benchmarks/pruned_rnn.py --layer GRU --hidden 1024 --density 0.05 0.1 0.2 0.5
python examples/benchmarks/pruned_rnn.py --layer RNN --hidden 2048 4096 --batch 32

Eager is torch's own layer, which reads all weights whatever they are. "dense" is our loop with all
weights, "pruned" the one that leaves out zeros, "chosen" what sparsify decides on by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from command_line import save
from torch import Tensor, nn

import sparsify
from sparsify import ir
from sparsify.bench import measure_pairs

LAYERS: dict[str, Callable[[int, int], nn.RNNBase]] = {
    "GRU": nn.GRU,
    "LSTM": nn.LSTM,
    "RNN": nn.RNN,
}
INPUTS = 256
EXAMPLES = 4  # inputs that take turns
EAGER, DENSE, PRUNED, CHOSEN = "eager", "sparsify dense", "sparsify pruned", "sparsify chosen"
# Sums of thousands of terms in another order, carried on for a hundred steps of states below one.
FAR = 1e-3


@dataclass(frozen=True)
class Size:
    """What is measured; ``density`` is the share of all weights that is left."""

    layer: str
    hidden: int
    batch: int = 1
    density: float = 0.1
    steps: int = 100


SIZES = (
    *(Size("GRU", hidden) for hidden in (512, 1024, 2048)),
    *(Size("LSTM", hidden) for hidden in (512, 1024, 2048)),
    Size("RNN", 1024),
    *(Size(layer, 1024, batch=32) for layer in ("GRU", "LSTM")),
    *(Size("RNN", hidden, batch=32) for hidden in (2048, 4096)),
)


class Net(nn.Module):
    """One layer; its output is what counts."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layer = LAYERS[size.layer](INPUTS, size.hidden)
        with torch.no_grad():
            for weight in self.layer.parameters():
                if weight.dim() == 2:
                    weight.mul_(torch.rand_like(weight) < size.density)
                    # As large sums as before: training would see to that.
                    weight.div_(size.density**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden values ``[T, B, hidden]`` of ``x [T, B, INPUTS]``."""
        y: Tensor = self.layer(x)[0]
        return y


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Measure everything, print a table and return its figures."""
    torch.manual_seed(0)
    model = Net(size).eval()
    inputs = [torch.randn(size.steps, size.batch, INPUTS) for _ in range(EXAMPLES)]
    print(
        f"\nnn.{size.layer}, {size.hidden} units, batch {size.batch}, {size.steps} steps, "
        f"{size.density:.0%} of weights left"
    )
    fast: Any = sparsify.sparsify(model, inputs[0])
    print(fast.report)
    variants = {EAGER: model, DENSE: _pinned(model, inputs[0], ir.DENSE_ROWS)}
    variants[PRUNED] = _pinned(model, inputs[0], ir.Layout("compressed-rows"))
    timings = measure_pairs({**variants, CHOSEN: fast}, rounds, inputs=inputs, check=check_outputs)
    print(timings)
    print(f"chosen over eager: {timings.ratio(EAGER, CHOSEN)}")
    print(f"pruned over dense kernel: {timings.ratio(DENSE, PRUNED)}")
    return {
        **asdict(size),
        "median_ms": {name: timings.median_ms(name) for name in timings.seconds},
        "chosen_over_eager": asdict(timings.ratio(EAGER, CHOSEN)),
        "pruned_over_dense": asdict(timings.ratio(DENSE, PRUNED)),
        "contended": timings.why_contended,
    }


def _pinned(model: nn.Module, x: Tensor, layout: ir.Layout) -> Any:
    """The recurrent product through weights in this layout; the input's as is fastest."""
    plan = sparsify.Plan().pin("layer.weight_hh_l0", "dense", layout)
    return sparsify.sparsify(model, x, plan=plan)


def check_outputs(outputs: Mapping[str, Any]) -> None:
    """All compute the same, to rounding."""
    expected = outputs[EAGER]
    for name, output in outputs.items():
        distance = float((output - expected).abs().max())
        assert distance < FAR, f"{name} is {distance:.3g} from eager"


def _sizes(args: argparse.Namespace) -> Iterator[Size]:
    if args.quick:
        yield Size("GRU", 64, steps=10)
        return
    if not (args.layer or args.hidden or args.batch or args.density):
        yield from SIZES
        return
    for layer in args.layer or ["GRU"]:
        for hidden in args.hidden or [1024]:
            for batch in args.batch or [1]:
                for density in args.density or [0.1]:
                    yield Size(layer, hidden, batch, density)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sizes that the arguments give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--layer", choices=LAYERS, nargs="+", help="kinds of layers")
    parser.add_argument("--hidden", type=int, nargs="+", help="units of the layer")
    parser.add_argument("--batch", type=int, nargs="+", help="samples a call")
    parser.add_argument("--density", type=float, nargs="+", help="share of weights that is left")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args(argv)
    rounds = 3 if args.quick else args.rounds
    with torch.no_grad():
        figures = [measure(size, rounds) for size in _sizes(args)]
    save(args.json, figures=figures)


if __name__ == "__main__":
    main()
