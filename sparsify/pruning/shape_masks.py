"""Masks from scores: the best ones are kept, alone, in groups or in blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

Scores = Mapping[str, Tensor]  # [R, S] by layer


def keep_best(
    scores: Scores, fraction: float, block: tuple[int, int] = (1, 1)
) -> dict[str, Tensor]:
    """Masks of which the ``fraction`` with the smallest scores, of all together, is pruned.

    ``block`` is what is kept or pruned as a whole, by its mean score; those at the edges may be
    smaller. Scores of minus infinity are pruned whatever the fraction.
    """
    total = sum(each.numel() for each in scores.values())
    wanted = total - round(fraction * total)
    means = {layer: _block_means(each, block) for layer, each in scores.items()}
    flat = torch.cat([each.flatten() for each in means.values()])
    sizes = torch.cat([_block_sizes(each, block).flatten() for each in scores.values()])
    is_kept = torch.zeros_like(flat, dtype=torch.bool)
    if block == (1, 1):
        is_kept[flat.topk(wanted, sorted=False).indices] = True
    else:
        order = flat.argsort(descending=True, stable=True)
        is_kept[order] = sizes[order].cumsum(0) - sizes[order] < wanted
    is_kept &= flat != -torch.inf
    parts = torch.split(is_kept, [each.numel() for each in means.values()])
    kept = {}
    for part, (layer, each) in zip(parts, means.items(), strict=True):
        receivers, senders = scores[layer].shape
        whole = part.view_as(each).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        kept[layer] = whole[:receivers, :senders]
    return kept


def _block_means(scores: Tensor, block: tuple[int, int]) -> Tensor:
    if block == (1, 1):
        return scores
    return _blocks(scores, block).sum((1, 3)) / _block_sizes(scores, block)


def _block_sizes(scores: Tensor, block: tuple[int, int]) -> Tensor:
    ones = torch.ones_like(scores, dtype=torch.float64 if scores.dtype is torch.float64 else None)
    return _blocks(ones, block).sum((1, 3))


def _blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """``[block rows, receivers, block columns, senders]``, filled up with zeros."""
    receivers, senders = values.shape
    rows, columns = -(-receivers // block[0]), -(-senders // block[1])
    missing = (0, columns * block[1] - senders, 0, rows * block[0] - receivers)
    return pad(values, missing).view(rows, block[0], columns, block[1])


def keep_n_of_m(scores: Tensor, n: int, m: int, along_senders: bool = False) -> Tensor:
    """The mask ``[R, S]`` of the ``n`` best of every ``m`` consecutive receivers of a sender.

    The number of receivers must be a multiple of ``m``; ``along_senders`` exchanges the two.
    """
    groups = scores if along_senders else scores.t()
    grouped = groups.reshape(-1, m)
    best = grouped.topk(n, 1).indices
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, best, True)
    kept &= grouped != -torch.inf
    kept = kept.view(groups.shape)
    return kept if along_senders else kept.t()


def exchange(kept: Tensor, scores: Tensor, gradients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``kept`` without its ``count`` smallest scores, and with as many others instead.

    Those that come are the ones with the largest gradients; also returns which those are.
    """
    count = min(count, int(kept.sum()), int((~kept).sum()))
    lowest = torch.where(kept, scores, torch.inf).flatten().topk(count, largest=False).indices
    largest = torch.where(kept, -torch.inf, gradients.abs()).flatten().topk(count).indices
    after, grown = kept.clone().flatten(), torch.zeros_like(kept).flatten()
    after[lowest] = False
    after[largest] = True
    grown[largest] = True
    return after.view_as(kept), grown.view_as(kept)
