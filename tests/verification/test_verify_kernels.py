"""Lowered kernels through the region check: right ones pass, mutants are caught in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.comparing.figures import RegionFigures
from sparsify.comparing.regions import check_regions
from sparsify.errors import MismatchError, Refusal
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.pipeline import PIPELINE
from sparsify.reference import run_reference
from sparsify.regions.region import Region
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan
from tests.unrolled import Unrolled
from tests.verification.test_verify_regions import CHAINED, FORCED, chaotic, with_ties

Edit = Callable[[ir.Statement], ir.Statement]
Tensors = dict[str, Tensor]


class Interpreted:
    """A launchable that runs the reference interpreter, and counts as if it were compiled."""

    def __init__(self, kernel: ir.Kernel) -> None:
        self.kernel = kernel
        self.schedule = ir.Schedule("reference", tuple((g.result, "event") for g in kernel.gathers))
        self.calls = 0

    def __call__(
        self, tensors: Mapping[str, Tensor], *, steps: int, batch: int, **_: Any
    ) -> Tensors:
        self.calls += 1
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        outputs = run_reference(self.kernel, arrays, steps=steps, batch=batch)
        return {name: torch.from_numpy(output) for name, output in outputs.items()}

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        return {gather.result: (self.calls, self.calls) for gather in self.kernel.gathers}

    def reset_events(self) -> None:
        self.calls = 0


class Wrapped(Interpreted):
    """Changes what the kernel is given or what it returns."""

    def __init__(
        self,
        kernel: ir.Kernel,
        before: Callable[[Tensors], Tensors] = dict,
        after: Callable[[Tensors], Tensors] = dict,
    ) -> None:
        super().__init__(kernel)
        self.before, self.after = before, after

    def __call__(self, tensors: Mapping[str, Tensor], **sizes: Any) -> Tensors:
        return self.after(super().__call__(self.before(dict(tensors)), **sizes))


def rolled(recorded: Unrolled) -> tuple[fx.GraphModule, str, Scan, Lowered]:
    graph = recorded.graph
    for each in PIPELINE:
        graph = each(graph).graph
    [(name, scan)] = [(n, m) for n, m in graph.named_children() if isinstance(m, Scan)]
    lowered = lower_scan(scan, name)
    assert not isinstance(lowered, Refusal)
    assert lowered.kernel.states, "nothing is carried from step to step"
    return graph, name, scan, lowered


def check(
    recorded: Unrolled, make: Callable[[ir.Kernel], Any], after: Callable[[], None] | None = None
) -> RegionFigures:
    graph, name, scan, lowered = rolled(recorded)
    region = Region(scan, lowered, make(lowered.kernel))
    modules: dict[str, nn.Module] = {**dict(graph.named_children()), name: region}
    compiled = fx.GraphModule(modules, graph.graph)
    if after is not None:
        compiled(*recorded.operands)
        region.frozen = True
        after()
    [figures] = check_regions(graph, compiled, recorded.operands)
    return figures


def compiled_as(how: Literal["event", "dense"]) -> Callable[[ir.Kernel], Any]:
    def make(kernel: ir.Kernel) -> Any:
        schedule = ir.Schedule("rows-per-thread", tuple((g.result, how) for g in kernel.gathers))
        backend = CppBackend()
        return backend.load(backend.compile(kernel, schedule))

    return make


def edited(kernel: ir.Kernel, edit: Edit) -> ir.Kernel:
    phases = tuple(replace(p, body=tuple(edit(s) for s in p.body)) for p in kernel.phases)
    assert phases != kernel.phases, "the mutant is no mutant"
    return replace(kernel, phases=phases)


@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("recorded", [chaotic(20), with_ties()], ids=["chaotic", "ties"])
def test_compiled_kernels_pass(recorded: Unrolled, how: Literal["event", "dense"]) -> None:
    figures = check(recorded, compiled_as(how))
    assert figures.launched
    assert figures.thresholds > 0
    assert figures.excluded <= 1e-4
    assert any(output.event and output.eager_rate for output in figures.outputs)


def test_the_reference_interpreter_passes() -> None:
    assert check(chaotic(10), Interpreted).launched
    assert check(with_ties(), Interpreted).undecided == 0


def replace_op(old: str, new: str) -> Edit:
    def edit(statement: ir.Statement) -> ir.Statement:
        if isinstance(statement, ir.Let) and statement.op == old:
            return replace(statement, op=new)
        return statement

    return edit


def scale_constant(near: float) -> Edit:
    """Move every literal near ``near`` by one part in ten thousand."""

    def moved(arg: ir.Arg) -> ir.Arg:
        if isinstance(arg, ir.Const) and abs(arg.value - near) < 1e-6:
            return ir.Const(arg.value * 1.0001)
        return arg

    def edit(statement: ir.Statement) -> ir.Statement:
        if isinstance(statement, ir.Let):
            return replace(statement, args=tuple(moved(arg) for arg in statement.args))
        return statement

    return edit


def update_late(statement: ir.Statement) -> ir.Statement:
    """States keep the value of the step before: every delay is one step too long."""
    if isinstance(statement, ir.Update):
        return replace(statement, value=statement.state)
    return statement


@pytest.mark.parametrize("edit", [scale_constant(0.9), scale_constant(0.7)], ids=["decay", "reset"])
def test_a_wrong_constant_is_caught_in_the_membrane(edit: Edit) -> None:
    with pytest.raises(MismatchError, match=f"{FORCED}: scan_0, sub_tensor") as caught:
        check(chaotic(20), lambda kernel: Interpreted(edited(kernel, edit)))
    facts = caught.value.facts
    assert isinstance(facts["step"], int)
    assert isinstance(facts["index"], tuple) and len(facts["index"]) == 2


def test_greater_or_equal_for_greater_is_caught_at_the_threshold() -> None:
    with pytest.raises(MismatchError, match="; 0 from the threshold") as caught:
        check(with_ties(), lambda kernel: Interpreted(edited(kernel, replace_op("gt", "ge"))))
    assert (caught.value.facts["value"], caught.value.facts["expected"]) == (1, 0)


def test_a_delay_that_is_one_step_too_long_is_caught() -> None:
    with pytest.raises(MismatchError, match=f"{CHAINED}: .*step 1"):
        check(chaotic(10), lambda kernel: Interpreted(edited(kernel, update_late)))


def drop_last_sender(tensors: Tensors) -> Tensors:
    weight = tensors["w_rec"].clone()
    weight[:, -1] = 0
    return {**tensors, "w_rec": weight}


def test_a_dropped_last_sender_is_caught() -> None:
    with pytest.raises(MismatchError, match=FORCED):
        check(chaotic(20), lambda kernel: Wrapped(kernel, before=drop_last_sender))


def test_an_input_of_another_step_is_caught() -> None:
    def shift(tensors: Tensors) -> Tensors:
        return {**tensors, "x_0": tensors["x_0"].roll(1, 0)}

    with pytest.raises(MismatchError, match=f"{CHAINED}: .*step 0"):
        check(chaotic(20), lambda kernel: Wrapped(kernel, before=shift))


def test_swapped_batch_rows_are_caught() -> None:
    def swap(outputs: Tensors) -> Tensors:
        return {name: output.flip(-2) for name, output in outputs.items()}

    with pytest.raises(MismatchError, match=f"{FORCED}: .*batch row 0"):
        check(chaotic(5), lambda kernel: Wrapped(kernel, after=swap))


def test_a_promise_that_weights_stay_is_checked() -> None:
    recorded = chaotic(10)

    def change() -> None:
        recorded.operands[1][7] *= 1.001

    with pytest.raises(MismatchError, match=f"{FORCED}: .*neuron 7") as caught:
        check(recorded, compiled_as("event"), after=change)
    assert caught.value.facts["step"] != 0  # nothing is gathered from the zeros of the first step
