"""Patterns of zeros are found in weights however they came about."""

from __future__ import annotations

import torch

from sparsify.weight_pattern import DENSE, find_pattern


def test_density_counts_what_is_not_zero() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0], [float("nan"), 0.0, 0.0]])
    assert find_pattern(weight).density == 2 / 6


def test_runs_are_of_receivers() -> None:
    weight = torch.zeros(16, 2)
    weight[8:, 0] = 1.0
    runs = find_pattern(weight).run_density
    assert runs == {8: 1 / 4, 16: 1 / 2, 32: 1 / 2}


def test_two_of_four_receivers() -> None:
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(2)[:, None].repeat(1, 3)
    assert find_pattern(weight).n_of_m == (2, 4)
    assert find_pattern(weight[:6]).n_of_m is None  # no whole groups
    assert find_pattern(torch.ones(8, 3)).n_of_m is None


def test_an_empty_weight_is_dense() -> None:
    assert find_pattern(torch.empty(0, 4)) == DENSE
