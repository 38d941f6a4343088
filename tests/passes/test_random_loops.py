"""Random time loops: rolling, splitting and executing them must give eager's bits."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from tests.passes.test_roll_loops import assert_same, scans
from tests.passes.test_split_time import never
from tests.unrolled import Tape, record_unrolled

N, BATCH = 4, 2
OPERATIONS = ("add", "sub", "mul", "linear", "spike", "where", "clamp", "step_number")


Operation = tuple[str, float, float, int]


class RandomModel:
    """A step of random operations on inputs, states, delayed values and constants."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.states = chance.randint(0, 3)
        self.delays = [chance.randint(1, 4) for _ in range(chance.randint(0, 2))]
        self.starts = [
            chance.choice(["zeros", "number", "ones", "row"]) for _ in range(self.states)
        ]
        self.weights = {f"w{i}": torch.randn(N, N, generator=generator) for i in range(2)}
        self.weights["threshold"] = torch.rand(N, generator=generator)
        self.program: list[Operation] = [
            (
                chance.choice(OPERATIONS),
                chance.random(),
                chance.random(),
                chance.randrange(2),
            )
            for _ in range(chance.randint(2, 9))
        ]
        self.written = [chance.random() for _ in range(self.states + len(self.delays))]
        self.kept = [chance.random() for _ in range(3)]
        self.batch_first = chance.random() < 0.5

    def program_at(self, step: int) -> list[Operation]:
        return self.program

    def keeps(self, index: int, step: int, steps: int) -> bool:
        return True

    def start(self, kind: str) -> Any:
        match kind:
            case "zeros":
                return torch.zeros(BATCH, N)
            case "ones":
                return torch.ones(BATCH, N)
            case "row":
                return torch.ones(N)
        return 0.0

    def apply(self, op: str, a: Any, b: Any, which: int, step: int) -> Any:
        weight, threshold = self.weights[f"w{which}"], self.weights["threshold"]
        match op:
            case "add":
                return a + b
            case "sub":
                return a - b
            case "mul":
                return a * 0.75 + b
            case "linear":
                return F.linear(a, weight) if isinstance(a, Tensor) and a.dim() == 2 else b
            case "spike":
                return (b > 0.3).float() if isinstance(b, Tensor) else b
            case "where":
                return torch.where(b > threshold, b, 0.0) if isinstance(b, Tensor) else b
            case "clamp":
                return b * threshold.clamp(0, 0.5)
        return b * (1 / (step + 1))

    def __call__(self, tape: Tape, x: Tensor) -> tuple[Any, ...]:
        steps = x.size(1) if self.batch_first else x.size(0)
        states = [self.start(kind) for kind in self.starts]
        lines = [[torch.zeros(BATCH, N)] * depth for depth in self.delays]
        lists: list[list[Any]] = [[] for _ in self.kept]
        values: list[Any] = []
        for t in tape.loop(range(steps)):
            x_t = x[:, t] if self.batch_first else x[t]
            values = [x_t, *states, *(line[t] for line in lines)]
            for op, first, second, which in self.program_at(t):
                a, b = (values[int(p * len(values))] for p in (first, second))
                values.append(self.apply(op, a, b, which, t))
            computed = [v if isinstance(v, Tensor) else x_t for v in values]
            wide = [v for v in computed if v.shape == (BATCH, N)]
            states = [wide[int(p * len(wide))] for p in self.written[: self.states]]
            for line, p in zip(lines, self.written[self.states :], strict=True):
                line.append(wide[int(p * len(wide))])
            for i, (kept, p) in enumerate(zip(lists, self.kept, strict=True)):
                if self.keeps(i, t, steps):
                    kept.append(wide[int(p * len(wide))])
        stacked = [torch.stack(kept, 1 if i else 0) for i, kept in enumerate(lists)]
        return (*stacked, *states, lists[0][0], sum(lists[1]))


class ChangingModel(RandomModel):
    """Some steps do something else, or keep no results: late, early, single or periodic ones."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        chance = random.Random(-seed)
        self.at, self.period = chance.randint(1, 8), chance.randint(2, 5)
        self.kinds = [chance.choice(["late", "early", "once", "periodic", "all"]) for _ in range(4)]
        place = chance.randrange(len(self.program))
        changed = (chance.choice(OPERATIONS), *self.program[place][1:])
        self.other = [*self.program[:place], changed, *self.program[place + 1 :]]

    def is_in(self, kind: str, step: int) -> bool:
        return {
            "late": step >= self.at,
            "early": step < self.at,
            "once": step == self.at,
            "periodic": step % self.period == 0,
        }.get(kind, True)

    def program_at(self, step: int) -> list[Operation]:
        return self.other if self.is_in(self.kinds[-1], step) else self.program

    def keeps(self, index: int, step: int, steps: int) -> bool:
        return step == steps - 1 or self.is_in(self.kinds[index], step)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 16))
def test_random_loops_that_change_keep_their_bits(seed: int, steps: int) -> None:
    model = ChangingModel(seed)
    shape = (BATCH, steps, N) if model.batch_first else (steps, BATCH, N)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    recorded = record_unrolled(model, [x], model.weights)
    recorded.graph.graph.eliminate_dead_code()

    rolled = roll_loops(recorded.graph)
    assert_same(rolled.graph(*recorded.operands), recorded.results)
    assert_same(split_time(rolled.graph, never).graph(*recorded.operands), recorded.results)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 7))
def test_random_loop_keeps_its_bits(seed: int, steps: int) -> None:
    model = RandomModel(seed)
    shape = (BATCH, steps, N) if model.batch_first else (steps, BATCH, N)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    recorded = record_unrolled(model, [x], model.weights)

    rolled = roll_loops(recorded.graph)
    assert_same(rolled.graph(*recorded.operands), recorded.results)
    assert roll_loops(rolled.graph).done == []

    split = split_time(rolled.graph, never)
    assert_same(split.graph(*recorded.operands), recorded.results)
    assert split_time(split.graph, never).done == []


def test_random_loops_are_mostly_rolled() -> None:
    """The test above proves nothing where every loop is refused."""
    rolled = 0
    for seed in range(60):
        model = RandomModel(seed)
        shape = (BATCH, 6, N) if model.batch_first else (6, BATCH, N)
        recorded = record_unrolled(model, [torch.randn(shape)], model.weights)
        rolled += bool(scans(roll_loops(recorded.graph).graph))
    assert rolled >= 50


def test_random_loops_that_change_are_mostly_rolled() -> None:
    rolled = 0
    for seed in range(30):
        model = ChangingModel(seed)
        shape = (BATCH, 16, N) if model.batch_first else (16, BATCH, N)
        recorded = record_unrolled(model, [torch.randn(shape)], model.weights)
        recorded.graph.graph.eliminate_dead_code()
        rolled += bool(scans(roll_loops(recorded.graph).graph))
    assert rolled >= 22
