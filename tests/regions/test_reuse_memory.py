"""Operands that nobody reads again are overwritten: the same bits, no copies of gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify
from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.overwriting import may_overwrite
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import run_reference
from sparsify.regions import trained_region
from sparsify.regions.joined_parts import joined, split_joined
from sparsify.regions.trained_region import TrainedRegion
from tests.kernels.random_kernels import COMPILED, Drawn, array_of, draw_data, kernels, tensors_of
from tests.models.zoo import fill_weights
from tests.models.zoo_feedforward import HIDDEN, IN
from tests.models.zoo_gated import Event

STEPS, BATCH = 6, 3


class Gated(nn.Module):
    """Event-based gated units, whose input product is one for all gates and steps."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(inputs, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.inp(x))

    def loop(self, currents: Tensor) -> Tensor:
        h = y = currents.new_zeros(currents.shape[1], HIDDEN)
        ys = []
        for current in currents:
            p_z, p_r, p_g = current.chunk(3, dim=1)
            q_z, q_r, q_g = self.rec(y).chunk(3, dim=1)
            z = torch.sigmoid(p_z + q_z)
            c = z * h + (1 - z) * torch.tanh(p_g + torch.sigmoid(p_r + q_r) * q_g)
            o: Tensor = Event.apply(c - 0.1, 0.3, 1.0)  # type: ignore[no-untyped-call]
            h, y = c - 0.1 * o, o * c
            ys.append(y)
        return torch.stack(ys)


