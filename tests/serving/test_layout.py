from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.serving.layout import Layout, stride_class

X = torch.zeros(5, 3, 8)
W = torch.zeros(8, 8)
TIME_AND_BATCH = (((0, 0),), ((0, 1), (2, 0)))  # x is [T, B, 8], v is [B, 8]


@pytest.mark.parametrize(
    ("operand", "why"),
    [
        (torch.zeros(5, 3, 8, dtype=torch.float64), "x is torch.float64 and was torch.float32"),
        (torch.zeros(5, 4, 8), "x has sizes [5, 4, 8] and had [5, 3, 8]"),
        (torch.zeros(5, 24), "x has sizes [5, 24] and had [5, 3, 8]"),
        (torch.zeros(3, 5, 8).transpose(0, 1), "x lies in another order in memory"),
        (torch.zeros(5, 3, 8, device="meta"), "x is on meta and was on cpu"),
    ],
)
def test_what_differs_is_told(operand: Tensor, why: str) -> None:
    layout = Layout([X, W])
    assert layout.serves([X.clone(), W])
    assert not layout.serves([operand, W])
    assert layout.why_not([operand, W], ["x", "w"]) == why


def test_sizes_of_a_class_vary_together() -> None:
    layout = Layout([X, W, torch.zeros(3, 8)], TIME_AND_BATCH)
    assert layout.serves([torch.zeros(9, 4, 8), W, torch.zeros(4, 8)])
    assert layout.serves([torch.zeros(9, 1, 8), W, torch.zeros(1, 8)])
    assert not layout.serves([torch.zeros(9, 4, 8), W, torch.zeros(5, 8)])
    assert not layout.serves([torch.zeros(9, 4, 7), W, torch.zeros(4, 8)])
    assert not layout.serves([torch.zeros(9, 4, 8), torch.zeros(8, 7), torch.zeros(4, 8)])
    assert not layout.serves([torch.zeros(0, 4, 8), W, torch.zeros(4, 8)])


def test_a_least_size_keeps_ones_out() -> None:
    layout = Layout([X, W, torch.zeros(3, 8)], TIME_AND_BATCH, least_size=2)
    assert layout.serves([torch.zeros(2, 2, 8), W, torch.zeros(2, 8)])
    assert not layout.serves([torch.zeros(2, 1, 8), W, torch.zeros(1, 8)])


def test_only_sizes_may_differ_for_one_graph_to_serve_both() -> None:
    layout = Layout([X, W])
    assert layout.differs_in_sizes_only([torch.zeros(6, 3, 8), W])
    assert not layout.differs_in_sizes_only([X, W])
    assert not layout.differs_in_sizes_only([torch.zeros(6, 3), W])
    assert not layout.differs_in_sizes_only([torch.zeros(6, 3, 8).double(), W])


def test_stride_classes_do_not_depend_on_sizes() -> None:
    assert stride_class(torch.zeros(3, 4)) == stride_class(torch.zeros(7, 2)) == "contiguous"
    transposed = [stride_class(torch.zeros(n, 4).t()) for n in (3, 5)]
    assert transposed[0] == transposed[1] == (0, 1)
    assert stride_class(torch.zeros(3, 8)[:, ::2]) == ("strides", 8, 2)
    assert stride_class(torch.zeros(3, 1).expand(3, 4)) == ("strides", 1, 0)
