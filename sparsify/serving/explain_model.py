"""What sparsify would do with a model, without installing anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsify.compiling.compiled import Stage
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.products.report import Report
from sparsify.serving.engine import Engine
from sparsify.serving.install import Sparsified


@dataclass(frozen=True, repr=False)
class Explanation(Report):
    """The report of a model that was compiled and not installed, its plan and its stages.

    Printing it gives all of them.
    """

    plan: Plan = field(default_factory=Plan)
    stages: tuple[Stage, ...] = ()

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.stages:
            parts += ["plan", _indented(str(self.plan)), "stages"]
            parts += [_indented(str(stage)) for stage in self.stages]
        return "\n".join(parts)


def explain(
    model: nn.Module,
    *example_args: Any,
    plan: Plan | None = None,
    timing: bool = True,
    gradients: bool | None = None,
    backend: str | None = None,
    **example_kwargs: Any,
) -> Explanation:
    """Record and compile ``model`` on an example; return the report, the plan and the stages.

    gradients: explain a call with gradients, forward and backward; if None, do so if gradients are
        enabled and the model is in training mode.
    backend: see ``Options``.

    The model is left as it was. Raises TraceError if it cannot be recorded.
    """
    original = model.original if isinstance(model, Sparsified) else model
    engine = Engine(original, Options(backend=backend, timing=timing), plan)
    engine.compile_example(example_args, example_kwargs, gradients)
    report = engine.report
    return Explanation(
        **{name: getattr(report, name) for name in Report.__dataclass_fields__},
        plan=engine.plan,
        stages=engine.stages if engine.is_compiled else (),
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
