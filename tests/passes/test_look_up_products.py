"""Products of embeddings that are looked up: what is rewritten, what is not, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsify
from sparsify.passes.products.look_up_products import look_up_products

aten = torch.ops.aten
ROWS, WIDTH, HIDDEN, STEPS, BATCH = 6, 5, 7, 4, 3
Read = Callable[["Speller", Tensor], Tensor]


class Speller(nn.Module):
    """Integrate-and-fire neurons that read tokens ``[T, B]``; all sums are exact."""

    def __init__(self, read: Read, rows: int = ROWS) -> None:
        super().__init__()
        self.read = read
        self.table = nn.Parameter(dyadic(rows, WIDTH))
        self.weight, self.bias = nn.Parameter(dyadic(HIDDEN, WIDTH)), nn.Parameter(dyadic(HIDDEN))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.read(self, tokens)
        v = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for current in x:
            v = 0.5 * v + current
            z = (v > 0.25).to(v.dtype)
            out.append(v)
            v = v - z
        return torch.stack(out)


def dyadic(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).double() / 4


def draw(high: int = ROWS, steps: int = STEPS) -> Tensor:
    return torch.randint(high, (steps, BATCH))


def fast_of(model: Speller, tokens: Tensor) -> Any:
    return sparsify.sparsify(model, tokens, timing=False)


def recording(model: Speller, tokens: Tensor) -> fx.GraphModule:
    graph: fx.GraphModule = fast_of(model, tokens).stages[0].graph
    return graph


def products(graph: fx.GraphModule) -> list[int]:
    """How many rows each product outside of loops has."""
    found = (aten.mm.default, aten.addmm.default)
    return [n.meta["val"].shape[0] for n in graph.graph.nodes if n.target in found]


LOOKED_UP: dict[str, Read] = {
    "with a bias": lambda m, t: F.linear(F.embedding(t, m.table), m.weight, m.bias),
    "without": lambda m, t: F.linear(F.embedding(t, m.table), m.weight),
    "turned": lambda m, t: F.embedding(t, m.table) @ m.weight.t(),
    "a row for a bias": lambda m, t: torch.addmm(
        m.bias[None], F.embedding(t.flatten(), m.table), m.weight.t()
    ).view(*t.shape, HIDDEN),
    "read twice": lambda m, t: (x := F.embedding(t, m.table))[..., :1] + F.linear(x, m.weight),
}


@pytest.mark.parametrize("read", LOOKED_UP.values(), ids=LOOKED_UP)
@pytest.mark.parametrize("grad", [False, True])
def test_each_row_is_multiplied_once(read: Read, grad: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Speller(read), draw()
    with torch.set_grad_enabled(grad):
        before = recording(model, tokens)
    result = look_up_products(before)
    assert products(before) == [STEPS * BATCH] and products(result.graph) == [ROWS]
    assert len(result.done) == 1 and result.done[0].endswith("6 rows are multiplied for 12 tokens")
    assert look_up_products(result.graph).graph is result.graph
    with torch.set_grad_enabled(grad):
        fast = fast_of(model, tokens)
        for given in (tokens, draw(), draw(2)):
            assert torch.equal(fast(given), model(given))


def as_it_is(read: Read, tokens: Tensor, rows: int = ROWS) -> bool:
    before = recording(Speller(read, rows), tokens)
    return look_up_products(before).graph is before


STAYS: dict[str, Read] = {
    "padding": lambda m, t: F.linear(F.embedding(t, m.table, padding_idx=0), m.weight),
    "scaled": lambda m, t: F.linear(F.embedding(t, m.table, scale_grad_by_freq=True), m.weight),
    "changed": lambda m, t: F.linear(F.embedding(t, m.table) * 2, m.weight),
    "other rows": lambda m, t: F.linear(
        F.embedding(t, m.table).view(-1, WIDTH).flip(0), m.weight
    ).view(*t.shape, HIDDEN),
    "a bias for every token": lambda m, t: torch.addmm(
        m.bias.expand(t.numel(), HIDDEN), F.embedding(t.flatten(), m.table), m.weight.t()
    ).view(*t.shape, HIDDEN),
    "short tokens": lambda m, t: F.linear(F.embedding(t.int(), m.table), m.weight),
}


@pytest.mark.parametrize("read", STAYS.values(), ids=STAYS)
def test_what_stays_as_it_is(read: Read) -> None:
    assert as_it_is(read, draw())
    assert not as_it_is(LOOKED_UP["without"], draw())


def test_a_large_table_stays() -> None:
    read = LOOKED_UP["with a bias"]
    assert not as_it_is(read, draw(), STEPS * BATCH // 2)
    assert as_it_is(read, draw(), STEPS * BATCH // 2 + 1)


def gradients(forward: nn.Module, model: Speller, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    out = forward(tokens)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("read", LOOKED_UP.values(), ids=LOOKED_UP)
def test_gradients_are_eagers(read: Read) -> None:
    """Exact: integers times powers of two, of at most four steps."""
    torch.manual_seed(1)
    model, tokens = Speller(read), draw()
    fast = fast_of(model, tokens)
    assert any(stage.name == "look_up_products" and stage.done for stage in fast.stages)
    for given in (tokens, draw(2)):
        expected, got = gradients(model, model, given), gradients(fast, model, given)
        assert expected.keys() == got.keys() and expected["table"].any()
        assert all(torch.equal(got[name], wanted) for name, wanted in expected.items())


@pytest.mark.parametrize("wild", [float("inf"), float("nan")])
def test_rows_that_no_token_reads_have_no_part_in_gradients(wild: float) -> None:
    torch.manual_seed(2)
    model = Speller(LOOKED_UP["with a bias"])
    model.table.data[4:] = wild
    fast = fast_of(model, draw(4))
    tokens = draw(4)
    expected, got = gradients(model, model, tokens), gradients(fast, model, tokens)
    assert all(torch.equal(got[name], wanted) for name, wanted in expected.items())
    assert all(gradient.isfinite().all() for gradient in got.values())


def test_changed_weights_and_other_sizes() -> None:
    torch.manual_seed(3)
    model = Speller(LOOKED_UP["with a bias"])
    with torch.no_grad():
        fast = fast_of(model, draw())
        for steps in (STEPS, STEPS + 1, STEPS + 2, 1):
            model.table.data += 0.25
            model.weight.data -= 0.25
            tokens = draw(steps=steps)
            assert torch.equal(fast(tokens), model(tokens))


def test_a_token_without_a_row_is_an_error() -> None:
    model = Speller(LOOKED_UP["with a bias"])
    fast = fast_of(model, draw())
    for bad in (ROWS, -1):
        tokens = draw()
        tokens[1, 1] = bad
        with pytest.raises(IndexError):
            fast(tokens)


def test_the_report_says_how_often_a_row_is_read() -> None:
    model = Speller(LOOKED_UP["with a bias"])
    report = str(fast_of(model, draw()).report)
    assert "It reads an embedding: 6 rows are multiplied once, for 12 tokens." in report
