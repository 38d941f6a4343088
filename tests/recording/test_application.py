"""Uses of autograd Functions as targets of graphs: they run, print, copy and compare."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.recording.application import WRITTEN_UNSEEN, Application, Operand, take_operands
from tests.models.surrogates import ATan, FastSigmoid, Gaussian, SpikeAndReset, bell

X = torch.linspace(-1, 1, 7)


def graph_of(*uses: Application) -> fx.GraphModule:
    """One use behind the other, on the same tensor."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = graph.call_function(torch.ops.aten.sign.default, (x,))
    for use in uses:
        value = graph.call_function(use, (value, x))
    graph.output((value,))
    return fx.GraphModule(nn.Module(), graph)


def use(function: Any, *arguments: Any, index: int | None = None) -> Application:
    return Application(function, (Operand(0), *arguments), index)


def test_it_is_the_value_without_gradients_and_the_function_with_them() -> None:
    atan = use(ATan, 2.0)
    value = X.sign()
    assert atan(value, X) is value
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert atan(value, x) is value
    result = atan(value, x)
    assert torch.equal(result, (X > 0).float())  # forward's own: ``value`` is given as equal to it
    [gradient] = torch.autograd.grad(result.sum(), x)
    leaf = X.clone().requires_grad_()
    [wanted] = torch.autograd.grad(ATan.apply(leaf, 2.0).sum(), leaf)
    assert torch.equal(gradient, wanted)


class NamesFloat32(torch.autograd.Function):
    """As surrogates of snnTorch: spikes are float32 whatever the membrane is."""

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [gradient], [above] = gradients, ctx.saved_tensors
        return gradient / (1 + above.square())


class SetsUpItsContext(NamesFloat32):
    @staticmethod
    def forward(above: Tensor) -> Tensor:  # type: ignore[override]
        return (above > 0).float()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        ctx.save_for_backward(*inputs)


@pytest.mark.parametrize("function", [NamesFloat32, SetsUpItsContext])
def test_in_float64_neither_outputs_nor_gradients_are_rounded(function: Any) -> None:
    wide = use(function).retyped(torch.float64, torch.float32)
    x = X.double().requires_grad_()
    result = wide(X.double().sign(), x)
    assert result.dtype is torch.float64
    third = torch.full_like(x, 1 / 3)  # which float32 does not have
    [gradient] = torch.autograd.grad(result, x, third)
    assert torch.equal(gradient, third / (1 + x.detach().square()))
    assert wide.__name__ == function.__name__


def test_a_value_with_a_history_of_its_own_loses_it() -> None:
    value = X.clone().requires_grad_() * 2
    assert not use(ATan, 2.0)(value, X).requires_grad


def test_an_output_of_several() -> None:
    x = X.clone().requires_grad_()
    after = use(SpikeAndReset, Operand(1), index=1)(X, x, torch.zeros(1))
    assert after.requires_grad
    assert torch.equal(after, X)


def test_unseen_writes() -> None:
    before, content = X.clone().requires_grad_(), X.clamp(0, 0.5)
    written = WRITTEN_UNSEEN(content, before, content)
    assert torch.equal(written, content)
    [gradient] = torch.autograd.grad((written * X).sum(), before)
    assert torch.equal(gradient, X)


def test_graphs_print_run_and_copy() -> None:
    graph = graph_of(use(ATan, 2.0), use(ATan, 3.0), use(FastSigmoid, 25.0))
    assert graph.code.count("ATan") == 2 and "FastSigmoid" in str(graph.graph)
    for each in (graph, copy.deepcopy(graph)):
        x = X.clone().requires_grad_()
        [result] = each(x)
        [gradient] = torch.autograd.grad(result.sum(), x)
        leaf = X.clone().requires_grad_()
        [wanted] = torch.autograd.grad(FastSigmoid.apply(leaf).sum(), leaf)
        assert torch.equal(gradient, wanted)


def test_uses_pickle() -> None:
    known = use(Gaussian, bell)
    assert pickle.loads(pickle.dumps(known)) == known


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


EQUAL: list[tuple[Application, Application]] = [
    (use(ATan, 2.0), use(ATan, 2.0)),
    (use(ATan, float("nan")), use(ATan, float("nan"))),
    (use(ATan, [1, (None, "a")]), use(ATan, [1, (None, "a")])),
    (use(ATan, {"k": Operand(1)}), use(ATan, {"k": Operand(1)})),
    (use(Gaussian, bell), use(Gaussian, bell)),
    (use(Gaussian, scaled(2.0)), use(Gaussian, scaled(2.0))),
    (use(Gaussian, partial(scaled, 2.0)), use(Gaussian, partial(scaled, 2.0))),
]
DIFFERENT: list[tuple[Application, Application]] = [
    (use(ATan, 2.0), use(FastSigmoid, 2.0)),
    (use(ATan, 2.0), use(ATan, 3.0)),
    (use(ATan, 2.0), use(ATan, 2)),
    (use(ATan, True), use(ATan, 1)),
    (use(ATan, 0.0), use(ATan, -0.0)),
    (use(ATan, 2.0), use(ATan)),
    (use(ATan, [1]), use(ATan, (1,))),
    (use(ATan, 2.0, index=0), use(ATan, 2.0, index=1)),
    (use(ATan, Operand(1)), use(ATan, Operand(2))),
    (use(Gaussian, scaled(2.0)), use(Gaussian, scaled(3.0))),
    (use(Gaussian, partial(scaled, 2.0)), use(Gaussian, partial(scaled, 3.0))),
    (use(Gaussian, object()), use(Gaussian, object())),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one: Application, other: Application) -> None:
    assert one == other and hash(one) == hash(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different(one: Application, other: Application) -> None:
    assert one != other


def test_arguments_without_an_answer_differ() -> None:
    numpy = pytest.importorskip("numpy")
    assert use(ATan, numpy.ones(3)) != use(ATan, numpy.ones(3))
    assert use(ATan, 2.0) != "ATan"


def test_operands_are_found_inside_of_containers() -> None:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Operand:
        found.append(tensor)
        return Operand(len(found) - 1)

    given = [X, {"k": (X + 1, None)}, torch.Size((2,))]
    taken = take_operands(given, add)
    assert taken == [Operand(0), {"k": (Operand(1), None)}, torch.Size((2,))]
    again = Application(ATan, (taken,)).given(tuple(found))[0]
    assert again[0] is X and again[1]["k"][0] is found[1]
