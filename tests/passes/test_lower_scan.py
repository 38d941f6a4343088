from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify import ir
from sparsify.errors import Location, RefusalCode
from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.scans.scan import Scan, retyped
from tests.models.looped_models import ROLLED_WHOLE, WEIGHTS, B, H, lif, recurrent
from tests.models.neuron_models import (
    LAYERS,
    NEURONS,
    ROW,
    WHOLE,
    channels,
    drive,
    graded,
    loop,
    two_exchanges,
    unbatched,
)
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import lowered, one_scan, prepared, refused, scans_of, with_regions
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

W0, W1, W2, _, BIAS = WEIGHTS.values()
Model = Callable[[Tape, Tensor], Any]
aten = torch.ops.aten


def recorded(model: Model, steps: int) -> Unrolled:
    return record_unrolled(model, [drive(steps)], NEURONS)


def assert_exact(graph: fx.GraphModule, operands: list[Tensor]) -> list[Tensor]:
    """The results, after a check that no rounding happens: float64 gives the same."""
    single = graph(*operands)
    double = retyped(graph, torch.float64)(*(t.double() for t in operands))
    for a, b in zip(single, double, strict=True):
        assert torch.equal(a.double(), b.double())
    return list(single)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("model", [*ROLLED_WHOLE, *LAYERS, *WHOLE], ids=lambda m: m.__name__)
def test_kernels_compute_what_the_loops_compute(model: Model, steps: int) -> None:
    found = recorded(model, steps)
    graph = prepared(found)
    is_exact = model.__name__ not in {"decaying", "static_input", "quadratic"}  # 0.9 ** t, sixths
    exact = assert_exact(graph, found.operands) if is_exact else found.results
    refusals = {"second_order"}  # stacks two values in each step
    if model.__name__ in refusals:
        assert refused(scans_of(graph)["scan_0"]).code == "unsupported-op"
        return
    launchables = with_regions(graph)

    results = graph(*found.operands)
    assert all(launchable.calls == 1 for launchable in launchables.values())
    assert launchables
    assert_same(results, found.results)
    assert_same(results, exact)


@pytest.mark.parametrize("model", [*ROLLED_WHOLE, *LAYERS], ids=lambda m: m.__name__)
def test_kernels_with_all_products_inside(model: Model) -> None:
    found = recorded(model, 3)
    rolled = find_events(roll_loops(found.graph).graph).graph
    graph = split_time(rolled, lambda product: False).graph
    launchables = with_regions(graph)
    assert_same(graph(*found.operands), found.results)
    assert all(launchable.calls == 1 for launchable in launchables.values())


@pytest.mark.parametrize("model", [recurrent, *LAYERS], ids=lambda m: m.__name__)
def test_float64_agrees_to_rounding(model: Model) -> None:
    generator = torch.Generator().manual_seed(5)
    operands = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64) / math.sqrt(H)
        for t in recorded(model, 4).operands
    ]
    # The neurons' own parameters are literals of their code or stay as they are.
    names = [n.name for n in recorded(model, 4).graph.graph.find_nodes(op="placeholder")]
    for index, name in enumerate(names):
        if name in ("beta", "theta", "row", "channels"):
            operands[index] = NEURONS[name].double()
    graph = retyped(prepared(recorded(model, 4)), torch.float64)
    expected = graph(*operands)
    with_regions(graph)

    # A step rounds at most 2 * (H + 1) sums and 16 other results. An error made in one step is
    # multiplied by at most 2 H max|w| < 2 H in each of the three others, and no value exceeds
    # ``largest``. Integers and spikes have to be equal.
    largest = max(1.0, *(float(value.abs().max()) for value in expected))
    bound = (2 * (H + 1) + 16) * 4 * (2 * H) ** 3 * largest * torch.finfo(torch.float64).eps
    for got, wanted in zip(graph(*operands), expected, strict=True):
        assert float((got - wanted).abs().max()) <= bound
        assert torch.equal(got != 0, wanted != 0)


def test_a_recurrent_layer_is_one_phase_with_two_gathers() -> None:
    kernel = lowered(one_scan(recurrent, drive(3), WEIGHTS)).kernel
    [phase] = kernel.phases
    assert [g.payload for g in kernel.gathers] == ["real", "binary"]
    assert [p.size for p in kernel.populations] == [H, H]
    assert phase.population == kernel.gathers[0].source or phase.population == "neurons"
    assert [s.name for s in kernel.states] == ["spike", "state"]
    assert [w.note for w in kernel.weights] == ["w0", "w1"]
    assert [o.note for o in kernel.operands if o.population and o.axes == ("N",)] == ["bias [N]"]
    assert "model.py:2  aten.mm.default" in kernel.origin


