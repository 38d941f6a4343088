"""torch.compile of the loop, some steps at a time, the whole then captured in a graph.

It unrolls the loop and compiles for long, so it is measured at few sizes.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from gpu_machine import median_ms, release
from gpu_peers import graphed
from gpu_place import Place
from gpu_training import graphed_step
from torch import Tensor
from training_cases import Case, Size, make_case, train_step

CHUNK = 10  # steps that are unrolled


def measure_compiled(place: Place, size: Size, rounds: int) -> dict[str, Any]:
    """A row: forward and training step with torch.compile, and how long it compiled."""
    torch._dynamo.reset()  # what an earlier network compiled counts towards its limits
    with place.device:
        case = make_case(size)
        chunk = max(n for n in range(1, CHUNK + 1) if size.steps % n == 0)
        advance = torch.compile(_advance, dynamic=False)
        forward = partial(case.model.in_chunks, advance=advance, steps=chunk)
        start = time.perf_counter()
        train_step(forward, case.model, case.batches[0])
        compiled_s = time.perf_counter() - start
        row = {**asdict(size), "chunk": chunk, "compiled_s": compiled_s}
        row["ms_per_step"] = _measure_training(place, case, forward, rounds)
        row["us_per_step"] = _measure_forward(place, case, forward, rounds)
    release()
    return row


def _measure_training(place: Place, case: Case, forward: Any, rounds: int) -> dict[str, float]:
    steps: dict[str, Any] = {"torch.compile": partial(train_step, forward, case.model)}
    if place.is_gpu:
        batch = case.batches[0]
        step = graphed_step(forward, case.model, batch, torch.get_float32_matmul_precision())
        steps["torch.compile, graphed"] = step
    return median_ms(place, steps, case.batches[0], rounds)


def _measure_forward(place: Place, case: Case, forward: Any, rounds: int) -> dict[str, float]:
    x: Tensor = case.batches[0][0]
    with torch.no_grad():
        functions = {"torch.compile": forward}
        forward(x)
        if place.is_gpu:
            functions["torch.compile, graphed"] = graphed(forward, x)
        times = median_ms(place, functions, x, rounds)
    return {name: 1e3 * ms / case.size.steps for name, ms in times.items()}


def _advance(module: Any, *arguments: Any) -> Any:
    return module.advance(*arguments)
