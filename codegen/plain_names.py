"""A kernel under names that say nothing of the model: equal layers of a model share a binary.

Two layers of one class give kernels that differ in names, notes and lines only, and a compiler
takes up to a second for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sparsify import ir

PLAIN = "kernel"


def with_plain_names(kernel: ir.Kernel, schedule: ir.Schedule) -> tuple[ir.Kernel, ir.Schedule]:
    """The same kernel and schedule; equal for all that differ in nothing but names and notes."""
    renamed = _Renaming(kernel)
    values = renamed.values
    how, layouts = dict(schedule.gathers), dict(schedule.layouts)
    gathers = [g.result for g in kernel.gathers]
    weights = [w.name for w in kernel.weights if w.name in layouts]
    return renamed.kernel(), replace(
        schedule,
        gathers=tuple((values[result], how[result]) for result in gathers),
        layouts=tuple((values[weight], layouts[weight]) for weight in weights),
    )


class _Renaming:
    """Names by kind and number, in the order in which a kernel defines them."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self._given = kernel
        defined = [operand.name for operand in kernel.operands]
        defined += [weight.name for weight in kernel.weights]
        defined += [state.name for state in kernel.states]
        statements = [s for phase in kernel.phases for s in phase.body]
        defined += [s.result for s in statements if isinstance(s, ir.Let | ir.Gather)]
        self.values = _numbered("v", defined)
        self._outputs = _numbered("out", (o.name for o in kernel.outputs))
        self._populations = _numbered("p", (p.name for p in kernel.populations))

    def kernel(self) -> ir.Kernel:
        given, of = self._given, self._populations
        values, outputs = self.values, self._outputs
        return replace(
            given,
            name=PLAIN,
            populations=tuple(replace(p, name=of[p.name]) for p in given.populations),
            operands=tuple(
                replace(o, name=values[o.name], population=of.get(o.population or ""), note="")
                for o in given.operands
            ),
            weights=tuple(
                replace(
                    w,
                    name=values[w.name],
                    receivers=of[w.receivers],
                    senders=of[w.senders],
                    note="",
                )
                for w in given.weights
            ),
            states=tuple(
                replace(
                    s,
                    name=values[s.name],
                    population=of[s.population],
                    init=values[s.init],
                    note="",
                )
                for s in given.states
            ),
            phases=tuple(
                ir.Phase(of[phase.population], tuple(map(self._statement, phase.body)))
                for phase in given.phases
            ),
            outputs=tuple(
                replace(o, name=outputs[o.name], population=of[o.population], note="")
                for o in given.outputs
            ),
            origin=(),
        )

    def _statement(self, statement: ir.Statement) -> ir.Statement:
        values = self.values
        match statement:
            case ir.Let(result=result, args=args):
                return replace(
                    statement, result=values[result], args=tuple(map(self._arg, args)), note=""
                )
            case ir.Gather(result=result, weight=weight, source=source, only=only):
                return replace(
                    statement,
                    result=values[result],
                    weight=values[weight],
                    source=values[source],
                    only=None if only is None else values[only],
                    note="",
                )
            case ir.Store(output=output, value=value):
                return ir.Store(self._outputs[output], self._arg(value))
            case ir.Update(state=state, value=value):
                return ir.Update(values[state], self._arg(value))

    def _arg(self, arg: ir.Arg) -> ir.Arg:
        return arg if isinstance(arg, ir.Const) else self.values[arg]


def _numbered(kind: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{kind}{number}" for number, name in enumerate(dict.fromkeys(names))}
