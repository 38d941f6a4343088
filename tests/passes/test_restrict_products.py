"""Products of gradients are computed for those neurons only whose gradient goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify.codegen.backend import Workload
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.strategies import find_strategy
from sparsify.codegen.predict_cost import WANTED_MACS
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.graph_meta import TensorInfo
from sparsify.graphs.differentiate_scans import measure_gradients
from sparsify.passes.gradients.differentiate import differentiate
from sparsify.passes.gradients.restrict_products import find_restrictions, restrict_products
from sparsify.passes.nodes.call_scan import call_scan
from sparsify.scans.differentiated import Differentiated
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan, output_values
from tests.kernels.example_kernels import STRATEGIES, How, schedule
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import lowered, scans_of, with_regions
from tests.steps import apply, make_scan

BACKEND = CppBackend()
needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
STEPS, B, H = 5, 3, 6
Body = Callable[..., tuple[Tensor, ...]]
Surrogate = Callable[[Tensor, Tensor], Tensor]


def box(g: Tensor, v: Tensor) -> Tensor:
    return g * (v.abs() < 0.5).float()


def triangle(g: Tensor, v: Tensor) -> Tensor:
    return (g * torch.clamp(1 - v.abs(), min=0)) * 0.5


def window(g: Tensor, v: Tensor) -> Tensor:
    return torch.where(v.abs() < 0.5, g, torch.zeros_like(g))


def cut(g: Tensor, v: Tensor) -> Tensor:
    return torch.where(v.abs() > 0.5, 0.0, g)


def filled(g: Tensor, v: Tensor) -> Tensor:
    return g.masked_fill(v.abs() > 0.5, 0)


def parabola(g: Tensor, v: Tensor) -> Tensor:
    return g * torch.relu(1 - v.abs()) ** 2


def scaled_before(g: Tensor, v: Tensor) -> Tensor:
    """Divisors and summands may be anything: they are the same whatever the product is."""
    return (-(g * v) / torch.where(v > 0, 2.0, 1.0) + v) * (v.abs() < 0.5)


def two_windows(g: Tensor, v: Tensor) -> Tensor:
    return box(g, v) + window(g, v - 1)


def outside_or_slope(g: Tensor, v: Tensor) -> Tensor:
    """Masks of all kinds: where something is set and where not, bools and numbers."""
    return cut(g, v + 0.25) + triangle(g * v, v - 1) + g * (v.abs() > 0.75)


COMPACT = (
    *(box, triangle, window, cut, filled, parabola, scaled_before),
    *(two_windows, outside_or_slope),
)


def smooth(g: Tensor, v: Tensor) -> Tensor:
    return g * torch.sigmoid(v)


def also_whole(g: Tensor, v: Tensor) -> Tensor:
    return box(g, v) + 0.25 * g


def whole_behind(g: Tensor, v: Tensor) -> Tensor:
    return box(g, v) + window(g, v - 1) + 0.25 * (g + v)


def squared(g: Tensor, v: Tensor) -> Tensor:
    """An infinity might come of a finite product."""
    return box(g * g, v)


def multiplied(g: Tensor, v: Tensor) -> Tensor:
    """The same of two factors that are not one node."""
    return box((g + v) * (g - v), v)


def window_of_itself(g: Tensor, v: Tensor) -> Tensor:
    return box(g, g)


def window_of_itself_too(g: Tensor, v: Tensor) -> Tensor:
    return box(g, v) + box(v, g) + box(g, g)


def scaled_by_infinity(g: Tensor, v: Tensor) -> Tensor:
    return g * (torch.relu(1 - v.abs()) * float("inf"))


OTHERS = (
    *(smooth, also_whole, whole_behind, squared, multiplied),
    *(window_of_itself, window_of_itself_too, scaled_by_infinity),
)


def recurrent(surrogate: Surrogate) -> Body:
    def body(c: Tensor, dv: Tensor, g: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        d = dv * 0.5 + surrogate(g + c, v)
        return d.mm(w), d, d

    return body


def scan_of(body: Body, examples: Sequence[Tensor], carries: int, xs: int) -> Scan:
    traced = make_fx(body)(*examples)
    for node in traced.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = TensorInfo.of(node.meta["val"])
    graph = traced.graph
    [output] = [node for node in graph.nodes if node.op == "output"]
    output.args = (output_values(graph),)
    module = fx.GraphModule(nn.Module(), graph, class_name="Body")
    return Scan(module, carries, xs, len(examples) - carries - xs, reverse=True)


def called(scan: Scan) -> fx.GraphModule:
    """A graph that calls ``scan`` with its placeholders and returns all that it gives."""
    graph = fx.Graph()
    modules: dict[str, nn.Module] = {}
    places = []
    for place in scan.placeholders:
        info = place.meta["val"]
        if place.meta["role"] == "x":
            stride = (info.shape[0] * info.shape[1], *info.stride)
            info = TensorInfo((STEPS, *info.shape), stride, info.dtype, info.device)
        places.append(graph.placeholder(place.name))
        places[-1].meta["val"] = info
    x_end = scan.carries + scan.xs
    groups = places[: scan.carries], places[scan.carries : x_end], places[x_end:]
    args: Any = (STEPS, *map(tuple, groups))
    graph.output(tuple(call_scan(graph, modules, scan, args, {})))
    return fx.GraphModule(modules, graph)


def dyadic(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).float() / 4


def operands() -> list[Tensor]:
    """Of ``recurrent``: two carries, two xs, and weights of 1, 0 and -1. Sums are exact."""
    shapes = ((B, H), (B, H), (STEPS, B, H), (STEPS, B, H))
    weight = dyadic(H, H, seed=9).mul(4).remainder(3) - 1
    return [*(dyadic(*shape, seed=i) for i, shape in enumerate(shapes)), weight]


def recurrent_graph(surrogate: Surrogate) -> fx.GraphModule:
    examples = [t[0] if t.dim() == 3 else t for t in operands()]
    return called(scan_of(recurrent(surrogate), examples, 2, 2))


def only_lowered(graph: fx.GraphModule) -> Lowered:
    [scan] = scans_of(graph).values()
    return lowered(scan)


@pytest.mark.parametrize("surrogate", COMPACT)
def test_a_recurrent_product_moves_to_the_step_that_multiplies_it(surrogate: Surrogate) -> None:
    graph = recurrent_graph(surrogate)
    expected = graph(*operands())
    result = restrict_products(graph)
    assert len(result.done) == 1
    assert_same(result.graph(*operands()), expected)
    [gather] = only_lowered(result.graph).kernel.gathers
    assert gather.only is not None
    launchables = with_regions(result.graph)
    assert_same(result.graph(*operands()), expected)
    assert all(launchable.calls == 1 for launchable in launchables.values())


@pytest.mark.parametrize("surrogate", COMPACT)
def test_infinities_and_nan_stay(surrogate: Surrogate) -> None:
    graph = recurrent_graph(surrogate)
    restricted = restrict_products(graph).graph
    with_regions(restricted)
    for value in (float("inf"), float("nan")):
        for place in range(4):
            given = operands()
            given[place].view(-1)[-2] = value
            for got, wanted in zip(restricted(*given), graph(*given), strict=True):
                assert torch.equal(got.isnan(), wanted.isnan())
                assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("surrogate", OTHERS)
def test_a_product_that_may_matter_anywhere_stays(surrogate: Surrogate) -> None:
    graph = recurrent_graph(surrogate)
    result = restrict_products(graph)
    assert result.done == []
    assert result.graph is graph
    [gather] = only_lowered(graph).kernel.gathers
    assert gather.only is None


def test_a_product_between_layers_stays_in_its_step() -> None:
    def body(dv: Tensor, g: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        d = dv * 0.5 + g
        return d, box(d.mm(w), v)

    shapes = ((B, H), (STEPS, B, H), (STEPS, B, 4), (H, 4))
    given = [dyadic(*shape, seed=i) for i, shape in enumerate(shapes)]
    graph = called(scan_of(body, [t[0] if t.dim() == 3 else t for t in given], 1, 2))
    expected = graph(*given)
    result = restrict_products(graph)
    [scan] = scans_of(result.graph).values()
    assert scan.carries == 1
    [gather] = only_lowered(result.graph).kernel.gathers
    assert gather.only is not None
    with_regions(result.graph)
    assert_same(result.graph(*given), expected)


def gated(
    c: Tensor, dc: Tensor, g: Tensor, v: Tensor, u: Tensor, r: Tensor, w: Tensor
) -> tuple[Tensor, ...]:
    """Units with outputs ``y = o * c``: two gates read them, and the state loses them."""
    d_y = g + c
    d = dc * 0.5 + d_y * (v > 0.5) + triangle(d_y * v, v)
    d_u, d_r = d * u, d * r
    total = d_u.mm(w) + d_r.mm(w.t()) + dc.neg()
    return total, d, d_u, d_r


def gated_operands() -> list[Tensor]:
    start, weight = operands()[0], operands()[-1]
    xs = [dyadic(STEPS, B, H, seed=seed) for seed in range(2, 6)]
    return [
        start,
        dyadic(B, H, seed=1),
        *(x.sign() if i > 1 else x for i, x in enumerate(xs)),
        weight,
    ]


def gated_graph() -> fx.GraphModule:
    return called(scan_of(gated, [t[0] if t.dim() == 3 else t for t in gated_operands()], 2, 4))


def test_products_of_one_sum_share_what_says_where_they_matter() -> None:
    """The sum of two products and others: each product has a carry of what it reads."""
    graph = gated_graph()
    expected = graph(*gated_operands())
    result = restrict_products(graph)
    assert len(result.done) == 2
    [scan] = scans_of(result.graph).values()
    assert scan.carries == 4
    assert_same(result.graph(*gated_operands()), expected)
    first, second = only_lowered(result.graph).kernel.gathers
    assert first.only == second.only is not None
    assert first.weight != second.weight
    launchables = with_regions(result.graph)
    assert_same(result.graph(*gated_operands()), expected)
    assert [launchable.calls for launchable in launchables.values()] == [1]


@needs_compiler
@pytest.mark.parametrize("how", ["event", "dense"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernels_compute_what_one_of_several_masks_wants(strategy: str, how: How) -> None:
    """Bit for bit, as all sums are exact; what is wanted is counted, and costs as predicted."""
    graph = restrict_products(gated_graph()).graph
    [reference] = with_regions(graph).values()
    graph(*gated_operands())
    kernel, given = reference.kernel, reference.given
    plan = schedule(kernel, strategy, how)
    launch = BACKEND.load(BACKEND.compile(kernel, plan))
    expected = reference(given, steps=STEPS, batch=B)
    got = launch(given, steps=STEPS, batch=B)
    assert got.keys() == expected.keys() and expected
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    v = gated_operands()[3]
    wanted = int(((v > 0.5) | (v.abs() < 1)).sum())
    assert 0 < wanted < v.numel()
    assert launch.events == {g.result: (wanted, v.numel()) for g in kernel.gathers}
    share = {g.result: wanted / v.numel() for g in kernel.gathers}
    cost = find_strategy(strategy).predict(kernel, plan, Workload(STEPS, B, share))
    macs = len(share) * H * (wanted * WANTED_MACS if how == "event" else v.numel())
    assert cost.dense_macs == pytest.approx(macs)


def test_a_product_that_a_step_returns_stays() -> None:
    def body(c: Tensor, g: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        product = box(g + c, v).mm(w)
        return product, product

    examples = [dyadic(*shape, seed=1) for shape in ((B, H), (B, H), (B, H), (H, H))]
    assert find_restrictions(scan_of(body, examples, 1, 2)) == []


def test_loops_that_run_forwards_are_left_alone() -> None:
    graph = recurrent_graph(box)
    [scan] = scans_of(graph).values()
    assert find_restrictions(scan)
    scan.reverse = False
    assert restrict_products(graph).done == []


def test_the_value_behind_the_last_step_is_computed_if_it_is_read() -> None:
    graph = recurrent_graph(box)
    whole = restrict_products(graph).graph
    assert [n.target for n in whole.graph.nodes].count(torch.ops.aten.mm.default) == 1
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    output.args = (output_values(graph.graph)[1:],)
    graph.recompile()
    unread = restrict_products(graph).graph
    assert torch.ops.aten.mm.default not in [n.target for n in unread.graph.nodes]
    assert_same(unread(*operands()), graph(*operands()))


def test_a_mask_of_a_copied_body_is_not_taken_for_its_own() -> None:
    """The product is computed whole then, which is always right."""
    [scan] = scans_of(restrict_products(recurrent_graph(box)).graph).values()
    [gather] = lowered(scan.retyped(torch.float64)).kernel.gathers
    assert gather.only is None


class Boxed(torch.autograd.Function):
    """A spike whose gradient passes within half of threshold."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        v: Tensor = ctx.saved_tensors[0]
        return d * (v.abs() < 0.5)