def test_the_lowered_sites_name_weight_and_line() -> None:
    first, second = lowered(one_scan(recurrent, drive(3), WEIGHTS)).sites
    assert (first.weight, first.event) == ("w0", False)
    assert (second.weight, second.event) == ("w1", True)
    assert second.location is not None
    assert second.location.line == 2


def test_a_product_of_this_steps_values_starts_a_phase() -> None:
    kernel = lowered(one_scan(two_exchanges, drive(3), WEIGHTS)).kernel
    assert len(kernel.phases) == 2
    inner = next(g for g in kernel.gathers if g.weight == "w2")
    results = [s.result for s in kernel.phases[0].body if isinstance(s, ir.Let)]
    assert inner.source in results
    assert inner in kernel.phases[1].body


def test_payloads_are_binary_only_where_facts_say_so() -> None:
    [gather] = [
        g
        for g in lowered(one_scan(loop(graded), drive(3), NEURONS)).kernel.gathers
        if g.weight == "w1"
    ]
    assert gather.payload == "real"


def test_states_of_channels_are_flattened_and_their_parameters_expanded() -> None:
    scan = next(s for s in scans_of(prepared(recorded(channels, 3))).values() if s.carries)
    found = lowered(scan)
    assert {p.size for p in found.kernel.populations} == {H}
    [expanded] = [b for b in found.bindings if "expand" in b.views]
    assert expanded.neurons == (2, 2, 2)
    assert scan.placeholders[scan.carries + scan.xs + expanded.index].name == "channels"


def test_a_model_without_a_batch_runs_as_one_row() -> None:
    found = lowered(one_scan(unbatched, drive(3), NEURONS))
    assert not found.batched
    assert all("B" not in operand.axes for operand in found.kernel.operands)


def free_batch(tape: Tape, x: Tensor) -> Tensor:
    v = z = torch.zeros(x.size(1), H)
    out = []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0, BIAS) + F.linear(z, W1))
        out.append(z)
    return torch.stack(out)


def test_kernels_of_other_batch_sizes_and_steps_are_equal() -> None:
    kernels = [
        lowered(one_scan(free_batch, dyadic(steps, batch, H), WEIGHTS))
        for steps, batch in ((3, 2), (5, 7), (4, 1))
    ]
    assert kernels[0] == kernels[1] == kernels[2]


def test_names_come_from_the_users_lines() -> None:
    scan = one_scan(recurrent, drive(3), WEIGHTS)
    for node in scan.body.graph.nodes:
        location = node.meta.get("location")
        if location is not None and node.target is aten.sub.Tensor:
            object.__setattr__(location, "code", "mem = mem - spk  # reset")
    names = [state.name for state in lowered(scan).kernel.states]
    assert names == ["spike", "mem"]


# ---- what is refused


