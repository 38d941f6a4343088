"""The public functions; importing this module binds ``torch.nn.Module.sparsify``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.pruning.prune_model import prune_model
from sparsify.pruning.request import Pruning
from sparsify.serving.engine import Engine
from sparsify.serving.install import Sparsified, install


def sparsify(
    model: nn.Module,
    *example_args: Any,
    strict: bool = False,
    plan: Plan | None = None,
    backend: str | None = None,
    timing: bool = True,
    surrogate_window: float | None = None,
    prune: Pruning | float | str | Mapping[str, float] | None = None,
    **example_kwargs: Any,
) -> nn.Module:
    """Return ``model`` as a drop-in module whose event-driven parts run as compiled kernels.

    With an example the model is recorded and compiled now, without one at its first call. The model
    itself is not changed; parameters, buffers and attributes are shared.

    ``torch.compile`` of what contains the result leaves its call to our kernels and compiles what
    is around it. ``torch.export`` and ``torch.jit.trace`` see the original operations, and no
    kernel of ours; ``torch.jit.script`` raises SparsifyError.

    strict: raise RefusedError for the first candidate site that is refused, and CompileError where
        sparsify itself fails, in place of running the original with a warning; at each such call,
        also where a hook was added since.
    plan: decisions to follow, as from ``fast.plan`` or ``Plan.load``.
    backend, timing, surrogate_window: see ``Options``.
    prune: make weights zero first, in a copy of the model: the fraction that goes, an N:M pattern
        such as "2:4" that stays, or a ``Pruning`` that says more. Raises PruningError for what
        cannot be pruned so; what was reached is in the report.
    """
    if isinstance(model, Sparsified):
        model = model.original
    options = Options(strict, backend, timing, surrogate_window)
    outcome = None
    if prune is not None:
        model, outcome = prune_model(model, prune, *example_args, **example_kwargs)
    engine = Engine(model, options, plan, pruned=outcome)
    fast = install(engine)
    if example_args or example_kwargs:
        engine.compile_example(example_args, example_kwargs)
    return fast


def bind() -> None:
    """Make ``sparsify`` a method of every module."""
    nn.Module.sparsify = sparsify  # type: ignore[attr-defined]


bind()
