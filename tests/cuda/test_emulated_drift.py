"""What kernels of CUDA count while they run: live activity, warnings of drift, other layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sparsify import ir
from sparsify.api import sparsify
from sparsify.choosing.candidates import Predictor
from sparsify.choosing.rechoose import Rechooser
from sparsify.choosing.seldom import EVERY
from sparsify.codegen.backend import Workload
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.reference import run_reference
from sparsify.regions.sized_launchable import SizedLaunchable
from sparsify.weight_pattern import DENSE
from tests.codegen.test_kernels import assert_same_bits
from tests.kernels.emulated_kernels import needs_emulator
from tests.kernels.example_kernels import product
from tests.models.small_nets import RecurrentNet, spikes

BACKENDS = ("cpp", "cuda-emulated")
COMPRESSED = ir.Layout("compressed-rows")

pytestmark = [
    needs_emulator,
    pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler"),
]


def test_live_rates_are_those_of_other_backends() -> None:
    """Of all calls until then, whatever was active in each."""
    model, x = RecurrentNet().eval(), spikes()
    told = []
    for backend in BACKENDS:
        with torch.no_grad():
            fast: Any = sparsify(model, x, timing=False, backend=backend)
            for each in (x, torch.zeros_like(x), torch.full_like(x, 5.0)):
                fast(each)
        told.append(dict(fast.report.live()))
    assert told[0] == told[1]
    assert told[0].keys() == {"rec", "out"}
    assert all(0.1 < share < 0.9 for share in told[0].values())


def test_a_silent_net_that_fires_later_has_drifted() -> None:
    """So small a net gains by events on a GPU as long as there are none."""
    model, x = RecurrentNet().eval(), spikes()
    with torch.no_grad():
        fast: Any = sparsify(model, torch.zeros_like(x), timing=False, backend="cuda-emulated")
        sites = [site for site in fast.report.sites if site.decision == "event"]
        assert sites
        for site in sites:
            assert site.break_even is not None and site.activity == 0 < site.break_even < 0.01
        assert not fast.report.drift()
        fast(torch.zeros_like(x))
        assert not fast.report.drift()
        fast(x)
    told = fast.report.drift()
    assert [line.split(":")[0] for line in told] == [site.name for site in sites]
    for line, site in zip(told, sites, strict=True):
        share = fast.report.live()[site.name]
        assert 0.01 < share < 0.3
        assert f"{share:.1%} of its inputs are active now, 0.0% were" in line
        assert "dense is predicted to be faster above" in line


def test_a_layout_drifts_with_its_weights() -> None:
    model, x = RecurrentNet().eval(), spikes()
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(torch.rand_like(weight) < 0.3)
        known: Any = sparsify(model, x, timing=False)
        plan = known.plan
        for site in ("rec", "out"):
            plan = plan.pin(site, "event", COMPRESSED)
        pinned: Any = sparsify(model, x, plan=plan, backend="cuda-emulated")
        assert {pinned.report[site].layout for site in ("rec", "out")} == {"compressed-rows"}
        assert torch.equal(pinned(x), model(x))
        assert not pinned.report.drift()
        for weight in weights:
            weight.fill_(0.0)
        for _ in range(EVERY):
            assert torch.equal(pinned(x), model(x))
        drifted = {line.split(":")[0] for line in pinned.report.drift()}
        assert drifted == {"inp", "rec", "out"}


def test_weights_that_are_pruned_later_get_another_layout() -> None:
    """The kernel that runs is another one, with the same bits; what was counted is kept."""
    size, batch = 2048, 2
    kernel, rng = product(size, size), np.random.default_rng(0)
    backend = CudaBackend(EmulatedDevice("forward", checks=False))
    workload = Workload(100, 128, {"y": 0.02}, {"w": DENSE})
    predictor = Predictor(kernel, workload, backend)

    def load(kernel: ir.Kernel, schedule: ir.Schedule) -> Any:
        return backend.load(backend.compile(kernel, schedule))

    first = load(kernel, ir.Schedule("row-per-block", (("y", "event"),)))
    rechooser = Rechooser(predictor, first, load)
    launch = SizedLaunchable(rechooser, None)
    data = {o.name: rng.standard_normal((1, batch, size)) for o in kernel.operands}
    data = {name: (a * (rng.random(a.shape) < 0.02)).astype("float32") for name, a in data.items()}
    data["w"] = rng.standard_normal((size, size)).astype("float32")

    def tensors() -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in data.items()}

    def compare() -> None:
        wanted = run_reference(kernel, data, steps=1, batch=batch)
        got = launch(tensors(), steps=1, batch=batch)
        for name, value in wanted.items():
            assert_same_bits(got[name], value, name)

    compare()
    assert launch.events["y"][1] == batch * size
    data["w"] *= rng.random((size, size)) < 0.05
    assert not any(rechooser.look(tensors()) for _ in range(EVERY - 2))
    assert rechooser.base is first
    compare()
    assert rechooser.base.schedule.layout_of("w").kind == "compressed-rows"
    assert replace(rechooser.base.schedule, layouts=()) == first.schedule
    assert launch.events["y"][1] == 2 * batch * size
