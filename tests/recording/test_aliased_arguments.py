"""Arguments that share memory in the recorded call need not do so in later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.api import sparsify
from tests.models.zoo_feedforward import HIDDEN, IN
from tests.models.zoo_training import CarriedState


@pytest.mark.parametrize("grad", [False, True])
def test_states_that_start_as_views_of_the_same_zeros(grad: bool) -> None:
    torch.manual_seed(0)
    model = CarriedState().double()
    x = (torch.rand(5, 3, IN) < 0.3).double()
    zeros = torch.zeros(3, HIDDEN, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        fast: Any = sparsify(model, timing=False)
        fast(x, (zeros.detach(), zeros.detach()))
        assert fast.compiled.is_compiled
        state = (torch.rand_like(zeros), (torch.rand_like(zeros) < 0.5).double())
        _, got = fast(x, state)
        _, expected = model(x, state)
    pairs: list[tuple[Tensor, Tensor]] = list(zip(got, expected, strict=True))
    for one, other in pairs:
        # Sums of 72 terms of order one in five steps: 1e-12 is thousands of their roundings.
        assert (one - other).abs().max() < 1e-12
