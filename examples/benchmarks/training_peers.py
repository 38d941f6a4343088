"""What our training step is compared with: the same step on the libraries at hand."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jax_training import jax_step
from training_cases import Batch, Case, train_step

import sparsify

Step = Callable[[Batch], Mapping[str, Any]]
DENSE, OURS = "sparsify dense", "sparsify"


def peer_steps(case: Case, *, compiled: bool, compile_steps: int) -> dict[str, Step]:
    """Eager and every other library; says how long those took to compile."""
    model, steps = case.model, case.size.steps
    whole = partial(model.in_chunks, advance=_advance, steps=steps)
    found: dict[str, Step] = {
        "eager": partial(train_step, model, model),
        "hoisted": partial(train_step, whole, model),
    }
    if compiled:
        torch._dynamo.reset()  # what an earlier network compiled counts towards its limits
        chunk = max(n for n in range(1, compile_steps + 1) if steps % n == 0)
        forward = partial(
            model.in_chunks, advance=torch.compile(_advance, dynamic=False), steps=chunk
        )
        found[f"torch.compile({chunk})"] = partial(train_step, forward, model)
    if importlib.util.find_spec("jax"):
        found["jax.grad(scan)"] = jax_step(case)
    for name, step in found.items():
        if name not in ("eager", "hoisted"):
            first, later = (_seconds(step, case.batches[0]) for _ in range(2))
            print(f"{name} compiled for {first - later:.1f} s")
    return found


def our_steps(case: Case) -> dict[str, Step]:
    """Our kernels with the decisions that were taken, and with every one of them dense."""
    x = case.batches[0][0]
    start = time.perf_counter()
    fast: Any = sparsify.sparsify(case.model, x)
    train_step(fast, case.model, case.batches[0])
    print(f"sparsify compiled for {time.perf_counter() - start:.1f} s")
    plan = fast.plan
    for site in fast.report.sites:
        if site.decision != "kept":
            plan = plan.pin(site.name, "dense")
    dense = sparsify.sparsify(case.model, x, plan=plan)
    print(fast.report)
    return {
        DENSE: partial(train_step, dense, case.model),
        OURS: partial(train_step, fast, case.model),
    }


def _advance(module: Any, *arguments: Any) -> Any:
    return module.advance(*arguments)


def _seconds(step: Step, batch: Batch) -> float:
    start = time.perf_counter()
    step(batch)
    return time.perf_counter() - start
