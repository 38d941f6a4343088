"""Layouts of weights among the candidates, in plans and reports, and chosen again while running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsify import ir
from sparsify.api import sparsify
from sparsify.choosing.candidates import Predictor, find_candidates
from sparsify.choosing.rechoose import Rechooser
from sparsify.choosing.seldom import EVERY
from sparsify.codegen.backend import Workload
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.cost_model import Rates
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.products.layouts import layouts_of, scattered
from sparsify.weight_pattern import DENSE, Pattern
from tests.kernels.example_kernels import product
from tests.models.small_nets import RecurrentNet, spikes

# Of an AVX-512 core; weights that do not stay in its cache are read at 20 GB/s.
RATES = Rates(1e11, event_adds=4e10, dense_macs=7e10, pointwise=2e9, far_bytes=2e10)
COMPRESSED = ir.Layout("compressed-rows")


# As calibrated on a Zen 4 core on which nothing else ran.
ZEN_4 = Rates(1.2e11, event_adds=2.2e10, dense_macs=3.8e10, pointwise=2.5e9, far_bytes=4.5e10)


def predictor(
    pattern: Pattern, activity: float = 0.1, size: int = 2048, rates: Rates = RATES
) -> Predictor:
    kernel = product(size, size)
    workload = Workload(100, 1, {"y": activity}, {"w": pattern})
    return Predictor(kernel, workload, CppBackend(rates))


def kinds(found: Predictor) -> list[str]:
    """Layouts of the candidates, the fastest first."""
    return [c.schedule.layout_of("w").kind for c in find_candidates(found, {})]


def test_few_weights_that_are_left_are_compressed() -> None:
    assert kinds(predictor(scattered(0.1)))[0] == "compressed-rows"
    assert kinds(predictor(scattered(0.95)))[0] == "dense-rows"
    assert set(kinds(predictor(DENSE))) == {"dense-rows"}


def test_zeros_anywhere_gain_up_to_the_density_at_which_they_were_measured_to() -> None:
    """A step of 2048 neurons, of which 9 % were active, took 17 us as events on two cores. Masks of
    50 % of the weights took 16 us, of 30 % 15 us, of 20 % 11 us and of 10 % 10.3 us where their
    rows were cached, lists of 20 % 17 us and of 10 % 10.6 us, and less than masks where not.
    """
    left = {
        0.1: "compressed-rows",
        0.2: "masked-rows",
        0.3: "masked-rows",
        0.5: "masked-rows",
        0.7: "dense-rows",
    }
    for density, layout in left.items():
        assert kinds(predictor(scattered(density), 0.09, rates=ZEN_4))[0] == layout
    found = predictor(scattered(0.1), 0.09, rates=ZEN_4)
    assert 0.5 < found.break_even_density({"y": "event"}, "w") < 0.65


def test_what_is_left_in_blocks_or_groups_is_kept_so() -> None:
    blocks = Pattern(0.1, {8: 0.1, 16: 0.1, 32: 0.19})
    assert kinds(predictor(blocks))[0] == "block-rows"
    assert [layout.width for layout in layouts_of(blocks, along=True)][2:] == [8, 16, 32]
    assert "block-rows" not in {layout.kind for layout in layouts_of(blocks, along=False)}
    two_of_four = Pattern(0.5, {8: 1.0, 16: 1.0, 32: 1.0}, (2, 4), 0.5, 0.5)
    assert kinds(predictor(two_of_four))[0] == "masked-rows"


def test_candidates_are_few_and_have_labels() -> None:
    found = find_candidates(predictor(scattered(0.12)), {})
    assert len(found) <= 5
    assert {"event", "both"} <= {c.label for c in found}
    assert all(c.label in ("both", "parameters") for c in found if c.schedule.layouts)


def test_a_pinned_layout_is_not_varied() -> None:
    found = replace(predictor(scattered(0.1)), pinned=(("w", ir.Layout("masked-rows")),))
    assert set(kinds(found)) == {"masked-rows"}
    found = replace(predictor(scattered(0.1)), pinned=(("w", ir.DENSE_ROWS),))
    assert set(kinds(found)) == {"dense-rows"}


def test_the_break_even_density_divides_the_layouts() -> None:
    found = predictor(scattered(0.1))
    even = found.break_even_density({"y": "event"}, "w")
    assert 0.1 < even < 0.76  # denser ones are not tried
    assert kinds(predictor(scattered(0.8 * even)))[0] != "dense-rows"


def three_products(size: int) -> ir.Kernel:
    """Three products of one input, as the gates of a GRU have them."""
    kernel = product(size, size)
    names = ("0", "1", "2")
    weights = tuple(replace(kernel.weights[0], name=f"w{n}") for n in names)
    gathers = tuple(ir.Gather(f"y{n}", f"w{n}", "x", "real") for n in names)
    added = (
        ir.Let("y", "add", ("y0", "y1"), "float32"),
        ir.Let("z", "add", ("y", "y2"), "float32"),
    )
    phase = ir.Phase("receivers", (*gathers, *added, ir.Store("out", "z")))
    return replace(kernel, weights=weights, phases=(phase,))


def test_weights_that_are_alike_are_laid_out_alike() -> None:
    # Of a core that adds fewer kept weights of these than dense ones, and reads them faster.
    rates = Rates(1.2e11, event_adds=2.1e10, dense_macs=3.8e10, pointwise=2e9, far_bytes=5.8e10)
    kernel = three_products(1024)
    patterns = {w.name: scattered(0.02) for w in kernel.weights}
    workload = Workload(100, 1, {g.result: 1.0 for g in kernel.gathers}, patterns)
    found = Predictor(kernel, workload, CppBackend(rates))
    best = found.candidates({g.result: "dense" for g in kernel.gathers})[0]
    assert {best.schedule.layout_of(w.name).kind for w in kernel.weights} == {"compressed-rows"}


class Launched:
    """A launchable that runs nothing."""

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule) -> None:
        self.kernel, self.schedule = kernel, schedule
        self.events: dict[str, tuple[int, int]] = {}

    def __call__(self, tensors: Mapping[str, Any], **sizes: Any) -> dict[str, Any]:
        return {}

    def reset_events(self) -> None: ...


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_weights_that_are_pruned_later_get_another_layout_and_back() -> None:
    found = predictor(DENSE)
    first = Launched(found.kernel, ir.Schedule("neurons-per-thread", (("y", "event"),)))
    rechooser = Rechooser(found, first, Launched)
    weight = torch.ones(2048, 2048)
    assert not any(rechooser.look({"w": weight}) for _ in range(EVERY))
    weight *= torch.rand(2048, 2048, generator=torch.Generator().manual_seed(0)) < 0.1
    assert sum(rechooser.look({"w": weight}) for _ in range(3 * EVERY)) == 1
    assert rechooser.base.schedule.layout_of("w").kind == "compressed-rows"
    assert rechooser.densities["w"] == int(weight.count_nonzero()) / weight.numel() < 0.11
    assert sum(rechooser.look({"w": torch.ones(2048, 2048)}) for _ in range(EVERY)) == 1
    assert rechooser.base.schedule == first.schedule


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_weights_that_have_not_changed_are_not_counted_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = predictor(DENSE)
    first = Launched(found.kernel, ir.Schedule("neurons-per-thread", (("y", "event"),)))
    rechooser = Rechooser(found, first, Launched)
    counted: list[torch.Tensor] = []
    count = torch.count_nonzero

    def count_nonzero(weight: torch.Tensor) -> torch.Tensor:
        counted.append(weight)
        return count(weight)

    monkeypatch.setattr(torch, "count_nonzero", count_nonzero)
    weight = torch.ones(2048, 2048)
    for changes, calls in ((1, 3), (2, 2)):
        assert not any(rechooser.look({"w": weight}) for _ in range(calls * EVERY))
        assert len(counted) == changes
        weight[:, 0] = 0.0
    assert not any(rechooser.look({"w": weight}) for _ in range(EVERY))
    assert rechooser.densities["w"] == 2047 / 2048


def test_one_kernel_serves_all_sizes_that_it_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = predictor(DENSE)
    first = Launched(found.kernel, ir.Schedule("neurons-per-thread", (("y", "event"),)))
    other = replace(first.schedule, strategy="rows-per-thread")

    def better(self: Predictor, known: ir.Schedule, steps: int, batch: int) -> ir.Schedule | None:
        return other if batch > 8 else None

    monkeypatch.setattr(Predictor, "better_strategy", better)
    rechooser = Rechooser(found, first, Launched)
    assert rechooser.suited(10, 8) is None
    suited = rechooser.suited(10, 9)
    assert suited is not None
    assert suited.schedule == other
    assert rechooser.suited(20, 64) is suited


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_a_silent_layer_takes_no_operations() -> None:
    """None would say that they are not known."""
    model, x = RecurrentNet().eval(), spikes()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        fast: Any = sparsify(model, x, timing=False)
    silent = [site for site in fast.report.sites if site.activity == 0.0]
    assert silent
    assert {site.event_operations for site in silent} == {0.0}
    assert str(fast.report)


def test_a_pinned_layout_runs_is_reported_and_drifts() -> None:
    model, x = RecurrentNet().eval(), spikes()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand_like(parameter) < 0.3)
        fast: Any = sparsify(model, x, timing=False)
        plan = fast.plan
        sites = [site.name for site in fast.report.sites if site.decision != "kept"]
        assert sites
        for site in sites:
            plan = plan.pin(site, "event", COMPRESSED)
        pinned: Any = sparsify(model, x, plan=plan)
        for name in sites:
            site = pinned.report[name]
            assert (site.decision, site.layout) == ("event", "compressed-rows")
            product = site.dense_operations * site.activity * site.weight_density
            assert site.both_operations == pytest.approx(product, rel=1e-15)  # three roundings
        assert torch.equal(pinned(x), model(x))
        assert not pinned.report.drift()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.fill_(0.0)  # pruned to nothing
        for _ in range(EVERY):
            assert torch.equal(pinned(x), model(x))
        assert len(pinned.report.drift()) == len(sites)
