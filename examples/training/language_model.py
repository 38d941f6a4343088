"""An event-based language model of English text beside ``nn.GRU`` and ``nn.LSTM`` of equal size.

python examples/training/language_model.py --plot egru.png --json egru.json

The text is Python's own reference manual (``pydoc_data.topics``, in every CPython), the units are
EGRUs (Subramoney et al. 2023) in the form of EvNN. All are trained on the same characters, by
truncated back-propagation through time; what is compared is the time to equal held-out loss:
updates until it is reached, which no other load changes, at a pace that is measured at the end, by
turns. With ``--kept FOLDER`` a run that was finished is not trained again: train whenever the
machine has time for it, and call the same command on a quiet one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from example_options import arguments
from kept_runs import KeptRuns
from pace import Update, at_pace, compare_times, measure_paces, show_paces
from torch import Tensor, nn
from training_loop import (
    EAGER,
    SPARSIFIED,
    Run,
    compiled_again,
    largest_gap,
    save,
    show_decisions,
    summarise,
    train,
    update,
)

import sparsify

GAMMA, EPSILON = 0.7, 1.5  # height and steepness of the triangle behind the gate
TARGET, PRICE = 0.1, 30.0  # share of units that may be active for free, and what more costs
EGRU_RATE, GATED_RATE = 1e-2, 3e-3  # each learns best with its own
SHARE_OF_TRAINING = 0.9
UPDATES = 24  # between two evaluations, about a quarter of the text
RECORDED = 2  # first updates: one without and one with a state, a recording each
ROUNDS = 12  # in which the pace is measured
State = Any  # what the model's layers carry from chunk to chunk; None at first


class EventGate(torch.autograd.Function):
    """1 above threshold; its pseudo-derivative is zero further than 1 / EPSILON from it."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        result: Tensor = grad * GAMMA * torch.relu(1 - EPSILON * above.abs())
        return result


def start_for_events(linear: nn.Linear) -> None:
    """Give the sums of a layer of which TARGET inputs are active the spread that all would give."""
    with torch.no_grad():
        linear.weight.mul_(TARGET**-0.5)


