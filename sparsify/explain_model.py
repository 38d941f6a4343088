"""What sparsify would do with a model, in words, without installing anything."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.engine import Engine
from sparsify.install import Sparsified
from sparsify.options import Options
from sparsify.plan import Plan


def explain(
    model: nn.Module,
    *example_args: Any,
    plan: Plan | None = None,
    timing: bool = True,
    gradients: bool | None = None,
    backend: str | None = None,
    **example_kwargs: Any,
) -> str:
    """Record and compile ``model`` on an example; return the report, the plan and the stages.

    gradients: explain a call with gradients, forward and backward; if None, do so if gradients are
        enabled and the model is in training mode.
    backend: see ``Options``.

    The model is left as it was. Raises TraceError if it cannot be recorded.
    """
    original = model.original if isinstance(model, Sparsified) else model
    engine = Engine(original, Options(backend=backend, timing=timing), plan)
    engine.compile_example(example_args, example_kwargs, gradients)
    parts = [str(engine.report)]
    if engine.is_compiled:
        parts += ["plan", _indented(str(engine.plan)), "stages"]
        parts += [_indented(str(stage)) for stage in engine.stages]
    return "\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