def softmax(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v * 0.5 + current
    return v, torch.softmax(v, 1)


def lateral_sum(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    z = (v + current > 1).float()
    return v + current - z.sum(1, keepdim=True), z


def winner(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + current
    return v, (v == v.amax(1, keepdim=True)).float()


def noisy(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + current + torch.rand(B, H)
    return v, (v > 1).float()


def halves(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    first, second = current[:, :4] + v[:, 4:], v[:, :4]
    v = torch.cat((first, second), 1)
    return v, (v > 1).float()


def power(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + (current + v) ** 2.5
    return v, (v > 1).float()


def complicated(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = torch.view_as_real(torch.complex(v, current)).sum(-1)
    return v, (v > 1).float()


def mixed(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    v = v + current
    return v, (v.t() > 1).float().t()


REFUSED: tuple[tuple[Callable[..., Any], RefusalCode, str], ...] = (
    (softmax, "unsupported-op", "softmax"),
    (lateral_sum, "unsupported-op", "sum"),
    (winner, "unsupported-op", "amax"),
    (noisy, "random", "rand"),
    (halves, "unsupported-op", "slice"),
    (power, "unsupported-op", "2.5"),
    (complicated, "unsupported-layout", "complex64"),
    (mixed, "unsupported-op", "moves neurons"),
)


@pytest.mark.parametrize(("step", "code", "says"), REFUSED, ids=lambda v: getattr(v, "__name__", v))
def test_what_kernels_cannot_do_is_refused(
    step: Callable[..., Any], code: RefusalCode, says: str
) -> None:
    graph = roll_loops(recorded(loop(step), 3).graph).graph
    [scan] = scans_of(graph).values()
    refusal = refused(scan)
    assert refusal.code == code
    assert says in refusal.reason
    assert refusal.remedy
    assert refusal.location is not None
    assert (refusal.location.file, refusal.location.line) == ("model.py", 2)


def body(
    build: Callable[[fx.Graph], Any], shapes: list[tuple[int, ...]], carries: int, xs: int = 0
) -> Scan:
    """A Scan with the first placeholders as carries, then those of steps, the others as consts."""
    graph = fx.Graph()
    for index, shape in enumerate(shapes):
        node = graph.placeholder(f"p{index}")
        node.meta["val"] = torch.empty(shape, device="meta")
    graph.output(build(graph))
    gm = fx.GraphModule({}, graph)
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)
    return Scan(gm, carries, xs, len(shapes) - carries - xs)


def test_a_value_of_another_layers_size_is_refused() -> None:
    def build(graph: fx.Graph) -> Any:
        v, gain, w = graph.nodes
        read = graph.call_function(aten.mm.default, (v, w))
        return (graph.call_function(aten.mul.Tensor, (v, gain)), read)

    refusal = refused(body(build, [(B, H), (B, 1), (H, 3)], 2))
    assert refusal.code == "unsupported-layout"
    assert "1 neuron where 8" in refusal.reason


def test_refusals_call_values_as_the_user_does() -> None:
    """As e-prop does, which keeps a trace for every pair of neurons."""

    def build(graph: fx.Graph) -> Any:
        v, traces, w = graph.nodes
        read = graph.call_function(aten.mm.default, (v, w))
        sender = graph.call_function(aten.relu.default, (read,))
        sender.meta["location"] = Location("model.py", 7, "psi = torch.relu(self.rec(v))")
        paired = graph.call_function(aten.unsqueeze.default, (sender, -1))
        return (read, graph.call_function(aten.mul.Tensor, (traces, paired)))

    refusal = refused(body(build, [(B, H), (B, H, H), (H, H)], 2))
    assert refusal.code == "unsupported-layout"
    assert f"psi.unsqueeze(...) has {H} neurons where {H * H} read it" in refusal.reason


def test_two_batch_sizes_are_refused() -> None:
    def build(graph: fx.Graph) -> Any:
        a, b, w = graph.nodes
        return tuple(graph.call_function(aten.mm.default, (v, w)) for v in (a, b))

    refusal = refused(body(build, [(3, H), (5, H), (H, H)], 2))
    assert refusal.code == "unsupported-layout"
    assert "3 rows" in refusal.reason
    assert "5 rows" in refusal.reason


def test_a_weight_that_changes_is_refused() -> None:
    def build(graph: fx.Graph) -> Any:
        v, w = graph.nodes
        read = graph.call_function(aten.mm.default, (v, w))
        return (read, graph.call_function(aten.mul.Tensor, (w, 0.5)))

    refusal = refused(body(build, [(B, H), (H, H)], 2))
    assert refusal.code == "unsupported-layout"
    assert "changes from step to step" in refusal.reason


def test_a_parameter_with_rows_of_its_own_is_refused() -> None:
    def build(graph: fx.Graph) -> Any:
        v, rows, w = graph.nodes
        read = graph.call_function(aten.linear.default, (v, w))
        return (graph.call_function(aten.add.Tensor, (read, rows)),)

    refusal = refused(body(build, [(B, 4, H), (4, H), (H, H)], 1))
    assert refusal.code == "unsupported-layout"
    assert "4 rows" in refusal.reason


def test_values_of_rows_are_not_those_of_as_many_neurons() -> None:
    """``v * (lengths > t).unsqueeze(1)`` for H samples of H neurons; ``t`` is of the step."""

    def build(graph: fx.Graph) -> Any:
        v, t, lengths = graph.nodes
        goes_on = graph.call_function(aten.gt.Tensor, (lengths, t))
        read = graph.call_function(aten.unsqueeze.default, (goes_on, 1))
        return (graph.call_function(aten.mul.Tensor, (v, read)),)

    kernel = lowered(body(build, [(H, H), (), (H,)], 1, xs=1)).kernel
    assert [o.axes for o in kernel.operands] == [("B", "N"), ("B",), ("T",)]


def test_a_gain_per_sample_is_an_operand_without_neurons() -> None:
    def build(graph: fx.Graph) -> Any:
        v, gain = graph.nodes
        return (graph.call_function(aten.mul.Tensor, (v, gain)),)

    assert ROW.shape == (B, 1)
    kernel = lowered(body(build, [(B, H), (B, 1)], 1)).kernel
    assert [o.axes for o in kernel.operands] == [("B", "N"), ("B",)]