class EGRULayer(nn.Module):
    """Gated units that tell others their state only when it passes their threshold.

    Where the inputs are ``events``, of which few are not zero, their weights start larger.
    """

    def __init__(self, inputs: int, hidden: int, events: bool) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, 3 * hidden)
        self.rec = nn.Linear(hidden, 3 * hidden)
        self.theta = nn.Parameter(0.2 * torch.rand(hidden))
        for parameter in (*self.inp.parameters(), *self.rec.parameters()):
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)
        if events:
            start_for_events(self.inp)

    def forward(self, x: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Outputs ``[T, B, hidden]`` of inputs ``[T, B, inputs]``, last state, share of events."""
        theta = self.theta.clamp(0, 1)
        outputs, events = [], []
        for p in self.inp(x):
            p_z, p_r, p_g = p.chunk(3, dim=1)
            q_z, q_r, q_g = self.rec(y).chunk(3, dim=1)
            z = torch.sigmoid(p_z + q_z)
            r = torch.sigmoid(p_r + q_r)
            c = z * h + (1 - z) * torch.tanh(p_g + r * q_g)
            o = EventGate.apply(c - theta)
            y = o * c
            h = c - o * theta
            outputs.append(y)
            events.append(o)
        return torch.stack(outputs), h, y, torch.stack(events).mean()


class EGRULanguageModel(nn.Module):
    """Characters through an embedding and layers of events."""

    def __init__(self, characters: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, hidden)
        self.layers = nn.ModuleList(EGRULayer(hidden, hidden, k > 0) for k in range(layers))
        self.decode = nn.Linear(hidden, characters)
        start_for_events(self.decode)

    def forward(self, text: Tensor, state: State = None) -> tuple[Tensor, State, Tensor]:
        """Logits ``[T, B, characters]`` of ``[T, B]``, the state, and the share that was active."""
        x = self.embed(text)
        if state is None:
            zeros = x.new_zeros(x.shape[1:])
            state = [(zeros, zeros)] * len(self.layers)
        states, shares = [], []
        for layer, (h, y) in zip(self.layers, state, strict=True):
            x, h, y, share = layer(x, h, y)
            states.append((h, y))
            shares.append(share)
        return self.decode(x), states, torch.stack(shares).mean()


class GatedLanguageModel(nn.Module):
    """The same around ``nn.GRU`` or ``nn.LSTM``, whose units are always active."""

    def __init__(
        self, kind: Callable[[int, int, int], nn.Module], characters: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, hidden)
        self.rnn = kind(hidden, hidden, layers)
        self.decode = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: State = None) -> tuple[Tensor, State, Tensor]:
        out, state = self.rnn(self.embed(text), state)
        return self.decode(out), state, torch.ones(())


def detached(state: State) -> State:
    """The same values, through which no gradient flows to earlier chunks."""
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(detached(each) for each in state)


class Reader:
    """Reads a text in ``batch`` places at once, ``steps`` characters at a time, over and over."""

    def __init__(self, text: Tensor, batch: int, steps: int) -> None:
        length = len(text) // batch
        self.columns = text[: length * batch].view(batch, length).T.contiguous()
        self.steps, self.at = steps, 0
        self.chunks = (length - 1) // steps

    def __next__(self) -> tuple[bool, Tensor, Tensor]:
        """Whether it starts anew, characters ``[T, B]``, and those that follow them."""
        if self.at == self.chunks:
            self.at = 0
        start = self.at * self.steps
        self.at += 1
        rows = self.columns[start : start + self.steps + 1]
        return start == 0, rows[:-1], rows[1:]

    def passes(self, count: int, updates: int) -> Iterator[Iterator[tuple[bool, Tensor, Tensor]]]:
        for _ in range(count):
            yield (next(self) for _ in range(updates))


class Trainer:
    """A step of truncated back-propagation: the state goes on, its gradient does not.

    With ``priced`` units pay for events beyond TARGET, as in the paper; ``nn.GRU`` has no choice.
    """

    def __init__(self, priced: bool) -> None:
        self.priced = priced
        self.state: State = None

    def step(self, module: nn.Module, batch: tuple[bool, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        starts, text, following = batch
        state = None if starts or self.state is None else detached(self.state)
        logits, self.state, activity = module(text, state)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        if self.priced:
            loss = loss + PRICE * (activity - TARGET).clamp(min=0) ** 2
        return loss, activity.detach()


def evaluate(module: nn.Module, text: Tensor, batch: int, steps: int) -> tuple[float, float]:
    """Cross-entropy of the held-out text, and the same in bits per character."""
    reader, trainer = Reader(text, batch, steps), Trainer(priced=False)
    losses = [float(trainer.step(module, next(reader))[0]) for _ in range(reader.chunks)]
    return mean(losses), mean(losses) / math.log(2)


def load_text() -> tuple[Tensor, Tensor, int]:
    """Characters to train on, those held out, and how many different ones there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    known = {character: index for index, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([known[character] for character in text])
    cut = int(SHARE_OF_TRAINING * len(codes))
    return codes[:cut], codes[cut:], len(known)


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def equal_lstm(characters: int, layers: int, parameters: int) -> nn.Module:
    """The LSTM whose number of parameters is closest; it has four gates, the others three."""
    sizes = range(8, 4096, 4)
    build = partial(GatedLanguageModel, nn.LSTM, characters, layers=layers)
    with torch.device("meta"):
        best = min(sizes, key=lambda hidden: abs(size_of(build(hidden)) - parameters))
    return build(best)


@dataclass(frozen=True)
class Contender:
    """One of the trainings that are compared: a network and what it learns best with."""

    name: str
    build: Callable[[], nn.Module]
    rate: float
    priced: bool

    def network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build()
        return sparsify.sparsify(model) if self.name == SPARSIFIED else model


@dataclass(frozen=True)
class Task:
    """What all of them read, ``updates`` chunks of it in a pass."""

    training: Tensor
    held_out: Tensor
    batch: int
    steps: int
    passes: int
    updates: int

    def reader(self) -> Reader:
        return Reader(self.training, self.batch, self.steps)

    def train(self, contender: Contender, seed: int) -> tuple[Run, nn.Module]:
        """A run from this seed, and the network that it ended with."""
        module = contender.network(seed)
        run = train(
            contender.name,
            seed,
            module,
            self.reader().passes(self.passes, self.updates),
            Trainer(contender.priced).step,
            partial(evaluate, text=self.held_out, batch=self.batch, steps=self.steps),
            rate=contender.rate,
            settles=True,
        )
        return run, module

    def start(self, contender: Contender, kept: KeptRuns) -> tuple[Update, int]:
        """An update as that of a run, compiled from its first and from its last weights."""
        module, reader = contender.network(seed=0), self.reader()

        def begin(module: nn.Module) -> Update:
            optimizer = torch.optim.Adam(module.parameters(), lr=contender.rate)
            change = partial(update, module, optimizer, Trainer(contender.priced).step)
            for _ in range(RECORDED):
                change(next(reader))
            return lambda: change(next(reader))

        begin(module)
        kept.load_weights(contender.name, 0, module)
        module = compiled_again(module)
        one_more = begin(module)
        show_decisions(module, 0)
        return one_more, 2 * RECORDED


def contenders(characters: int, hidden: int, layers: int) -> tuple[Contender, ...]:
    egru = partial(EGRULanguageModel, characters, hidden, layers)
    gru = partial(GatedLanguageModel, nn.GRU, characters, hidden, layers)
    lstm = partial(equal_lstm, characters, layers, size_of(egru()))
    return (
        Contender(EAGER, egru, EGRU_RATE, priced=True),
        Contender(SPARSIFIED, egru, EGRU_RATE, priced=True),
        Contender("nn.GRU", gru, GATED_RATE, priced=False),
        Contender("nn.LSTM", lstm, GATED_RATE, priced=False),
    )


def compare(
    task: Task, among: Sequence[Contender], kept: KeptRuns, seeds: int, rounds: int
) -> list[Run]:
    """Train whatever is not kept, measure the pace of each, print what came out."""
    runs = []
    for seed, contender in product(range(seeds), among):
        run = kept.find(contender.name, seed)
        if run is None:
            run, module = task.train(contender, seed)
            kept.keep(run, module)
        runs.append(run)
    paces = measure_paces({each.name: partial(task.start, each, kept) for each in among}, rounds)
    runs = [at_pace(run, paces[run.name], task.updates) for run in runs]
    print(show_paces(paces))
    print(summarise(runs, "bits per character"))
    print(compare_times(runs, paces, task.updates))
    print(f"held-out losses of the EGRUs differ by at most {largest_gap(runs):.1e}")
    return runs


def main() -> None:
    args = arguments(
        __doc__, hidden=256, steps=70, passes=24, batch=64, quick=(32, 10, 2), layers=2, kept=True
    )
    training, held_out, characters = load_text()
    updates, rounds = UPDATES, ROUNDS
    if args.quick:
        training, held_out, updates, rounds = training[:20_000], held_out[:3_000], 2, 2
        args.layers = 1
    task = Task(training, held_out, args.batch, args.steps, args.passes, updates)
    among = contenders(characters, args.hidden, args.layers)
    sizes = ", ".join(f"{each.name} {size_of(each.build()):,}" for each in among)
    print(f"{len(training):,} characters to train on; parameters: {sizes}")
    settings = ("hidden", "layers", "steps", "batch")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.kept or Path(temporary)
        kept = KeptRuns(folder, {name: getattr(args, name) for name in settings}, args.passes)
        runs = compare(task, among, kept, args.seeds, rounds)
    save(runs, args.json, args.plot, "bits per character")


if __name__ == "__main__":
    main()
