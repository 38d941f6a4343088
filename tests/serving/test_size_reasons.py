"""Which size keeps a call from a graph that serves many sizes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from sparsify.api import sparsify
from sparsify.serving.layout import Layout
from tests.models.small_nets import HIDDEN, RecurrentNet, spike, spikes


def test_the_size_that_does_not_fit_is_named() -> None:
    given = [torch.zeros(5, 3, 8), torch.zeros(3, 4)]
    layout = Layout(given, [[(0, 0)], [(0, 1), (1, 0)]], least_size=2)
    names = ["x", "state"]
    assert layout.why_not([torch.zeros(7, 2, 8), torch.zeros(2, 4)], names) == ""
    assert layout.why_not([torch.zeros(7, 2, 8), torch.zeros(6, 4)], names) == (
        "size 2 in dim 1 of x meets 6 in dim 0 of state, and both recordings had one size there"
    )
    assert layout.why_not([torch.zeros(7, 2, 9), torch.zeros(2, 4)], names) == (
        "x has size 9 in dim 2 and had 8 in both recordings"
    )
    assert layout.why_not([torch.zeros(1, 2, 8), torch.zeros(2, 4)], names) == (
        "size 1 in dim 0 of x is below 2, from where on the graph holds"
    )
    assert layout.why_not([torch.zeros(7, 8), torch.zeros(2, 4)], names) == (
        "x has 2 dims and had 3"
    )


class Scaled(RecurrentNet):
    """What a step computes has half of the length in it."""

    def forward(self, x: Tensor) -> Tensor:
        v = spiked = torch.zeros(x.size(1), HIDDEN)
        half = len(x) // 2
        for x_t in x:
            v = v / half + self.inp(x_t) + self.rec(spiked)
            spiked = spike(v - 1)
        return spiked


def test_the_report_says_why_another_size_runs_another_kernel() -> None:
    fast = sparsify(Scaled().eval(), timing=False)
    with torch.no_grad():
        for steps, batch in ((9, 3), (20, 8)):
            fast(spikes(steps, batch))
    other = r"Another size runs another kernel for scan_\d\. 4 and 10 follow from the sizes in no "
    assert re.search(other, str(fast.report))
