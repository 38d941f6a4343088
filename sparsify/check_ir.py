"""Whether a kernel is well formed: names, dtypes, populations and the order of phases."""

from __future__ import annotations

import math
from collections.abc import Iterable

from sparsify import ir
from sparsify.scalars.halves import HALVES, computed
from sparsify.scalars.scalar_op import FLOATS
from sparsify.scalars.scalar_ops import SCALAR_OPS, why_malformed

_AXES: tuple[tuple[ir.Axis, ...], ...] = (
    (),
    ("T",),
    ("B",),
    ("N",),
    ("T", "B"),
    ("T", "N"),
    ("B", "N"),
    ("T", "B", "N"),
)


def check_kernel(kernel: ir.Kernel) -> None:
    """Raise ValueError, naming the kernel and the statement, if ``kernel`` is malformed."""
    reason = why_malformed_kernel(kernel)
    if reason is not None:
        raise ValueError(f"kernel {kernel.name!r}: {reason}")


def value_dtypes(kernel: ir.Kernel) -> dict[str, ir.DType]:
    """The dtype of every value that a statement can refer to."""
    dtypes: dict[str, ir.DType] = {o.name: read_dtype(o) for o in kernel.operands}
    dtypes |= {s.name: s.dtype for s in kernel.states}
    weights = {w.name: w.dtype for w in kernel.weights}
    for phase in kernel.phases:
        dtypes |= {s.result: s.dtype for s in phase.body if isinstance(s, ir.Let)}
        dtypes |= {g.result: computed(weights[g.weight]) for g in phase.gathers}
    return dtypes


def read_dtype(tensor: ir.Operand | ir.Output) -> ir.DType:
    """The dtype of the values that statements read from an operand, or store to an output."""
    return "bool" if tensor.dtype == "bits" else tensor.dtype


def why_malformed_kernel(kernel: ir.Kernel) -> str | None:
    """The first thing that is wrong with ``kernel``, or None."""
    return _why_bad_declarations(kernel) or _Scope(kernel).why_bad_phases()


def _why_bad_declarations(kernel: ir.Kernel) -> str | None:
    populations = {p.name: p.size for p in kernel.populations}
    results = [
        s.result for ph in kernel.phases for s in ph.body if isinstance(s, ir.Let | ir.Gather)
    ]
    tensors = [v.name for v in kernel.operands]
    tensors += [w.name for w in kernel.weights] + [s.name for s in kernel.states]
    for kind, names in (
        ("population", [p.name for p in kernel.populations]),
        ("value", tensors + results),
        ("output", [o.name for o in kernel.outputs]),
    ):
        if twice := _first_repeated(names):
            return f"two {kind}s are called {twice!r}"
    if empty := next((name for name, size in populations.items() if size < 1), None):
        return f"population {empty!r} has {populations[empty]} neurons"
    for operand in kernel.operands:
        if operand.axes not in _AXES:
            return f"operand {operand.name!r} has axes {operand.axes}"
        if ("N" in operand.axes) != (operand.population is not None):
            return f"operand {operand.name!r}: an N axis and a population go together"
    for weight in kernel.weights:
        if weight.dtype not in (*FLOATS, *HALVES):
            return f"weight {weight.name!r} is {weight.dtype}"
        if weight.convolution is not None and weight.receivers in populations:
            sizes = populations[weight.receivers], populations.get(weight.senders)
            if reason := _why_bad_convolution(weight.convolution, sizes):
                return f"weight {weight.name!r}: {reason}"
    for output in kernel.outputs:
        if output.axes not in (("T", "B", "N"), ("B", "N")):
            return f"output {output.name!r} has axes {output.axes}"
    tensors_in_memory: tuple[ir.Operand | ir.Output, ...] = (*kernel.operands, *kernel.outputs)
    for tensor in tensors_in_memory:
        if tensor.dtype == "bits" and tensor.axes != ("T", "B", "N"):
            return f"{tensor.name!r} is bits with axes {tensor.axes}, which only bools can have"
    if packed := next((s.name for s in kernel.states if s.dtype == "bits"), None):
        return f"state {packed!r} is bits, which only operands and outputs are"
    named = [o.population for o in kernel.operands if o.population is not None]
    named += [p for w in kernel.weights for p in (w.receivers, w.senders)]
    named += [s.population for s in kernel.states] + [o.population for o in kernel.outputs]
    named += [phase.population for phase in kernel.phases]
    if unknown := next((name for name in named if name not in populations), None):
        return f"no population {unknown!r}"
    return _why_bad_inits(kernel)


def _why_bad_convolution(convolution: ir.Convolution, sizes: tuple[int, int | None]) -> str | None:
    """``sizes`` are the neurons of receivers and of senders."""
    positive = (convolution.window, convolution.stride, convolution.dilation, convolution.pooling)
    if min(min(pair) for pair in positive) < 1 or min(convolution.padding) < 0:
        return f"{convolution} has a window, stride, dilation or padding that is no such thing"
    if min(*convolution.receivers, *convolution.maps) < 1:
        return f"the window of {convolution} is larger than the map"
    senders, receivers = convolution.channels
    maps = receivers * math.prod(convolution.receivers), senders * math.prod(convolution.senders)
    if maps != sizes:
        return f"its maps have {maps} neurons, the populations {sizes}"
    return None


