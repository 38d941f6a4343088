"""Sites of weights that a model takes apart have its parameters' names, and so have gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.api import sparsify
from tests.models.small_nets import Spike

IN, HIDDEN = 5, 8
spike: Any = Spike.apply
Current = Callable[[Any, Tensor, Tensor], Any]  # torch leaves Tensor.split without annotations


class Net(nn.Module):
    """A recurrent layer; ``current`` says what it does with its weight and mask ``[8, 13]``."""

    mask: Tensor

    def __init__(self, current: Current) -> None:
        super().__init__()
        self.weight_of_both = nn.Parameter(0.5 * torch.ones(HIDDEN, IN + HIDDEN))
        self.register_buffer("mask", torch.ones(HIDDEN, IN + HIDDEN).tril(IN))
        self.current = current

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.9 * v + self.current(self, x_t, z)
            z = spike(v - 1)
            v = v - z.detach()
            out.append(z)
        return torch.stack(out)


def split(net: Any, x: Tensor, z: Tensor) -> Any:
    of_x, of_z = net.weight_of_both.split([IN, HIDDEN], 1)
    return x @ of_x.t() + z @ of_z.t()


def split_of_masked(net: Any, x: Tensor, z: Tensor) -> Any:
    of_x, of_z = (net.weight_of_both * net.mask).split([IN, HIDDEN], 1)
    return F.linear(x, of_x) + F.linear(z, of_z)


def split_of_turned(net: Any, x: Tensor, z: Tensor) -> Any:
    of_x, of_z = net.weight_of_both.t().split([IN, HIDDEN], 0)
    return x @ of_x + z @ of_z


def joined_operand(net: Any, x: Tensor, z: Tensor) -> Any:
    return F.linear(torch.cat([x, z], 1), net.weight_of_both * net.mask)


@pytest.mark.parametrize("current", [split, split_of_masked, split_of_turned, joined_operand])
def test_sites_are_called_after_the_parameter(current: Current) -> None:
    torch.manual_seed(0)
    fast: Any = sparsify(Net(current), timing=False)
    fast((torch.rand(6, 2, IN) < 0.4).float()).sum().backward()
    decisions = {site.name: site.decision for site in fast.report.sites}
    assert decisions.keys() == {"weight_of_both", "weight_of_both.backward"}
    assert "kept" not in decisions.values()  # small: which kernel is a matter of the machine