class Windows(Gated):
    """The same of three steps at a time, as so many rows: they lie in one another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self.inp(x).unfold(0, 3, 1).transpose(1, 2))


BACKEND = CppBackend()
needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


def pairs_of(kernel: ir.Kernel) -> list[tuple[str, str]]:
    """Operands and outputs that may lie in them, each of them once."""
    found: dict[str, str] = {}
    for operand in kernel.operands:
        for output in kernel.outputs:
            if output.name not in found.values() and may_overwrite(
                kernel, operand.name, output.name
            ):
                found[operand.name] = output.name
                break
    return list(found.items())


def with_added(kernel: ir.Kernel) -> ir.Kernel:
    """``kernel`` with an operand that its last phase reads, and an output that may lie there."""
    *phases, last = kernel.phases
    axes: tuple[ir.Axis, ...] = ("T", "B", "N")
    added: tuple[ir.Statement, ...] = (
        ir.Let("twice_added", "add", ("added", "added"), "float32"),
        ir.Store("summed", "twice_added"),
    )
    return replace(
        kernel,
        operands=(*kernel.operands, ir.Operand("added", axes, last.population, "float32")),
        outputs=(*kernel.outputs, ir.Output("summed", axes, last.population, "float32")),
        phases=(*phases, replace(last, body=(*last.body, *added))),
    )


@needs_compiler
@pytest.mark.usefixtures("all_threads_for_small_work")
@settings(COMPILED, max_examples=4)
@given(drawn=kernels(), seed=st.integers(0, 2**16))
def test_kernels_may_overwrite_what_the_rule_says(drawn: Drawn, seed: int) -> None:
    kernel = with_added(drawn.kernel)
    drawn = replace(drawn, kernel=kernel)
    pairs = pairs_of(kernel)
    assert ("added", "summed") in pairs
    launch = BACKEND.load(BACKEND.compile(kernel, drawn.schedule))
    data = draw_data(drawn, seed, 4, 3, activity=0.5, special=False)
    wanted = run_reference(kernel, data, steps=4, batch=3)
    tensors = tensors_of(kernel, data)
    places = {output: tensors[operand] for operand, output in pairs}
    got = launch(tensors, steps=4, batch=3, outputs=places)
    for name, value in wanted.items():
        assert array_of(got[name]).tobytes() == value.tobytes(), name
    assert all(got[output] is tensors[operand] for operand, output in pairs)


def cell(*body: ir.Statement) -> ir.Kernel:
    axes: tuple[ir.Axis, ...] = ("T", "B", "N")
    return ir.Kernel(
        name="cell",
        populations=(ir.Population("n", 4),),
        operands=tuple(ir.Operand(name, axes, "n", "float32") for name in ("x", "other")),
        weights=(),
        states=(),
        phases=(ir.Phase("n", body),),
        outputs=(ir.Output("y", axes, "n", "float32"),),
    )


ADD = ir.Let("sum", "add", ("x", "other"), "float32")
TWICE = ir.Let("twice", "add", ("sum", "x"), "float32")
STORE = ir.Store("y", "sum")


def test_what_is_read_after_it_was_written_is_not_overwritten() -> None:
    assert may_overwrite(cell(ADD, STORE), "x", "y")
    assert not may_overwrite(cell(ADD, STORE, TWICE), "x", "y")
    assert may_overwrite(cell(ADD, STORE, TWICE), "other", "y")
    assert not may_overwrite(cell(ADD, STORE, STORE), "x", "y")


def test_other_values_do_not_fit() -> None:
    kernel = cell(ADD, STORE)
    doubles = replace(kernel.outputs[0], dtype="float64")
    last = replace(kernel.outputs[0], axes=("B", "N"))
    assert not may_overwrite(replace(kernel, outputs=(doubles,)), "x", "y")
    assert not may_overwrite(replace(kernel, outputs=(last,)), "x", "y")


def test_parts_of_one_tensor_are_joined_without_a_copy() -> None:
    whole = torch.arange(24.0).view(2, 12)
    parts = torch.split(whole, [5, 3, 4], 1)
    again = joined(parts, 1)
    assert again is not None and torch.equal(again, whole)
    assert again.data_ptr() == whole.data_ptr()
    assert joined((parts[1], parts[0], parts[2]), 1) is None
    assert joined((parts[0], parts[1].clone(), parts[2]), 1) is None


def test_gradients_of_other_parts_are_copied() -> None:
    x = torch.arange(12.0).view(2, 6).requires_grad_()
    a, b = split_joined(x, [2, 4], 1)
    torch.autograd.backward((a * 2).sum() + (b * 3).sum())
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 2, 3, 3, 3, 3]] * 2


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Any, Tensor]:
    """A model of two layers, compiled, that overwrites the gates of the second one."""
    monkeypatch.setattr(trained_region, "REUSED_BYTES", 0)
    model = fill_weights(nn.Sequential(Gated(IN), Gated(HIDDEN)), 1.5, 0.0, None)
    x = (torch.rand(STEPS, BATCH, IN, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    fast: Any = sparsify.sparsify(model, x, timing=False)
    regions = [m for m in fast.compiled.graph.modules() if isinstance(m, TrainedRegion)]
    assert [len(r.reused) for r in regions if r.reused] == [3, 3]
    return model, fast, x


def gradients(model: nn.Module, result: Any, **how: Any) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    result.square().sum().backward(**how)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@needs_compiler
def test_gradients_have_the_same_bits_whether_the_graph_is_kept(
    trained: tuple[nn.Module, Any, Tensor],
) -> None:
    model, fast, x = trained
    result = fast(x)
    kept = [gradients(model, result, retain_graph=True) for _ in range(2)]
    last = gradients(model, result)
    assert last and all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(last, *kept, strict=True)
    )
    eager = gradients(model, model(x))
    for got, wanted in zip(last, eager, strict=True):
        # Gradients of a path that is missing or overwritten point elsewhere; rounding does not.
        assert torch.nn.functional.cosine_similarity(got.ravel(), wanted.ravel(), 0) > 0.999


@needs_compiler
def test_an_interrupted_gradient_is_not_computed_again(
    trained: tuple[nn.Module, Any, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast, x = trained
    result = fast(x)
    whole = TrainedRegion.gradients

    def interrupted(*args: Any) -> Any:
        whole(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainedRegion, "gradients", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradients(model, result)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"a second time.*Run the model again"):
        gradients(model, result)


@needs_compiler
def test_windows_that_lie_in_one_another_are_not_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trained_region, "REUSED_BYTES", 0)
    model = fill_weights(Windows(IN), 1.5, 0.0, None).double()
    x = torch.rand(STEPS, IN, generator=torch.Generator().manual_seed(0)).double()
    fast: Any = sparsify.sparsify(model, x, timing=False)
    found, wanted = fast(x), model(x)
    regions = [m for m in fast.compiled.graph.modules() if isinstance(m, TrainedRegion)]
    assert regions and not any(region.reused for region in regions)
    # Rounding of doubles is six digits smaller; values that were overwritten differ by a tenth.
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
    for got, eager in zip(gradients(model, found), gradients(model, wanted), strict=True):
        assert torch.allclose(got, eager, rtol=1e-9, atol=1e-9)
