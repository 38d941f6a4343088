"""The least time that the products of a training step must take: operations at measured limits."""

from __future__ import annotations

import time

import torch
from roofline import measure_roofline
from torch import nn
from training_cases import TOKENS, Case
from training_networks import EGRULanguageModel

SIDE = 1024  # of the matrices whose product gives the rate of dense multiply-adds


def least_ms(case: Case) -> float:
    """Every product three times: forward, gradient of the weight, gradient of what it reads.

    The first two need active senders only. The third needs the units that pass a gradient on; the
    network's own input needs none. Where an embedding is read, each of its rows is multiplied once.
    """
    size = case.size
    rows = size.steps * size.batch
    adds = dense = 0.0
    inputs = case.batches[0][0]
    for linear, reads in products(case.model):
        whole = rows * float(linear.weight.numel())
        if reads == "embedding":
            dense += 3 * min(rows, TOKENS) * float(linear.weight.numel())
        elif reads == "input":
            adds += 2 * whole * float((inputs != 0).float().mean())
        else:
            adds += (2 * case.activity + (case.inside if case.inside < 1 else 0)) * whole
            dense += whole if case.inside == 1 else 0
    bytes_read = sum(4 * linear.weight.numel() for linear, _ in products(case.model))
    roofline = measure_roofline(bytes_read)
    return 1e3 * (adds / roofline.adds_per_second + dense / multiply_adds_per_second())


def products(model: nn.Module) -> list[tuple[nn.Linear, str]]:
    """The linear modules, and whether they read events, the network's input or an embedding."""
    first = "embedding" if isinstance(model, EGRULanguageModel) else "input"
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [(linear, first if index == 0 else "events") for index, linear in enumerate(found)]


def multiply_adds_per_second() -> float:
    """Of a large float32 product: the best of five."""
    a = torch.rand(SIDE, SIDE)
    torch.mm(a, a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return float(SIDE**3 / min(times))
