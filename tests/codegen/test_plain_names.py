"""Kernels that differ in names only are one for a compiler; those that differ in more are not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sparsify import ir
from sparsify.check_ir import check_kernel
from sparsify.codegen.plain_names import with_plain_names
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.serving.engine import Engine
from tests.kernels.example_kernels import (
    STRATEGIES,
    lif,
    lif_gradient,
    product,
    renamed,
    schedule,
    two_layers,
)
from tests.models.small_nets import RecurrentNet, spike, spikes

KERNELS = {"lif": lif(7, 13), "gradient": lif_gradient(13), "layers": two_layers(14, 3)}


def events(kernel: ir.Kernel) -> ir.Schedule:
    return ir.Schedule("rows-per-thread", tuple((g.result, "event") for g in kernel.gathers))


@pytest.mark.parametrize("name", KERNELS)
def test_of_a_kernel_with_other_names_the_plain_one_is_the_same(name: str) -> None:
    kernel = KERNELS[name]
    other = renamed(kernel)
    assert other != kernel
    check_kernel(other)
    plain, plan = with_plain_names(kernel, events(kernel))
    assert (plain, plan) == with_plain_names(other, events(other))
    check_kernel(plain)
    assert [g.result for g in plain.gathers] == [result for result, _ in plan.gathers]


def test_the_order_in_which_a_schedule_names_gathers_says_nothing() -> None:
    kernel = two_layers(14, 3)
    given = events(kernel)
    turned = replace(given, gathers=given.gathers[::-1])
    assert len(given.gathers) > 1
    assert with_plain_names(kernel, given) == with_plain_names(kernel, turned)


def test_layouts_follow_their_weights() -> None:
    kernel, layout = lif(7, 13), ir.Layout("compressed-rows")
    first, second = (weight.name for weight in kernel.weights)
    plans = [replace(events(kernel), layouts=((name, layout),)) for name in (first, second)]
    plain = [with_plain_names(kernel, plan) for plan in plans]
    assert plain[0] != plain[1]
    for (found, plan), place in zip(plain, (0, 1), strict=True):
        assert plan.layouts == ((found.weights[place].name, layout),)


def test_what_is_computed_is_not_forgotten() -> None:
    kernel = product(5, 7)
    plain = with_plain_names(kernel, events(kernel))
    others = [
        product(5, 8),
        product(6, 7),
        replace(kernel, reverse=True),
        replace(kernel, weights=(replace(kernel.weights[0], dtype="float64"),)),
    ]
    for other in others:
        assert with_plain_names(other, events(other)) != plain
    for strategy in STRATEGIES[1:]:
        assert with_plain_names(kernel, schedule(kernel, strategy)) != plain
    exchanged = replace(lif(7, 13), operands=tuple(reversed(lif(7, 13).operands)), name="exchanged")
    assert with_plain_names(exchanged, events(exchanged)) != with_plain_names(
        lif(7, 13), events(lif(7, 13))
    )


def test_literals_are_what_is_written() -> None:
    alike = ((0.0, 0), (0.0, -0.0), (1, 1.0), (1, True))
    assert not any(ir.Const(one) == ir.Const(other) for one, other in alike)
    assert {ir.Const(0.5), ir.Const(math.nan)} == {ir.Const(0.5), ir.Const(float("nan"))}


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_a_kernel_with_another_zero_is_another_one() -> None:
    class Silent(RecurrentNet):
        zero = 0.0

        def forward(self, x: Tensor) -> Tensor:
            v, outputs = torch.zeros(x.size(1), 16), []
            for x_t in x:
                v = 0.5 * v + self.inp(x_t) + self.rec(spike(v - 1.0))
                outputs.append(torch.where(v > 1.0, v, self.zero))
            return torch.stack(outputs)

    model, x = Silent().eval(), spikes(6, 3)
    with torch.no_grad():
        fast: Any = cast(Any, model).sparsify(x, timing=False)
        assert cast(Engine, fast.compiled).compiled.regions
        for zero in (0.0, -0.0):
            model.zero = zero
            fast(x)  # recorded
            assert torch.equal(1 / fast(x), 1 / model(x))
