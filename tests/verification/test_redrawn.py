"""A gradient that torch has to the last bit by luck binds nobody to that luck."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sparsify.comparing.figures import GradientFigures
from sparsify.errors import MismatchError
from sparsify.verification.gradients import _checked
from sparsify.verification.redrawn import DRAWS, distance, redrawn_distances

TERMS = 4096
EPS = torch.finfo(torch.float32).eps


def gradient_of_a_bias() -> Any:
    """A region of which the only gradient sums what arrives, times values that were saved."""
    graph = fx.Graph()
    arrives, saved = graph.placeholder("d_ys"), graph.placeholder("saved")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (arrives, saved))
    graph.output((graph.call_function(torch.ops.aten.sum.dim_IntList, (product, [0], True)),))
    parts = SimpleNamespace(inputs=(("d_result", 0), ("saved", 0)))
    return SimpleNamespace(parts=parts, backward=fx.GraphModule({}, graph))


def small_integers(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (TERMS,), generator=generator).float()


def test_what_is_exact_by_luck_is_not_when_other_values_arrive() -> None:
    """Integers below 2^24 add up without rounding; 1 + k/65 of them do not."""
    region = gradient_of_a_bias()
    known = {("d_result", 0): small_integers(0), ("saved", 0): small_integers(1)}
    given = list(known.values())
    [exact] = region.backward(*given)
    assert distance(exact, torch.dot(*(g.double() for g in given))) == 0
    distances = [each for [each] in redrawn_distances(region, known)]
    magnitudes = float(torch.dot(*(g.abs() for g in given)))
    assert len(distances) == DRAWS
    # Each product and each of the sums before it is rounded by half eps of at most all magnitudes.
    assert 0 < max(distances) < TERMS * EPS * magnitudes
    figures = GradientFigures("scan", "pool.bias", 1, float(exact.abs()), 0.0, 0.0)
    as_far = replace(figures, distance=2 * max(distances))
    assert _checked(as_far, distances, 0.0).eager_distance == max(distances)
    with pytest.raises(MismatchError, match=r"the gradient of pool\.bias in scan"):
        _checked(replace(figures, distance=2.01 * max(distances)), distances, 0.0)


def test_a_gradient_that_is_near_enough_is_computed_once() -> None:
    figures = GradientFigures("scan", "rec.weight", 9, 1.0, 1e-7, 5e-8)
    others = iter((1.0,))
    assert _checked(figures, others, 0.0) == figures
    assert next(others) == 1.0
