from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.passes.nodes.classify_ops import TRANSPOSES
from sparsify.passes.products.unify_products import unify_products
from tests.models.looped_models import W0, W1, WEIGHTS, B, H
from tests.passes.test_roll_loops import assert_same
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

aten = torch.ops.aten
BIAS = WEIGHTS["bias"]
Function = Callable[[Tensor], Tensor]


def recorded(function: Function) -> Unrolled:
    return record_unrolled(lambda tape, x: function(x), [dyadic(4, B, H)], WEIGHTS)


def targets(graph: fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in graph.graph.nodes]
    return [name for name in names if name.split(".")[1:2] in (["mm"], ["addmm"], ["bmm"])]


UNIFIED: tuple[tuple[Function, str], ...] = (
    (lambda x: F.linear(x.transpose(0, 1), W0), "aten.mm.default"),
    (lambda x: F.linear(x.transpose(0, 1), W0, BIAS), "aten.addmm.default"),
    (lambda x: torch.einsum("tbi,ij->tbj", x, W0), "aten.mm.default"),
    (lambda x: torch.einsum("tbi,ji->tbj", x, W0), "aten.mm.default"),
    (lambda x: x[0] @ W0 + BIAS, "aten.addmm.default"),
    (lambda x: BIAS + x @ W0, "aten.addmm.default"),
    (lambda x: torch.matmul(x.transpose(0, 1), W0[None]), "aten.mm.default"),
    (lambda x: W0 @ x[0, 0], "aten.mm.default"),
    (lambda x: W0 @ x[0, 0] + BIAS, "aten.addmm.default"),
    (lambda x: W0.t() @ x[0, 0], "aten.mm.default"),
    (lambda x: torch.addmv(BIAS, W0, x[0, 0]), "aten.addmm.default"),
    (lambda x: (x[0].unsqueeze(1) * W0).sum(-1), "aten.mm.default"),
    (lambda x: torch.sum(W0[None] * x[0][:, None, :], dim=2) + BIAS, "aten.addmm.default"),
    (lambda x: (x[0][..., None] * W0).sum(1), "aten.mm.default"),
)


@pytest.mark.parametrize(("function", "target"), UNIFIED, ids=map(str, range(len(UNIFIED))))
def test_one_matrix_makes_one_product(function: Function, target: str) -> None:
    found = recorded(function)
    unified = unify_products(found.graph)
    assert targets(unified.graph) == [target]
    assert unified.done
    assert_same(unified.graph(*found.operands), found.results)

    again = unify_products(unified.graph)
    assert again.graph is unified.graph
    assert again.done == []


LEFT: tuple[Function, ...] = (
    lambda x: torch.bmm(x, x.transpose(1, 2)),
    lambda x: torch.bmm(x[:2], torch.stack((W0, W1))),
    lambda x: F.linear(x, W0),
    lambda x: x[0] @ W0 + x[1],
    lambda x: torch.add(x[0] @ W0, BIAS, alpha=2),
    lambda x: torch.addmv(BIAS, W0, x[0, 0], beta=2),
    lambda x: (x[0] @ W0) + BIAS[:1],
    lambda x: (x[0].unsqueeze(1).bfloat16() * W0.bfloat16()).sum(-1),  # every term is rounded
    lambda x: (x[0].unsqueeze(1) * W0).sum(0),
    lambda x: (x[0].unsqueeze(1) * W0).sum(-1, keepdim=True),
    lambda x: (x[0].unsqueeze(1) * x[1].unsqueeze(2)).sum(-1),
)


EINSUMS: tuple[Function, ...] = (
    lambda x: torch.einsum("bi,ij->bj", x[0], W0),
    lambda x: torch.einsum("ab,bc->ac", (x[0], W0)) + x[1],
    lambda x: torch.einsum("ij,tbj->tbi", W0, x),
)


@pytest.mark.parametrize("function", EINSUMS, ids=map(str, range(len(EINSUMS))))
def test_einsum_leaves_no_turned_views_around_the_product(function: Function) -> None:
    found = recorded(function)
    unified = unify_products(found.graph)
    names = [str(node.target) for node in unified.graph.graph.nodes]
    product = next(n for n in unified.graph.graph.nodes if n.target is aten.mm.default)
    assert "aten.unsqueeze.default" not in names
    assert product.args[0].target not in TRANSPOSES
    assert_same(unified.graph(*found.operands), found.results)


IDLE: tuple[Function, ...] = (
    lambda x: torch.tensordot(x[0], W0, dims=([1], [1])),
    lambda x: torch.tensordot(x[0], W0, 1) + x[1],
    lambda x: torch.inner(x[0], W0),
    lambda x: torch.mm(x[0].view(B, H), W0).reshape(B, -1) + BIAS,
)


