"""Which size keeps a call from a graph that serves many sizes."""

from __future__ import annotations

import torch

from sparsify.serving.layout import Layout


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
