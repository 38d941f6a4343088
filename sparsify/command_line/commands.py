"""What the commands of ``sparsify`` do; each returns the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.api import sparsify
from sparsify.arrangement import leaves_of
from sparsify.bench import measure_pairs
from sparsify.choosing.rendered import Rendered
from sparsify.codegen.backend import Backend
from sparsify.command_line.target import Target, UsageError, UserCode, load_target
from sparsify.options import Options
from sparsify.serving.backends import make_backends, require_backend
from sparsify.serving.engine import Engine
from sparsify.serving.explain_model import explain
from sparsify.serving.install import Sparsified
from sparsify.training_step import differentiate_result, random_gradients
from sparsify.verification.model import verify


def run_explain(options: argparse.Namespace) -> int:
    target = _load(options)
    _run_original(target)
    said = explain(
        target.model,
        *target.args,
        gradients=options.gradients,
        backend=options.backend,
        **target.kwargs,
    )
    print(said)
    return 0


def run_verify(options: argparse.Namespace) -> int:
    target = _load(options)
    fast, _ = _compile(target, options, timing=False)
    progress = Progress(sys.stderr)
    found = verify(
        target.model,
        fast,
        *target.args,
        kwargs=target.kwargs,
        gradients=options.gradients,
        events=options.events,
        progress=progress,
    )
    progress.clear()
    print(found)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Status 1 if the figures do not count because other work ran."""
    target = _load(options)
    if options.backend and not require_backend(options.backend).is_timed:
        raise UsageError(f"times on {options.backend} say nothing: it is there for verify")
    fast, engine = _compile(target, options, timing=True)

    def check(outputs: Mapping[str, Any]) -> None:
        _check_layouts(outputs["eager"], outputs["sparsified"])

    with torch.set_grad_enabled(options.gradients):
        step = _training_step if options.gradients else _call
        times = measure_pairs(
            {"eager": step(target.model, target), "sparsified": step(fast, target)},
            options.rounds,
            check=check,
        )
    print(times)
    print()
    print(engine.report)
    return 1 if times.why_contended else 0


def run_show(options: argparse.Namespace) -> int:
    target = load_target(options.target, options.batch)
    engine = _compile_text(target, options) if options.backend else None
    if engine is None:
        _, engine = _compile(target, options, timing=False)
    if options.report:
        print(engine.report)
    elif options.stage:
        stages = {stage.name: stage for stage in engine.stages}
        print(_pick(stages, options.stage, "stage").graph.print_readable(print_output=False))
    elif options.kernel:
        sys.stdout.write(_pick(engine.kernels, options.kernel, "kernel").source)
    else:
        _show_all(engine)
    return 0


class Progress:
    """One line on a terminal that is written over; nothing where no terminal is."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_shown = stream.isatty()

    def __call__(self, region: str, done: int, steps: int) -> None:
        if self.is_shown:
            print(f"\r{region}: step {done} of {steps} checked ", end="", file=self.stream)

    def clear(self) -> None:
        if self.is_shown:
            print("\r\033[K", end="", file=self.stream, flush=True)


def _compile(
    target: Target, options: argparse.Namespace, *, timing: bool
) -> tuple[nn.Module, Engine]:
    """Without ``timing`` the cost model decides, so that a busy machine changes no answer."""
    _run_original(target)
    fast = sparsify(target.model, strict=options.strict, backend=options.backend, timing=timing)
    assert isinstance(fast, Sparsified)
    fast.compiled.compile_example(target.args, target.kwargs, options.gradients)
    return fast, fast.compiled


def _compile_text(target: Target, options: argparse.Namespace) -> Engine:
    """Decide by predictions and write the kernels: no device or compiler is needed."""
    _run_original(target)
    (backend,) = _backends(options).values()
    chosen = Options(options.strict, timing=False)
    engine = Engine(target.model, chosen, None, {"cpu": Rendered(backend)})
    engine.compile_example(target.args, target.kwargs, options.gradients)
    return engine


def _load(options: argparse.Namespace) -> Target:
    """The target on the device of the backend that was asked for."""
    target = load_target(options.target, options.batch)
    if not options.backend:
        return target
    (device,) = _backends(options)
    require_backend(options.backend)
    return target.to(device)


def _backends(options: argparse.Namespace) -> dict[str, Backend]:
    try:
        return make_backends(options.backend)
    except ValueError as error:  # of a variable of the environment
        raise UsageError(str(error)) from error


def _call(module: nn.Module, target: Target) -> Callable[[], Any]:
    return lambda: module(*target.args, **target.kwargs)


def _training_step(module: nn.Module, target: Target) -> Callable[[], Any]:
    """A call and the gradients of what requires them; returns both."""
    call = _call(module, target)
    inputs = pytree.tree_leaves((target.args, target.kwargs))
    sources = [*module.parameters(), *(leaf for leaf in inputs if isinstance(leaf, Tensor))]
    weights = random_gradients(call())
    if not weights:
        raise UsageError(f"{target.name} returns nothing that requires grad, as --gradients needs")

    def step() -> Any:
        result = call()
        return result, differentiate_result(result, sources, weights)

    return step


def _run_original(target: Target) -> None:
    """A model that fails on its own inputs is the user's to mend: show where."""
    with UserCode(f"the model of {target.name} fails on the example"):
        target.model(*target.args, **target.kwargs)


def _show_all(engine: Engine) -> None:
    print("stages (--stage NAME prints the graph)")
    for stage in engine.stages:
        print("  " + str(stage).replace("\n", "\n  "))
    print("\nkernels (--kernel NAME prints the source)")
    for name, view in engine.kernels.items():
        kernel = view.kernel
        layers = ", ".join(f"{p.name}: {p.size}" for p in kernel.populations)
        kinds = sorted({w.dtype for w in kernel.weights} | {s.dtype for s in kernel.states})
        lines = len(view.source.splitlines())
        print(f"  {name}: {view.schedule.strategy}, {layers}, {', '.join(kinds)}, {lines} lines")
    if not engine.kernels:
        print("  none: --report says why")


def _pick(named: Mapping[str, Any], name: str, kind: str) -> Any:
    if name in named:
        return named[name]
    known = ", ".join(named) or "none"
    raise UsageError(f"there is no {kind} {name!r}; there is {known}")


def _check_layouts(eager: Any, kernels: Any) -> None:
    pairs = zip(leaves_of(eager), leaves_of(kernels), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            raise AssertionError(f"{list(b.shape)} {b.dtype} instead of {list(a.shape)} {a.dtype}")