def spiking(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    charged = v * 0.5 + x + z.mm(w)
    spikes: Tensor = apply(Boxed, charged - 1)
    return charged - spikes, spikes, spikes


def test_the_gradient_of_a_spiking_layer_is_restricted() -> None:
    """In the graph of ``differentiate``, where ``measure_gradients`` finds how much matters."""
    given: list[list[Tensor]] = [
        [dyadic(B, H, seed=1), torch.zeros(B, H)],
        [dyadic(STEPS, B, H, seed=2)],
        [dyadic(H, H, seed=3)],
    ]
    scan = make_scan(spiking, *given)
    parts = differentiate(scan, {("carry", 0), ("x", 0), ("const", 0)}, STEPS)
    assert isinstance(parts, Differentiated)
    loops = [m for m in parts.backward.modules() if isinstance(m, Scan)]
    products = [n for loop in loops for n in loop.body.graph.nodes if "only" in n.meta]
    [product] = products
    assert any(n is product.meta["only"].node for n in product.graph.nodes)


def nearer_or_further(g: Tensor, v: Tensor) -> Tensor:
    return box(g, v) + g * (v > 1)


@pytest.mark.parametrize(
    ("surrogate", "share"),
    [(box, 0.25), (cut, 0.25), (nearer_or_further, 1.0), (two_windows, 0.25)],
)
def test_how_much_matters_is_measured(surrogate: Surrogate, share: float) -> None:
    graph = restrict_products(recurrent_graph(surrogate)).graph
    [scan] = scans_of(graph).values()
    potentials = torch.full((STEPS, B, 4), 2.0)
    potentials[..., 0] = 0.25
    carries = [torch.zeros(B, 4)] * 3
    call = (STEPS, carries, [torch.ones(STEPS, B, 4), potentials], [torch.ones(4, 4)])
    measure_gradients({"scan_0.backward.scan_0": scan}, {"scan_0.backward.scan_0": call})
    [product] = [n for n in scan.body.graph.nodes if "only" in n.meta]
    assert product.meta["activity"] == share
