"""Patterns of zeros are found in weights however they came about."""

from __future__ import annotations

import torch

from sparsify import ir
from sparsify.weight_pattern import DENSE, Pattern, find_pattern, with_room

MASKED, COMPRESSED = ir.Layout("masked-rows"), ir.Layout("compressed-rows")


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


def test_of_a_weight_with_few_zeros_only_the_density_is_looked_at() -> None:
    weight = torch.ones(64, 8)
    weight[:8, :] = 0
    assert find_pattern(weight) == Pattern(7 / 8, DENSE.run_density)


def test_the_fullest_words_and_rows_are_what_room_is_made_for() -> None:
    weight = torch.zeros(70, 40)
    weight[36:44, 1] = 1.0  # of receivers 12 to 43, 36 to 67: eight of 32
    weight[5, :30] = 1.0
    pattern = find_pattern(weight)
    assert (pattern.fullest_word, pattern.fullest_row) == (8 / 32, 30 / 40)
    assert with_room(MASKED, pattern).room == 10 / 32  # an eighth more, and one
    assert with_room(COMPRESSED, pattern).room == 28 / 32
    block = ir.Layout("block-rows", 8)
    assert with_room(block, pattern) == block
    assert with_room(MASKED, DENSE).room == 1.0


def test_two_of_four_need_no_more_room() -> None:
    weight = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(16)[:, None].repeat(1, 3)
    assert with_room(MASKED, find_pattern(weight)) == ir.Layout("masked-rows", 4, 0.5)
