"""What torch.compile, torch.export and tracing make of a sparsified module and of what has one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import SparsifyError
from tests.models.small_nets import OUT, RecurrentNet, spikes
from tests.serving.test_dropin import engine_of, make, run, runs_kernels, runs_kernels_of

X = spikes()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What Dynamo keeps of code objects would be found by the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CompiledGraphs:
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def count(self) -> int:
        """How many operations they have."""
        nodes = [node for graph in self.graphs for node in graph.graph.nodes]
        return sum(node.op not in ("placeholder", "output") for node in nodes)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(OUT))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.inner(x * 2.0) * self.scale)
        return out


def around_by_function(fast: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(fast(x * 2.0) * torch.ones(OUT))


@pytest.mark.parametrize("around", [Around, around_by_function])
def test_what_is_around_is_compiled_and_the_call_runs_kernels(
    around: Callable[[nn.Module], Any],
) -> None:
    model, fast = make()
    found = CompiledGraphs()
    compiled: Any = torch.compile(around(fast), backend=found)
    for x in (X, X[:3], spikes(9, 2)):
        assert torch.equal(run(compiled, x), run(around(model), x))  # records where x has new sizes
        assert runs_kernels_of(fast, partial(run, compiled, x))
    # x * 2, and tanh with what it reads: in each of the graphs that are made for several sizes.
    assert 0 < found.count() <= 4 * len(found.graphs)
    assert not any("add" in str(graph.code) for graph in found.graphs)


def test_a_compiled_sparsified_module_runs_kernels() -> None:
    model, fast = make()
    assert runs_kernels(fast)
    found = CompiledGraphs()
    compiled: Any = torch.compile(fast, backend=found)
    for x in (X, X[:3]):
        assert torch.equal(run(compiled, x), run(model, x))
        assert runs_kernels_of(fast, partial(run, compiled, x))
    assert found.count() == 0
    assert engine_of(fast).recordings <= 2  # for two sizes


def test_a_module_that_is_compiled_in_place_runs_kernels() -> None:
    model, fast = make()
    fast.compile(backend=CompiledGraphs())
    assert runs_kernels(fast)
    assert not runs_kernels_of(fast, lambda: run(model))
    assert torch.equal(run(fast), run(model))


def test_of_a_module_that_was_compiled_in_place_kernels_run() -> None:
    model, found = RecurrentNet().eval(), CompiledGraphs()
    model.compile(backend=found)
    fast = sparsify(model, X, timing=False)
    assert runs_kernels(fast)
    assert not found.graphs
    assert torch.equal(run(model), run(fast))
    assert found.graphs


def test_the_first_call_may_be_a_compiled_one() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, timing=False)
    compiled: Any = torch.compile(Around(fast), backend="eager")
    expected = run(Around(model))
    assert torch.equal(run(compiled, X), expected)
    assert runs_kernels_of(fast, lambda: run(compiled, X))
    assert torch.equal(run(compiled, X), expected)
    assert engine_of(fast).recordings == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_runs_kernels_forward_and_backward(backend: str) -> None:
    torch.manual_seed(0)
    model = RecurrentNet()
    fast: Any = sparsify(model, timing=False)
    wholes: dict[str, Any] = {
        "eager": Around(model),
        "compiled": torch.compile(Around(fast), backend=backend),
    }
    gradients = {}
    for name, whole in wholes.items():
        for _ in range(3):
            for parameter in whole.parameters():
                parameter.grad = None
            whole(X).square().sum().backward()
        gradients[name] = [parameter.grad for parameter in whole.parameters()]
    assert fast.report.gradients
    assert {site.decision for site in fast.report.sites if site.name == "rec"} == {"event"}
    assert runs_kernels_of(fast, lambda: wholes["compiled"](X))
    for got, expected in zip(gradients["compiled"], gradients["eager"], strict=True):
        assert got is not None and expected is not None
        # Sums of some hundred terms in another order; a gradient that is wrong is off by more.
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


def test_a_full_graph_is_refused_with_a_way_out() -> None:
    model, fast = make()
    compiled: Any = torch.compile(Around(fast), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile its \.original") as raised:
        run(compiled, X)
    assert "a sparsified module runs kernels of its own" in str(raised.value)
    original: Any = torch.compile(Around(model), backend="eager", fullgraph=True)
    assert torch.equal(run(original, X), run(Around(model), X))


def test_what_torch_compile_returns_is_not_sparsified() -> None:
    compiled = torch.compile(RecurrentNet(), backend="eager")
    with pytest.raises(SparsifyError, match="sparsify the model that it was given"):
        sparsify(compiled, X)  # type: ignore[arg-type]


def test_a_compiled_part_of_a_model_is_recorded_as_what_it_is() -> None:
    model = Around(RecurrentNet()).eval()
    expected = run(model)
    model.inner = torch.compile(model.inner, backend="eager")  # type: ignore[assignment]
    fast = sparsify(model, X, timing=False)
    assert runs_kernels(fast)
    assert torch.equal(run(fast), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_the_original_operations(strict: bool) -> None:
    model, fast = make()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, expected = Around(fast), run(Around(model))
        exported = torch.export.export(whole, (X,), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("linear" in target for target in targets) == 3 * len(X)
    assert torch.equal(run(exported.module(), X), expected)


@pytest.mark.parametrize("called", [True, False])
def test_tracing_sees_the_original_operations(called: bool) -> None:
    model, fast = make()
    if not called:
        fast = sparsify(model, timing=False)
    trace: Any = torch.jit.trace
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = trace(fast, (X,))
    assert not runs_kernels_of(fast, lambda: run(traced, X))
    assert torch.equal(run(traced, X), run(model, X))


def test_without_torch_compile_dynamo_is_not_imported() -> None:
    """It takes a second."""
    code = (
        "from tests.models.small_nets import RecurrentNet, spikes\n"
        "import sys, torch; import sparsify\n"
        "fast = sparsify.sparsify(RecurrentNet().eval(), spikes(), timing=False)\n"
        "with torch.no_grad(): fast(spikes())\n"
        "assert fast.kernels\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
