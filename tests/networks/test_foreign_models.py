"""Networks in the style of other libraries: outputs and gradients are eager's at all sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from tests.models.foreign_models import FOREIGN, IN
from tests.models.zoo import tensors_of
from tests.training_harness import (
    MOST_RELATIVE,
    Gradients,
    assert_same_gradients,
    events_at,
    parameter_gradients,
    weighted_sum,
)


def train(module: nn.Module, x: Tensor) -> tuple[list[Tensor], Gradients]:
    module.zero_grad(set_to_none=True)
    result = module(x)
    weighted_sum(result).backward()  # type: ignore[no-untyped-call]
    return [t.detach() for t in tensors_of(result)], parameter_gradients(module)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks_run_as_events(name: str) -> None:
    build, sites = FOREIGN[name]
    torch.manual_seed(0)
    model = build().double()
    eager = copy.deepcopy(model)
    fast: Any = sparsify(model, timing=False, plan=events_at(sites))
    for steps, batch in ((12, 3), (7, 5), (20, 4)):
        x = (torch.rand(steps, batch, IN) < 0.3).double()
        (results, gradients), (wanted, wanted_gradients) = train(fast, x), train(eager, x)
        for got, expected in zip(results, wanted, strict=True):
            assert float((got - expected).norm()) <= MOST_RELATIVE * float(expected.norm())
        assert_same_gradients(gradients, wanted_gradients)
    assert {s.name for s in fast.report.sites if s.decision == "event"} >= set(sites), fast.report
    assert fast.compiled.recordings == 2, fast.report  # one graph for all sizes
