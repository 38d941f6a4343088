"""Which weights are kept, from scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.pruning.shape_masks import exchange, keep_best, keep_n_of_m
from sparsify.weight_pattern import find_pattern


def random_scores(receivers: int, senders: int, seed: int = 0, ties: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(receivers, senders, generator=generator)
    return (4 * scores).round() if ties else scores


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_smallest_scores_of_all_layers_go_first(
    receivers: int, senders: int, fraction: float, seed: int, ties: bool
) -> None:
    scores = {
        "a": random_scores(receivers, senders, seed, ties),
        "b": random_scores(senders, 3, seed + 1, ties),
    }
    masks = keep_best(scores, fraction)
    total = sum(each.numel() for each in scores.values())
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    pruned = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert len(kept) == total - round(fraction * total)
    if len(kept) and len(pruned):
        assert kept.min() >= pruned.max()


def test_blocks_are_kept_by_their_means() -> None:
    scores = torch.ones(6, 5)
    scores[0:4, 1] = 3  # a block of its own
    scores[4:6, 4] = 9  # one that is cut off at the edge
    scores[0, 0] = 4  # the largest of a block with a smaller mean
    [mask] = keep_best({"a": scores}, 1 - 6 / 30, (4, 1)).values()
    expected = torch.zeros(6, 5, dtype=torch.bool)
    expected[0:4, 1] = expected[4:6, 4] = True
    assert torch.equal(mask, expected)


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([(8, 1), (1, 4), (3, 2)]))
@settings(max_examples=40, deadline=None)
def test_blocks_are_whole(receivers: int, senders: int, block: tuple[int, int]) -> None:
    [mask] = keep_best({"a": random_scores(receivers, senders)}, 0.6, block).values()
    assert mask.shape == (receivers, senders)
    for first in range(0, receivers, block[0]):
        for at in range(0, senders, block[1]):
            part = mask[first : first + block[0], at : at + block[1]]
            assert part.all() or not part.any()
    assert mask.sum() >= mask.numel() - round(0.6 * mask.numel())


def test_groups_of_receivers_are_what_layouts_find() -> None:
    scores = random_scores(16, 7)
    for n, m in ((2, 4), (1, 4), (3, 8)):
        mask = keep_n_of_m(scores, n, m)
        assert find_pattern(mask.float()).n_of_m == (n, m)
        best = scores.t().reshape(-1, m).topk(n, 1).values.flatten()
        assert torch.equal(scores[mask].sort().values, best.sort().values)


def test_groups_of_senders_are_those_of_torch() -> None:
    scores = random_scores(5, 16)
    mask = keep_n_of_m(scores, 2, 4, along_senders=True)
    assert set(mask.view(5, 4, 4).sum(2).flatten().tolist()) == {2}


def test_what_has_no_value_is_pruned_whatever_the_fraction() -> None:
    scores = torch.tensor([[1.0, -torch.inf], [-torch.inf, 2.0]])
    [mask] = keep_best({"a": scores}, 0.0).values()
    assert mask.tolist() == [[True, False], [False, True]]
    assert keep_n_of_m(scores, 1, 2).tolist() == [[True, False], [False, True]]
    everything = torch.full((2, 2), -torch.inf)
    assert not keep_n_of_m(everything, 1, 2).any()


def test_an_exchange_keeps_their_number() -> None:
    kept = torch.tensor([[True, True, True], [False, False, False]])
    scores = torch.tensor([[3.0, 1.0, 2.0], [9.0, 9.0, 9.0]])
    gradients = torch.tensor([[9.0, 9.0, 9.0], [1.0, -5.0, 2.0]])
    after, grown = exchange(kept, scores, gradients, 1)
    assert after.tolist() == [[True, False, True], [False, True, False]]
    assert grown.tolist() == [[False, False, False], [False, True, False]]
    after, grown = exchange(kept, scores, gradients, 100)
    assert torch.equal(after, ~kept)
    assert torch.equal(grown, ~kept)