@pytest.mark.parametrize("function", IDLE, ids=map(str, range(len(IDLE))))
def test_views_that_change_nothing_go(function: Function) -> None:
    found = recorded(function)
    unified = unify_products(found.graph)
    names = [str(node.target) for node in unified.graph.graph.nodes]
    assert not [name for name in names if "view" in name or "reshape" in name]
    products = (aten.mm.default, aten.addmm.default)
    [product] = [n for n in unified.graph.graph.nodes if n.target in products]
    assert all(operand.target not in TRANSPOSES for operand in product.all_input_nodes[:-1])
    assert_same(unified.graph(*found.operands), found.results)
    assert unify_products(unified.graph).done == []


TURNED: tuple[Function, ...] = (
    lambda x: x[1] + (W0 @ x[0].t()).t(),
    lambda x: x[1] + torch.mm(W0 * W1, x[0].t()).transpose(0, 1),
    lambda x: x[1] + torch.einsum("ij,bj->ib", W0, x[0]).t(),
    lambda x: (W0 @ x[0].t()).t() + x[1],  # has the strides of the product
    lambda x: W0 @ x[0].t(),
    lambda x: (W0 @ x[0].t()).t(),  # returned, with the strides that it has
    lambda x: torch.einsum("oi,bit->bot", W0, x.permute(1, 2, 0)),
)


@pytest.mark.parametrize("function", TURNED, ids=map(str, range(len(TURNED))))
def test_a_weight_on_the_left_multiplies_from_the_right(function: Function) -> None:
    found = recorded(function)
    unified = unify_products(found.graph)
    [product] = [n for n in unified.graph.graph.nodes if n.target is aten.mm.default]
    rows, weight = product.args
    assert rows.meta["val"].shape[0] % B == 0 and weight.target is aten.t.default
    assert_same(unified.graph(*found.operands), found.results)
    assert unify_products(unified.graph).done == []


def neurons_first(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(H, B), []
    for x_t in tape.loop(x.unbind(0)):
        v = v * 0.5 + W0 @ (v > 1).to(v.dtype) + x_t.t()
        out.append(v)
    return torch.stack(out)


def rows_that_are_turned(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(B, H), []
    for x_t in tape.loop(x.unbind(0)):
        v = v * 0.5 + (W0 @ (v > 1).to(v.dtype).t()).t() + x_t
        out.append(v)
    return torch.stack(out)


def columns_of_one(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(B, H), []
    for x_t in tape.loop(x.unbind(0)):
        z = (v > 1).to(v.dtype)
        v = v * 0.5 + torch.matmul(W0, z.unsqueeze(-1)).squeeze(-1) + x_t
        out.append(v)
    return torch.stack(out)


def test_columns_of_one_are_rows_in_a_loop() -> None:
    found = record_unrolled(columns_of_one, [dyadic(4, B, H)], WEIGHTS)
    unified = unify_products(found.graph)
    products = [n for n in unified.graph.graph.nodes if n.target is aten.mm.default]
    assert len(products) == 4
    for product in products:
        assert product.args[0].target in (aten._to_copy.default, aten.full.default)
        assert all(user.target is aten.add.Tensor for user in product.users)
    assert_same(unified.graph(*found.operands), found.results)
    assert unify_products(unified.graph).done == []


def test_a_loop_gets_no_copies_of_turned_results() -> None:
    found = record_unrolled(neurons_first, [dyadic(4, B, H)], WEIGHTS)
    assert unify_products(found.graph).graph is found.graph
    found = record_unrolled(rows_that_are_turned, [dyadic(4, B, H)], WEIGHTS)
    unified = unify_products(found.graph)
    assert targets(unified.graph) == ["aten.mm.default"] * 4  # that of the zeros, too
    assert not any(n.target is aten.clone.default for n in unified.graph.graph.nodes)
    assert_same(unified.graph(*found.operands), found.results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", EINSUMS, ids=map(str, range(len(EINSUMS))))
def test_autocast_casts_what_einsum_has_turned(function: Function, dtype: torch.dtype) -> None:
    def cast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return function(x)

    found = recorded(cast)
    unified = unify_products(found.graph)
    nodes = list(unified.graph.graph.nodes)
    product = next(n for n in nodes if n.target is aten.mm.default)
    assert all(operand.meta["val"].dtype is dtype for operand in product.all_input_nodes)
    assert not any(n.target is aten.unsqueeze.default for n in nodes)
    assert_same(unified.graph(*found.operands), found.results)


@pytest.mark.parametrize("function", LEFT, ids=map(str, range(len(LEFT))))
def test_other_products_stay(function: Function) -> None:
    found = recorded(function)
    assert unify_products(found.graph).graph is found.graph


def test_a_product_that_is_read_twice_keeps_its_own_value() -> None:
    def twice(x: Tensor) -> Tensor:
        product = x[0] @ W0
        return (product + BIAS) * product

    found = recorded(twice)
    assert unify_products(found.graph).graph is found.graph
