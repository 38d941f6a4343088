"""EGRU networks of the zoo as kernels: one a layer, with the bits of the reference interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.compiling.stages import run_pipeline
from sparsify.graphs.loops import find_regions
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.reference import run_reference
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan
from tests.models.zoo import ENTRIES, Entry
from tests.models.zoo_gated import EGRU
from tests.networks.test_zoo import events_everywhere

WORDS = ("EGRU", "gates", "Cell")
EVENTS = [entry for entry in ENTRIES if "pruned" not in entry.name]  # those send no events
GATED = {entry.name: entry for entry in EVENTS if any(word in entry.name for word in WORDS)}
# The kernels of each: one a layer, and one for each product that reads the events of all steps.
DEEP = Entry("three layers", lambda: EGRU(3, trace=False))
TRACES = Entry("traces, two layers", lambda: EGRU(2, zoneout=0.125))
KERNELS = dict.fromkeys(GATED, 1) | {"EGRU, two layers": 4, DEEP.name: 6, TRACES.name: 2}
GATHERS = {"gates in place": 2, "EGRU, normed": 2, "LSTMCell, thresholded": 4}


@pytest.mark.parametrize("entry", [*GATED.values(), DEEP, TRACES], ids=lambda entry: entry.name)
@torch.no_grad()
def test_every_layer_is_one_kernel_with_a_product_for_each_gate(entry: Entry) -> None:
    recorded = record(entry.model(), (entry.inputs(),), {}, restore=True)
    assert isinstance(recorded, Recording)
    last = run_pipeline(recorded.graph)[-1].graph
    lowered = [lower_scan(m, "kernel") for m in last.children() if isinstance(m, Scan)]
    assert all(isinstance(result, Lowered) for result in lowered), lowered
    assert len(lowered) == KERNELS[entry.name]
    first = lowered[0]
    assert isinstance(first, Lowered)
    of_layers = [site for site in first.sites if site.weight]  # norms are products with ones
    assert len(of_layers) == GATHERS.get(entry.name, 3)
    assert all(site.event for site in of_layers)


class Checked:
    """Runs a kernel and the reference interpreter on the same tensors."""

    def __init__(self, launchable: Any) -> None:
        self.launchable = launchable
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.launchable, name)

    def __call__(self, tensors: Mapping[str, Tensor], **sizes: Any) -> Any:
        self.calls += 1
        arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
        got = self.launchable(tensors, **sizes)
        steps, batch = sizes["steps"], sizes["batch"]
        wanted = run_reference(self.launchable.kernel, arrays, steps=steps, batch=batch)
        assert wanted
        for name, value in wanted.items():
            assert got[name].numpy().tobytes() == value.tobytes(), name
        return got


@pytest.mark.parametrize("name", ["EGRU", "EGRU, joined operands"])
@torch.no_grad()
def test_kernels_have_the_bits_of_the_reference_interpreter(name: str) -> None:
    entry = GATED[name]
    fast = events_everywhere(entry.model(), entry.inputs())
    regions = list(find_regions(fast.compiled.graph).values())
    assert len(regions) == KERNELS[name]
    checked = []
    for region in regions:
        region.launchable = Checked(region.launchable)
        checked.append(region.launchable)
    fast(entry.inputs())
    assert [each.calls for each in checked] == [1] * len(checked)


@torch.no_grad()
def test_a_threshold_that_is_clamped_in_forward_is_clamped_by_the_kernel_too() -> None:
    entry = GATED["EGRU"]
    model, x = entry.model(), entry.inputs()
    fast = events_everywhere(model, x)
    assert isinstance(model, EGRU)
    layer: Any = model.rnns[0]
    layer.thr.fill_(-1.0)
    fast(x)
    assert float(layer.thr.min()) == float(layer.thr.max()) == 0.0
    layer.thr.fill_(7.0)
    _, finals = fast(x)
    assert float(layer.thr.max()) == 1.0
    assert not finals[0][1].any()  # no unit passes a threshold that tanh does not reach


@torch.no_grad()
def test_zoneout_draws_the_numbers_that_it_draws_in_eager() -> None:
    entry = GATED["EGRU"]
    model, x = entry.model(torch.float64).train(), entry.inputs(dtype=torch.float64)
    fast = events_everywhere(model, x)
    assert fast.report["rnns.0.recurrent_kernel"].decision == "event"
    torch.manual_seed(3)
    wanted, state = model(x)[0], torch.get_rng_state()
    torch.manual_seed(3)
    # Sums of at most 64 products below 1, some ten of them one after the other.
    torch.testing.assert_close(fast(x)[0], wanted, rtol=0, atol=64 * 10 * 2.3e-16)
    assert torch.equal(torch.get_rng_state(), state)
