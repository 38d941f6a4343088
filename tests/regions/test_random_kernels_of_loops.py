"""Random time loops, lowered: kernels must give eager's bits where the arithmetic is exact."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify.scans.scan import retyped
from tests.passes.test_random_loops import BATCH, N, RandomModel
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import prepared, with_regions
from tests.unrolled import record_unrolled


def quarters(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).float() / 4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 4), pruned=st.booleans())
def test_random_kernels_keep_eagers_bits(seed: int, steps: int, pruned: bool) -> None:
    model = RandomModel(seed)
    generator = torch.Generator().manual_seed(seed)
    model.weights = {k: quarters(tuple(w.shape), generator) for k, w in model.weights.items()}
    shape = (BATCH, steps, N) if model.batch_first else (steps, BATCH, N)
    recorded = record_unrolled(model, [quarters(shape, generator)], model.weights)
    if pruned:
        recorded.graph.graph.eliminate_dead_code()
        recorded.graph.recompile()
    double = retyped(recorded.graph, torch.float64)(*(t.double() for t in recorded.operands))
    exact = zip(double, recorded.results, strict=True)
    assume(all(torch.equal(a, b.double()) for a, b in exact))

    graph = prepared(recorded)
    launchables = with_regions(graph)
    assert_same(graph(*recorded.operands), recorded.results)
    assert all(launchable.calls == 1 for launchable in launchables.values())
