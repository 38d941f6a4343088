"""Activations and elementary functions in a step: lowered, interpreted, and against torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.run_lowered import prepared, with_regions
from tests.unrolled import Tape, record_unrolled

STEPS, BATCH, NEURONS = 4, 3, 16
Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "log": lambda x: torch.log(x.abs() + 0.25),
    "log1p": lambda x: torch.log1p(x.abs()),
    "expm1": torch.expm1,
    "erf": torch.erf,
    "elu": lambda x: F.elu(x, 0.75),
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 2.0),
    "softplus": lambda x: F.softplus(x, 2.0, 3.0),
    "gelu": F.gelu,
    "silu": F.silu,
    "fmod": lambda x: torch.fmod(x, 0.75),
    "remainder": lambda x: torch.remainder(x, 0.75),
    "remainder of a negative number": lambda x: x % -0.75,
    "remainder of tensors": lambda x: torch.remainder(1.5 - x, x),
    "spikes of several levels": lambda x: torch.trunc(x / 0.5) * (x > 0),
    "levels, clamped": lambda x: torch.clamp(torch.floor(2 * x) * (x >= 0.5), max=3),
    "ternary spikes": lambda x: torch.sign(x) * (x.abs() >= 0.5),
    "norms": lambda x: x * torch.rsqrt(torch.square(x) + 1) + torch.sqrt(x.abs()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_step_with_it_is_a_kernel_with_torchs_values(name: str) -> None:
    function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(STEPS, BATCH, NEURONS, generator=generator, dtype=torch.float64)

    def model(tape: Tape, x: Tensor) -> Tensor:
        v = torch.zeros(BATCH, NEURONS, dtype=x.dtype)
        kept = []
        for t in tape.loop(range(STEPS)):
            v = 0.5 * v + function(x[t])
            kept.append(v)
        return torch.stack(kept)

    recorded = record_unrolled(model, [x], {})
    graph = prepared(recorded)
    [expected] = recorded.results
    launchables = with_regions(graph)
    [got] = graph(x)
    assert sum(each.calls for each in launchables.values()) == 1
    # Four steps of values below 8, each of a few operations within 2.5 units of the last place.
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * 8 * 16 * 2.0**-52)
    assert torch.isfinite(expected).all() and len(set(expected.flatten().tolist())) > 2