def _why_bad_inits(kernel: ir.Kernel) -> str | None:
    operands = {o.name: o for o in kernel.operands}
    for state in kernel.states:
        init = operands.get(state.init)
        if init is None or "T" in init.axes:
            return f"state {state.name!r}: init {state.init!r} is not an operand without T"
        if init.dtype != state.dtype or init.population not in (None, state.population):
            return f"state {state.name!r}: init {state.init!r} has another dtype or population"
    return None


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


class _Scope:
    """Walks the statements in order; knows what may be read where."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.weights = {w.name: w for w in kernel.weights}
        self.outputs = {o.name: o for o in kernel.outputs}
        self.states = {s.name: s for s in kernel.states}
        self.operands = {o.name: o for o in kernel.operands}
        self.dtypes: dict[str, ir.DType] = {o.name: read_dtype(o) for o in kernel.operands}
        self.dtypes |= {s.name: s.dtype for s in kernel.states}
        self.populations: dict[str, str | None] = {o.name: o.population for o in kernel.operands}
        self.populations |= {s.name: s.population for s in kernel.states}
        self.phase_results: set[str] = set()  # of the phase that is being walked
        self.written: set[tuple[str, str]] = set()

    def why_bad_phases(self) -> str | None:
        for phase in self.kernel.phases:
            self.phase_results = set()
            for statement in phase.body:
                reason = self._why_bad(statement, phase.population)
                if reason is not None:
                    return f"{statement}: {reason}"
        wanted = {("state", s) for s in self.states} | {("output", o) for o in self.outputs}
        if missing := wanted - self.written:
            kind, name = min(missing)
            return f"{kind} {name!r} is never written"
        return None

    def _why_bad(self, statement: ir.Statement, population: str) -> str | None:
        match statement:
            case ir.Let():
                return self._why_bad_let(statement, population)
            case ir.Gather():
                return self._why_bad_gather(statement, population)
            case ir.Store():
                output = self.outputs.get(statement.output)
                target = (output.population, read_dtype(output)) if output else None
                return self._why_bad_write(
                    "output", statement.output, statement.value, target, population
                )
            case ir.Update():
                state = self.states.get(statement.state)
                target = (state.population, state.dtype) if state else None
                return self._why_bad_write(
                    "state", statement.state, statement.value, target, population
                )

    def _why_bad_let(self, let: ir.Let, population: str) -> str | None:
        op = SCALAR_OPS.get(let.op)
        if op is None:
            return f"no scalar op {let.op!r}"
        for arg in let.args:
            if reason := self._why_unreadable(arg, population):
                return reason
        given = tuple(None if isinstance(a, ir.Const) else self.dtypes[a] for a in let.args)
        if reason := why_malformed(op, given, let.dtype):
            return reason
        self._define(let.result, let.dtype, population)
        return None

    def _why_bad_gather(self, gather: ir.Gather, population: str) -> str | None:
        weight = self.weights.get(gather.weight)
        if weight is None:
            return f"no weight {gather.weight!r}"
        if gather.source not in self.dtypes or gather.source in self.phase_results:
            return f"source {gather.source!r} is not a value of an earlier phase"
        if (weight.receivers, weight.senders) != (population, self.populations[gather.source]):
            return "the weight connects other populations"
        operand = self.operands.get(gather.source)
        if operand is not None and operand.axes not in (("T", "B", "N"), ("B", "N")):
            return f"source {gather.source!r} has axes {operand.axes}"
        is_pooled = weight.convolution is not None and weight.convolution.pooling != (1, 1)
        if is_pooled and gather.payload != "binary":
            return "only binary sources are pooled"
        dtype, sent = computed(weight.dtype), computed(self.dtypes[gather.source])
        if sent in FLOATS and sent != dtype:
            return "source and weight have different float dtypes"
        if gather.only is not None:
            if weight.dtype in HALVES:
                return "a restricted gather reads a weight of halves"
            if weight.convolution is not None:
                return "a restricted gather reads a convolution"
            if reason := self._why_bad_only(gather.only, population):
                return reason
        self._define(gather.result, dtype, population)
        return None

    def _why_bad_only(self, only: ir.Ref, population: str) -> str | None:
        if only not in self.dtypes or only in self.phase_results:
            return f"only {only!r} is not a value of an earlier phase"
        if self.populations[only] != population:
            return f"only {only!r} belongs to another population"
        operand = self.operands.get(only)
        if operand is not None and operand.axes not in (("T", "B", "N"), ("B", "N")):
            return f"only {only!r} has axes {operand.axes}"
        return None

    def _why_bad_write(
        self,
        kind: str,
        name: str,
        value: ir.Arg,
        target: tuple[str, ir.DType] | None,
        population: str,
    ) -> str | None:
        if target is None:
            return f"no {kind} {name!r}"
        if (kind, name) in self.written:
            return f"{kind} {name!r} is written twice"
        if target[0] != population:
            return f"{kind} {name!r} belongs to another population"
        if reason := self._why_unreadable(value, population):
            return reason
        if not isinstance(value, ir.Const):
            given = self.dtypes[value]
            if target[1] not in (given, computed(given)):
                return f"{kind} {name!r} is {target[1]}, the value {given}"
        self.written.add((kind, name))
        return None

    def _why_unreadable(self, arg: ir.Arg, population: str) -> str | None:
        if isinstance(arg, ir.Const):
            return None
        if arg not in self.dtypes:
            return f"{arg!r} is not defined before it is read"
        if self.populations[arg] not in (None, population):
            return f"{arg!r} belongs to population {self.populations[arg]!r}"
        return None

    def _define(self, result: str, dtype: ir.DType, population: str) -> None:
        self.dtypes[result] = dtype
        self.populations[result] = population
        self.phase_results.add(result)
