"""Random layouts of the weights of random kernels, and pruned weights for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from sparsify import ir
from sparsify.codegen.cpp.strategies import STRATEGIES, find_strategy
from sparsify.reference import Array
from tests.kernels.random_kernels import Drawn

LAYOUTS = (
    ir.DENSE_ROWS,
    ir.Layout("compressed-rows"),
    ir.Layout("block-rows", 8),
    ir.Layout("block-rows", 16),
    ir.Layout("block-rows", 32),
    ir.Layout("masked-rows"),
)


def with_layouts(draw: st.DrawFn, drawn: Drawn) -> Drawn:
    """The same kernel with a layout for each of its weights."""
    layouts = tuple((w.name, draw(st.sampled_from(LAYOUTS))) for w in drawn.kernel.weights)
    schedule = replace(drawn.schedule, layouts=layouts)
    if find_strategy(schedule.strategy).why_not(drawn.kernel, schedule) is not None:
        schedule = replace(schedule, strategy=STRATEGIES[0].name)  # which takes every layout
    return replace(drawn, schedule=schedule)


def prune(data: dict[str, Array], kernel: ir.Kernel, seed: int) -> dict[str, Array]:
    """Weights of which few, half, all or none are left, in runs of 8 or one by one; some are -0."""
    rng = np.random.default_rng(seed)
    pruned = dict(data)
    for weight in kernel.weights:
        values = data[weight.name]
        run, density = rng.choice((1, 8)), rng.choice((0.0, 0.1, 0.5, 1.0))
        kept = rng.random((-(-values.shape[0] // run), values.shape[1])) < density
        kept = np.repeat(kept, run, axis=0)[: values.shape[0]]
        pruned[weight.name] = np.where(kept, values, values * 0).astype(values.dtype)
    return pruned
