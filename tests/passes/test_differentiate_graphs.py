"""The graphs of gradients: what leaves their loops, and that two sizes make a graph for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.graphs.loops import with_modules
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.passes.nodes.call_scan import call_scan
from sparsify.passes.nodes.classify_ops import PRODUCTS
from sparsify.passes.sizes.generalize import generalize
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.scans.scan import Scan
from sparsify.serving.general_modules import GeneralModules
from tests.models.step_bodies import BODIES, Body, Operands
from tests.passes.test_differentiate import (
    assert_close,
    differentiated,
    eager_gradients,
    floats,
    own_gradients,
)
from tests.passes.test_save_values import body
from tests.steps import make_scan

aten = torch.ops.aten


def products(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in PRODUCTS]


def backward_of(name: str, steps: int = 4) -> fx.GraphModule:
    operands = body(name).operands(steps, 3)
    scan = make_scan(body(name).step, *operands.groups())
    return differentiated(scan, floats(operands), steps).backward


def scans(graph: fx.GraphModule) -> list[Scan]:
    return [module for module in graph.modules() if isinstance(module, Scan)]


def test_products_outside_of_recurrences_leave_the_loop() -> None:
    graph = backward_of("two layers")
    assert [tuple(n.meta["val"].shape) for n in products(graph.graph)] == [(12, 6), (12, 5)]
    assert all(not products(scan.body.graph) for scan in scans(graph))
    assert len(scans(graph)) == 2, "the membranes of two layers; spikes were saved"


def test_a_recurrent_product_stays_and_reads_the_weight_itself() -> None:
    graph = backward_of("lif")
    [scan] = scans(graph)
    assert products(graph.graph) == []
    [product] = products(scan.body.graph)
    assert product.args[1] in scan.placeholders[scan.carries + scan.xs :]


def test_weight_gradients_are_outer_products_of_all_steps() -> None:
    graph = backward_of("EGRU")
    outer = [module for module in graph.modules() if isinstance(module, OuterProduct)]
    assert len(outer) == 3  # one a gate; where nothing else reads the factor, beside the loop
    [chunked] = [module for module in graph.children() if isinstance(module, ChunkedScan)]
    assert len(chunked.products) == 1
    calls = [n for n in graph.graph.nodes if n.op == "call_module"]
    after = [n for n in calls if isinstance(graph.get_submodule(n.target), OuterProduct)]
    assert [tuple(n.meta["val"].shape) for n in after] == [(6, 6)] * 2
    assert all(n.args[0].meta["val"].shape == (4, 3, 6) for n in after)


def test_biases_are_added_up_before_rows_are() -> None:
    graph = backward_of("learnable")
    [scan] = scans(graph)
    sums = [n for n in scan.body.graph.nodes if n.target is aten.sum.dim_IntList]
    assert sums == []
    added = [n for n in graph.graph.nodes if n.target is aten.sum.dim_IntList]
    assert added
    assert all(n.args[0].meta["val"].shape == (3, 6) for n in added)


def test_a_clamp_of_a_decay_is_differentiated_once() -> None:
    graph = backward_of("learnable")
    wheres = [n for n in graph.graph.nodes if n.target is aten.where.self]
    assert [tuple(n.meta["val"].shape) for n in wheres] == [(6,)]
    [scan] = scans(graph)
    assert aten.clamp.default not in {n.target for n in scan.body.graph.nodes}


def test_what_no_kernel_computes_is_set_apart_from_the_recurrence() -> None:
    kinds = [isinstance(lower_scan(s, "s"), Refusal) for s in scans(backward_of("softmax"))]
    assert kinds == [True, False]


GENERAL = [each for each in BODIES if each.name not in ("no batch", "no batch, by hand")]


@pytest.mark.parametrize("each", GENERAL, ids=lambda each: each.name)
def test_graphs_of_two_sizes_make_one_for_all(each: Body) -> None:
    made = []
    for steps, batch in ((3, 8), (5, 18)):
        operands = each.operands(steps, batch)
        scan = make_scan(each.step, *operands.groups())
        made.append(differentiated(scan, floats(operands), steps))
    first, second = made
    assert (first.inputs, first.outputs) == (second.inputs, second.outputs)
    assert first.reaches == second.reaches
    modules = GeneralModules()
    found = generalize(first.backward, second.backward, modules.same_module)
    assert not isinstance(found, Refusal), str(found)
    forward = GeneralModules().module(first.forward, second.forward)
    assert isinstance(forward, Scan)
    backward = with_modules(found.graph, modules.replacing(found.graph))
    general = replace(first, forward=forward, backward=backward)

    operands = each.operands(4, 7)
    scan = make_scan(each.step, *operands.groups())
    read = list(range(len(scan.results)))
    _, expected = eager_gradients(scan, 4, operands, floats(operands), read)
    _, got = own_gradients(general, 4, operands, read)
    for key in sorted(floats(operands)):
        assert_close(got.get(key), expected[key], key)


def calling(scan: Scan, steps: int, operands: Operands) -> fx.GraphModule:
    """A graph that calls ``scan`` and returns all that it returns."""
    graph = fx.Graph()
    groups: list[tuple[fx.Node, ...]] = []
    for role, group in zip(("carry", "x", "const"), operands.groups(), strict=True):
        nodes = [graph.placeholder(f"{role}_{i}") for i in range(len(group))]
        for node, tensor in zip(nodes, group, strict=True):
            node.meta["val"] = TensorInfo.of(tensor)
        groups.append(tuple(nodes))
    modules: dict[str, torch.nn.Module] = {}
    meta = {"location": scan.location, "loops": ()}
    results = call_scan(graph, modules, scan, (steps, groups[0], groups[1], groups[2]), meta)
    graph.output(tuple(results))
    return fx.GraphModule(modules, graph)


def test_a_part_of_a_reversed_loop_reads_what_another_carried_before() -> None:
    def step(v: Tensor, y: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return 0.9 * v + x, 0.8 * y + v @ w.t(), y

    operands = Body("", step, xs=((-1, 6),), consts=((6, 6),), spikes=()).operands(5, 3)
    scan = make_scan(step, *operands.groups())
    counts = (scan.carries, scan.xs, scan.consts)
    graph = calling(Scan(scan.body, *counts, scan.location, reverse=True), 5, operands)
    split = split_time(graph, lambda _: True).graph
    assert [each.reverse for each in scans(split)] == [True, True]
    tensors = [tensor for group in operands.groups() for tensor in group]
    with torch.no_grad():
        for got, expected in zip(split(*tensors), graph(*tensors), strict=True):
            assert_close(got, expected, "result")
