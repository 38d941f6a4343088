from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify.checking.run_graph import run_graph
from sparsify.recording.unwritten_graph import UnwrittenGraph

aten = torch.ops.aten


class Doubler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def unwritten() -> UnwrittenGraph:
    """``(2 * x + 1, max(x))`` with a module, a nested argument and a keyword."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    doubled = graph.call_module("twice", (x,))
    one = graph.call_function(aten.full.default, ([2], 1.0), {"dtype": torch.float32})
    total = graph.call_function(aten.add.Tensor, (doubled, one))
    both = graph.call_function(aten.stack.default, ([total, x],))
    graph.output((total, graph.call_function(aten.amax.default, (both, [0, 1]))))
    return UnwrittenGraph({"twice": Doubler()}, graph, class_name="Example")


def is_written(module: fx.GraphModule) -> bool:
    return "_code" in vars(module)


X = torch.tensor([1.0, 4.0])
EXPECTED = [torch.tensor([3.0, 9.0]), torch.tensor(9.0)]


def assert_works(module: Callable[..., tuple[Tensor, ...]]) -> None:
    for got, expected in zip(module(X), EXPECTED, strict=True):
        assert torch.equal(got, expected)


def test_nothing_is_written_before_it_is_asked_for() -> None:
    module = unwritten()
    assert not is_written(module)
    assert type(module).__name__ == "Example"
    assert not is_written(copy.deepcopy(module))
    assert not is_written(module)


@pytest.mark.parametrize("ask", [lambda m: m.code, str, lambda m: m.print_readable(False)])
def test_it_is_written_when_it_is_read(ask: Callable[[fx.GraphModule], str]) -> None:
    assert "aten.add.Tensor" in ask(unwritten())


def test_it_is_written_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    recompile = fx.GraphModule.recompile

    def counted(module: fx.GraphModule) -> object:
        written.append(module)
        return recompile(module)

    monkeypatch.setattr(fx.GraphModule, "recompile", counted)
    module = unwritten()
    bound = module.forward
    for _ in range(3):
        assert_works(module)
        assert_works(bound)
    assert len(written) == 1


@pytest.mark.parametrize("written", [False, True])
def test_copies_and_pickles_run(written: bool) -> None:
    module = unwritten()
    if written:
        module.recompile()
    for made in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_works(made)


@pytest.mark.parametrize("written", [False, True])
def test_another_graph_takes_the_place(written: bool) -> None:
    module = unwritten()
    if written:
        assert_works(module)
    graph = fx.Graph()
    graph.output((graph.call_function(aten.neg.default, (graph.placeholder("x"),)),))
    module.graph = graph
    assert torch.equal(module(X)[0], -X)
    assert "neg" in module.code


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="'Example' object has no attribute 'absent'"):
        unwritten().absent  # noqa: B018


def test_a_graph_is_run_node_by_node() -> None:
    module = unwritten()
    assert_works(lambda x: run_graph(module, [x]))
    assert not is_written(module)


def test_values_are_dropped_after_their_last_use() -> None:
    made: list[weakref.ref[Tensor]] = []
    most_alive = 0

    def grow(x: Tensor) -> Tensor:
        nonlocal most_alive
        result = x + 1
        most_alive = max(most_alive, sum(each() is not None for each in made))
        made.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(20):
        value = graph.call_function(grow, (value,))
    graph.call_function(grow, (value,))  # whose result nothing reads
    graph.output((value,))
    [result] = run_graph(UnwrittenGraph(nn.Module(), graph), [X])

    assert torch.equal(result, X + 20)
    assert most_alive == 1
