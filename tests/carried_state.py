"""One long call of a recurrent kernel beside several that carry its state on."""

from __future__ import annotations

import torch

from sparsify import ir
from sparsify.codegen.backend import Launchable
from tests.kernels.example_kernels import lif_data


def check_one_call_equals_several(launch: Launchable, kernel: ir.Kernel) -> None:
    """``kernel`` is a ``lif`` of the example kernels, and ``launch`` runs it."""
    data = {n: torch.from_numpy(v) for n, v in lif_data(kernel, 12, 4).items()}
    whole = launch(data, steps=12, batch=4)
    parts, start = [], 0
    for steps in (1, 4, 7):
        part = launch({**data, "x": data["x"][start : start + steps]}, steps=steps, batch=4)
        data |= {"v0": part["last_v"], "s0": part["last_s"]}
        parts.append(part["spikes"])
        start += steps
    assert whole["spikes"].any()
    assert torch.equal(whole["spikes"], torch.cat(parts))
    assert torch.equal(whole["last_v"], part["last_v"])
