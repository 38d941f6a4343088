"""Operations on float16 and bfloat16 in a step: rounded as eager rounds, and bounded.

Literals are no halves: operations differ in whether they round them before they compute.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsify.rounding.error_bounds import bound_errors
from tests.run_lowered import captured, prepared, scans_of, with_regions
from tests.unrolled import Tape, record_unrolled

STEPS, BATCH, NEURONS = 3, 4, 200
HALVES = (torch.float16, torch.bfloat16)
Function = Callable[[Tensor], Tensor]
A, B = 0.9037123, 0.1234567

# Operations that float32 rounds correctly, or exactly: every one gives eager's bits.
SAME: dict[str, Function] = {
    "mul": lambda x: x * A,
    "div": lambda x: x / A,
    "divided by": lambda x: A / (x.abs() + 0.5),
    "add": lambda x: x + A,
    "sub": lambda x: x - A,
    "rsub": lambda x: A - x,
    "tensor of no dim": lambda x: x * torch.full((), A) + torch.full((), B),
    "gt": lambda x: (x > A).to(x.dtype),
    "compared with itself": lambda x: (torch.full_like(x, A) >= A).to(x.dtype) + x,
    "where": lambda x: torch.where(x > 0, x, torch.full_like(x, A)),
    "masked_fill": lambda x: x.masked_fill(x > 0, B),
    "clamp": lambda x: x.clamp(-A, B),
    "lerp": lambda x: torch.lerp(x, 2 * x, A),
    "square": torch.square,
    "cube": lambda x: x**3,
    "inverse square": lambda x: (x.abs() + 0.5) ** -2,
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "fmod": lambda x: torch.fmod(x, B),
    "remainder": lambda x: torch.remainder(x, -B),
    "leaky_relu": lambda x: F.leaky_relu(x, B),
    "softshrink": lambda x: F.softshrink(x, B),
    "hardshrink": lambda x: F.hardshrink(x, B),
    "threshold": lambda x: F.threshold(x, B, A),
    "heaviside": lambda x: torch.heaviside(x, torch.full_like(x, B)),
    "to float32 and back": lambda x: (x.float() * A + B).to(x.dtype),
    "to float64 and back": lambda x: (x.double() * A).to(x.dtype),
    "maximum": lambda x: torch.maximum(x, x * B),
}
# Within a few float32 units of eager's, which round to the same half or to its neighbour: our own
# sequences of operations, and a product that eager fuses into a sum.
NEAR: dict[str, Function] = {
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "log1p": lambda x: torch.log1p(x.abs()),
    "silu": F.silu,
    "addcmul": lambda x: torch.addcmul(x, x, 1.5 - x, value=A),
    "elu": lambda x: F.elu(x, A),
    "softplus": F.softplus,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
}


def results_of(function: Function, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eager's and those of the kernel, of a membrane whose every step is rounded."""
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(STEPS, BATCH, NEURONS, generator=generator)).to(dtype)

    def model(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros(BATCH, NEURONS, dtype=x.dtype)
        kept = []
        for t in tape.loop(range(STEPS)):
            v = A * v + x[t]
            kept.append(function(v))
        return torch.stack(kept)

    recorded = record_unrolled(model, [x], {})
    graph = prepared(recorded)
    check_bounds(graph, x)
    [expected] = recorded.results
    launchables = with_regions(graph)
    [got] = graph(x)
    assert sum(each.calls for each in launchables.values()) == 1
    assert got.dtype is expected.dtype is dtype
    assert torch.isfinite(expected).all() and len(set(expected.flatten().tolist())) > 1
    return got, expected


def check_bounds(graph: torch.fx.GraphModule, x: Tensor) -> None:
    """Eager's results are where their bounds say, and most of those leave no choice."""
    [scan] = scans_of(graph).values()
    with captured(graph) as seen:
        graph(x)
    [(_, carries, xs, consts)] = seen.values()
    given = [*carries, *(x[0] for x in xs), *consts]
    bounds = bound_errors(scan.body, given)
    assert not bounds.without_row
    for bounded, result in zip(bounds.outputs, scan.body(*given), strict=True):
        distance = (result.double() - bounded.value.double()).abs()
        assert (distance <= bounded.full_error).all()
        is_free = bounded.full_error.isinf()  # no bound is known of fmod, remainder, x**-2
        assert (is_free | (bounded.full_error == 0)).double().mean() > 0.7


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SAME)
def test_has_the_bits_of_eager(name: str, dtype: torch.dtype) -> None:
    got, expected = results_of(SAME[name], dtype)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NEAR)
def test_is_eagers_half_or_its_neighbour(name: str, dtype: torch.dtype) -> None:
    got, expected = results_of(NEAR[name], dtype)
    apart = (got.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(apart.max()) <= 1
    assert (apart == 0).double().mean() > 0.99
