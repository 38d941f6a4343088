"""What the forward saves of every step, and that it is no more than the gradient needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.passes.gradients.differentiate import differentiate
from sparsify.regions.outer_product import OuterProduct
from sparsify.scans.differentiated import Operand
from sparsify.scans.scan import Scan
from tests.models.step_bodies import BODIES, ATan, Body, Operands, StraightThrough, Window
from tests.passes.test_differentiate import differentiated, floats
from tests.steps import apply, make_scan

F64, BIT = torch.float64, torch.bool


def body(name: str) -> Body:
    return next(each for each in BODIES if each.name == name)


def saved_dtypes(scan: Scan, operands: Operands) -> tuple[list[torch.dtype], list[int]]:
    """The dtypes of the saved ys, bools first, and which xs the gradient reads."""
    parts = differentiated(scan, floats(operands), 4)
    results = parts.forward.results[len(parts.forward.results) - parts.saved :]
    dtypes = sorted((r.meta["val"].dtype for r in results), key=lambda d: d.itemsize)
    assert [key for key in parts.inputs if key[0] == "saved"] == [
        ("saved", i) for i in range(parts.saved)
    ]
    return dtypes, [index for role, index in parts.inputs if role == "x"]


@pytest.mark.parametrize(
    ("name", "dtypes", "xs"),
    [
        # The spikes that the recurrent product read, and what ATan needs: one bit, one float.
        ("lif", [BIT, F64], []),
        # The product with the input needs the input, which exists; nothing else does.
        ("from input", [BIT], [0]),
        # The old membrane for the decay, its distance from the threshold; the new spike follows.
        ("learnable", [BIT, F64, F64], []),
        # Spikes of the first layer are a bit although they follow from the membrane.
        ("two layers", [BIT, F64, F64], [0]),
        ("rates", [BIT, F64], []),
        # Gates z and r, what r gates, the candidate, the old state and the old output.
        ("EGRU", [F64] * 6, []),
        ("detached", [BIT, F64], []),
        ("not reached", [], []),
    ],
)
def test_saved_values(name: str, dtypes: list[torch.dtype], xs: list[int]) -> None:
    operands = body(name).operands(4, 3)
    scan = make_scan(body(name).step, *operands.groups())
    assert saved_dtypes(scan, operands) == (dtypes, xs)


def lif_with(surrogate: Callable[[Tensor], Tensor]) -> tuple[Scan, Operands]:
    def step(v: Tensor, z: Tensor, x: Tensor, w: Tensor) -> Any:
        v = v * 0.5 + x + z @ w.t()
        z = surrogate(v - 1.0)
        return v - z.detach(), z, z

    operands = body("lif").operands(4, 3)
    return make_scan(step, *operands.groups()), operands


def test_a_window_is_saved_as_a_bit() -> None:
    scan, operands = lif_with(lambda u: apply(Window, u, 0.5))
    assert saved_dtypes(scan, operands) == ([BIT, BIT], [])
    parts = differentiated(scan, floats(operands), 4)
    assert str(parts.forward.results[-1].target) == "aten.gt.Scalar"


def test_what_is_not_required_saves_nothing() -> None:
    scan, operands = lif_with(lambda u: apply(StraightThrough, u))
    assert saved_dtypes(scan, operands) == ([BIT], [])
    parts = differentiate(scan, {("x", 0)}, 4)
    assert getattr(parts, "saved", None) == 0


def test_saved_spikes_and_weight_gradients_know_of_events() -> None:
    scan, operands = lif_with(lambda u: apply(ATan, u))
    parts = differentiated(scan, floats(operands), 4)
    [product] = [m for m in parts.backward.modules() if isinstance(m, OuterProduct)]
    assert product.event
    places = [n for n in parts.backward.graph.nodes if n.op == "placeholder"]
    [spikes] = [n for n in places if n.meta["val"].dtype is torch.bool]
    assert spikes.meta["fact"].payload == "binary"
    assert spikes.meta["val"].shape == (4, 3, 6)


def test_the_forward_keeps_its_operations() -> None:
    """Bits: the same operations on the same values, in the same order."""
    for each in BODIES:
        operands = each.operands(3, 2)
        scan = make_scan(each.step, *operands.groups())
        forward = differentiated(scan, floats(operands), 3).forward
        names = [n.name for n in forward.body.graph.nodes]
        kept = [
            n.name
            for n in scan.body.graph.nodes
            if n.op != "output" and str(n.target).startswith("aten.") and "detach" not in n.name
        ]
        assert [name for name in names if name in kept] == kept


@pytest.mark.parametrize(("function", "given"), [(StraightThrough, ()), (Window, (0.5,))])
def test_dyadic_gradients_are_equal(function: Any, given: tuple[float, ...]) -> None:
    """Multiples of 2**-6 and halving decays: every sum is exact in float32, in any order."""

    def step(v: Tensor, z: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
        v = v * 0.5 + x + torch.nn.functional.linear(z, w, b)
        z = apply(function, v - 1.0, *given)
        return v - z, z, z

    generator = torch.Generator().manual_seed(3)

    def dyadic(*shape: int) -> Tensor:
        return torch.randint(-16, 17, shape, generator=generator).to(torch.float32) / 64

    carries = (dyadic(3, 6) * 4, (dyadic(3, 6) > 0).to(torch.float32))
    operands = Operands(carries, (dyadic(3, 3, 6) * 4,), (dyadic(6, 6), dyadic(6)))
    wide = Operands(*(tuple(t.double() for t in group) for group in operands.groups()))
    exact, _ = gradients_of_sums(make_scan(step, *wide.groups()), wide)
    eager, got = gradients_of_sums(make_scan(step, *operands.groups()), operands)
    assert all(value.any() for value in exact.values())
    for key, expected in exact.items():
        assert torch.equal(eager[key].double(), expected), "eager rounds: the case is not dyadic"
        assert torch.equal(got[key].double(), expected), key


def gradients_of_sums(
    scan: Scan, operands: Operands
) -> tuple[dict[Operand, Tensor], dict[Operand, Tensor]]:
    """Gradients of the sum of all results: eager's and those of the backward graph."""
    leaves = {key: t.clone().requires_grad_() for key, t in operands.places().items()}
    steps = operands.xs[0].shape[0]
    groups = [[t for (r, _), t in leaves.items() if r == role] for role in ("carry", "x", "const")]
    results = scan(steps, *groups)
    eager = torch.autograd.grad(sum(r.sum() for r in results), list(leaves.values()))
    parts = differentiated(scan, set(leaves), steps)
    with torch.no_grad():
        values = parts.forward(steps, *operands.groups())
        known: dict[Any, Tensor] = dict(operands.places())
        known |= {("saved", i): v for i, v in enumerate(values[len(results) :])}
        known |= {("d_result", i): torch.ones_like(r) for i, r in enumerate(results)}
        got = parts.backward(*(known[key] for key in parts.inputs))
    return dict(zip(leaves, eager, strict=True)), dict(zip(parts.outputs, got, strict=True))
