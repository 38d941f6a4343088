"""The public functions; importing this module binds ``torch.nn.Module.sparsify``."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.engine import Engine
from sparsify.install import Sparsified, install
from sparsify.options import Options
from sparsify.plan import Plan


def sparsify(
    model: nn.Module,
    *example_args: Any,
    strict: bool = False,
    plan: Plan | None = None,
    backend: str | None = None,
    timing: bool = True,
    surrogate_window: float | None = None,
    **example_kwargs: Any,
) -> nn.Module:
    """Return ``model`` as a drop-in module whose event-driven parts run as compiled kernels.

    With an example the model is recorded and compiled now, without one at its first call. The model
    itself is not changed; parameters, buffers and attributes are shared.

    strict: raise RefusedError for the first candidate site that is refused, and CompileError where
        sparsify itself fails, in place of running the original with a warning.
    plan: decisions to follow, as from ``fast.plan`` or ``Plan.load``.
    backend, timing, surrogate_window: see ``Options``.
    """
    if isinstance(model, Sparsified):
        model = model.original
    options = Options(strict, backend, timing, surrogate_window)
    engine = Engine(model, options, plan)
    fast = install(engine)
    if example_args or example_kwargs:
        engine.compile_example(example_args, example_kwargs)
    return fast


def bind() -> None:
    """Make ``sparsify`` a method of every module."""
    nn.Module.sparsify = sparsify  # type: ignore[attr-defined]


bind()
