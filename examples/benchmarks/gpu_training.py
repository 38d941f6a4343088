"""The time and memory of a training step: ours, eager, captured in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from gpu_attempts import FAULTS
from gpu_forward import FAILURES
from gpu_machine import median_ms, release
from gpu_ours import CHOSEN
from gpu_peers import EAGER, GRAPHED, GRAPHED_TF32, WARM_UP, new_stream, product_precision
from gpu_place import Place
from training import check_directions, check_gradients
from training_cases import Batch, Case, Size, make_case, train_step
from training_networks import loss_of

import sparsify
from sparsify.bench import wait_for_devices
from sparsify.plan import Plan

DENSE = "dense"
Step = Callable[[Batch], Mapping[str, Any]]


def measure_training(place: Place, size: Size, rounds: int) -> dict[str, Any]:
    """A row: milliseconds and MiB of a step of everything, and what failed."""
    with place.device:
        case = make_case(size)
        gradients_off = _check_gradients(place, case)
        made, failed = _make(place, _makers(place, case), case.batches[0])
        times = median_ms(place, made, case.batches[0], rounds)
        memory = {name: step_memory(step, case) for name, step in made.items()}
    release()
    return {
        **asdict(size),
        "measured_activity": case.activity,
        "measured_inside": case.inside,
        "float64_gradients_off_by": gradients_off,
        "ms_per_step": times,
        "mib_per_step": memory if place.is_gpu else {},
        "failed": failed,
    }


def step_memory(step: Step, case: Case) -> float:
    """The peak beyond what is held before the step, in MiB; 0 where torch does not count."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0.0
    case.model.zero_grad(set_to_none=True)
    wait_for_devices()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step(case.batches[0])
    wait_for_devices()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _check_gradients(place: Place, case: Case) -> float | None:
    """How far ours are off those of float64; None if that has ended a process before."""
    try:
        place.attempts.begin("gradients of float64")
    except RuntimeError:
        return None
    return check_gradients(case, **place.options)


def _makers(place: Place, case: Case) -> dict[str, Callable[[], Step]]:
    model, batch = case.model, case.batches[0]
    makers: dict[str, Callable[[], Step]] = {
        EAGER: lambda: partial(train_step, model, model),
        CHOSEN: lambda: partial(train_step, sparsified(place, case, None), model),
        DENSE: lambda: partial(train_step, sparsified(place, case, "dense"), model),
    }
    if place.is_gpu:
        makers |= {
            GRAPHED: partial(graphed_step, model, model, batch, "highest"),
            GRAPHED_TF32: partial(graphed_step, model, model, batch, "high"),
        }
    return makers


def sparsified(place: Place, case: Case, how: str | None) -> Any:
    """The model with our decisions, or with every site of the forward and the backward dense."""
    x = case.batches[0][0]
    fast: Any = sparsify.sparsify(case.model, x, **place.options)
    train_step(fast, case.model, case.batches[0])
    if how is None:
        return fast
    plan: Plan = fast.plan
    for site in fast.report.sites:
        if site.decision != "kept":
            plan = plan.pin(site.name, "dense")
    return sparsify.sparsify(case.model, x, plan=plan, **place.options)


def graphed_step(forward: Any, model: Any, batch: Batch, precision: str) -> Step:
    """A whole step captured in a CUDA graph, its gradients in memory of the graph."""
    x, targets = batch
    with product_precision(precision):
        stream = new_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                train_step(forward, model, batch)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss: Any = loss_of(forward(x), targets)
            loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def replay(_: Batch) -> Mapping[str, Any]:
        graph.replay()
        return gradients

    return replay


def _make(
    place: Place, makers: Mapping[str, Callable[[], Step]], batch: Batch
) -> tuple[dict[str, Step], dict[str, str]]:
    """What runs, with gradients that point where eager's do, and why the others do not."""
    made: dict[str, Step] = {}
    failed: dict[str, str] = {}
    expected: Mapping[str, Any] = {}
    for name, make in makers.items():
        try:
            place.attempts.begin(name)
            step = make()
            gradients = {n: g.detach().cpu().clone() for n, g in step(batch).items()}
            expected = expected or gradients
            check_directions({}, {EAGER: expected, name: gradients})
        except FAULTS:
            raise
        except FAILURES as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:400]}"
            continue
        made[name] = step
    place.attempts.end()
    return made, failed
