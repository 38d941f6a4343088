"""Weights without their zeros: every layout gives the bits of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sparsify.codegen import launch as launching
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from tests.random_kernels import Drawn, draw_data, kernels
from tests.random_layouts import prune, with_layouts
from tests.test_kernels import compare, load

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def _all_threads_for_small_work() -> Iterator[None]:
    threads, alone = torch.get_num_threads(), launching.ALONE
    launching.ALONE = 0
    yield
    launching.ALONE = alone
    torch.set_num_threads(threads)


@st.composite
def drawn_layouts(draw: st.DrawFn, restricted: bool = False) -> Drawn:
    return with_layouts(draw, draw(kernels(restricted=restricted)))


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking would compile hundreds of kernels
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=drawn_layouts(), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_pruned_data(drawn, seed, special)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking would compile hundreds of kernels
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=drawn_layouts(restricted=True), seed=st.integers(0, 2**16), special=st.booleans())
def test_random_restricted_kernels(drawn: Drawn, seed: int, special: bool) -> None:
    compare_with_pruned_data(drawn, seed, special)


def compare_with_pruned_data(drawn: Drawn, seed: int, special: bool) -> None:
    launch = load(drawn.kernel, drawn.schedule)
    for steps, batch, threads, activity in (
        (4, 3, 2, 0.2),
        (3, 20, 3, 0.2),
        (2, 70, 1, 0.1),
        (1, 1, 2, 1.0),
        (2, 2, 2, 0.0),
    ):
        torch.set_num_threads(threads)
        data = draw_data(drawn, seed, steps, batch, activity=activity, special=special)
        compare(launch, drawn.kernel, prune(data, drawn.kernel, seed), steps, batch)
