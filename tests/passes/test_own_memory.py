"""Results that are tensors of their own in the model can be written to one by one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sparsify
from tests.models.pruned_nets import example
from tests.models.spiking_net import ROUNDING, distance


class Layers(nn.Module):
    """A layer of leaky units and a readout; ``results`` says what is returned of the steps."""

    def __init__(self, results: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode, self.readout = nn.Linear(8, 16), nn.Linear(16, 16)
        self.results = results

    def forward(self, x: Tensor) -> Any:
        v = x.new_zeros(x.shape[1], 16)
        sent, states, read = [], [], []
        for x_t in x:
            v = 0.75 * v + self.encode(x_t)
            z = torch.relu(v - 0.25)
            v = v - z
            sent.append(z)
            states.append(v)
            read.append(self.readout(z))
        stacked = torch.stack(read)
        made: dict[str, Callable[[], Any]] = {
            "last": lambda: (stacked, read[-1], torch.stack(sent), sent[-1], v, states),
            "steps": lambda: (stacked, read),
            "joined": lambda: (stacked, torch.stack(read, 1), torch.cat(read), torch.stack(read)),
            "views": lambda: (stacked, stacked[0], stacked[-1][1], read[0], read[0].t(), read[0]),
        }
        return made[self.results]()


def meetings(results: Any) -> set[tuple[int, int]]:
    """Which results change when others are written to."""
    leaves = [leaf.detach() for leaf in pytree.tree_leaves(results)]
    found = set()
    for one, other in permutations(range(len(leaves)), 2):
        before = leaves[other].clone()
        leaves[one].add_(1)
        if not torch.equal(leaves[other], before):
            found.add((one, other))
    return found


@pytest.mark.parametrize("results", ["last", "steps", "joined", "views"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_results_meet_where_they_do_in_the_model(results: str, is_trained: bool) -> None:
    model = Layers(results).double()
    fast: Any = sparsify.sparsify(model, backend="cpp", timing=False)
    with torch.set_grad_enabled(is_trained):
        for steps in (1, 3, 4):
            x = example(steps)
            fast(x)  # what is recorded returns the run's own results
            assert not fast.compiled.compiled.runs_original
            got, expected = fast(x), model(x)
            assert distance(*map(pytree.tree_leaves, (got, expected))) <= ROUNDING
            assert meetings(got) == meetings(expected)


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_state_of_one_step_can_be_reset_in_place(is_trained: bool) -> None:
    """As in a stream: the state goes into the next call, the output is kept."""
    model = Layers("last").double()
    fast: Any = sparsify.sparsify(model, backend="cpp", timing=False)
    x = example(1)
    with torch.set_grad_enabled(is_trained):
        fast(x)
        read, last, *_ = fast(x)
        expected = read.detach().clone()
        last.detach_().zero_()
        assert torch.equal(read.detach(), expected)
        if is_trained:
            read.sum().backward()
