"""Every network of the zoo: equal where arithmetic is exact, verified where it is not.

Nothing here is timed: sites are decided by predictions, and pinned to events where those are in
doubt, so that a busy machine does not change what is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsify.api import sparsify
from sparsify.verification.model import verify
from tests.models.zoo import BATCH, ENTRIES, EXACT_STEPS, Entry, tensors_of

COMPILED = [entry for entry in ENTRIES if entry.code is None]
LEFT_ALONE = [entry for entry in ENTRIES if entry.code is not None]
EXACT = [entry for entry in COMPILED if entry.grid is not None]
# One of each kind: recording and compiling them all again in float64 would take minutes.
IN_DOUBLE = {
    "step by step",
    "layer by layer",
    "exponential decay",
    "recurrent, hoisted",
    "first step differs",
    "graded recurrent",
    "EGRU",
    "EGRU, joined operands",
    "homeostatic",
    "tuple state",
    "nn.RNN relu, two layers",
    "soft-threshold video",
}
LENGTHS = [
    ("step by step", 1),
    ("recurrent", 2),
    ("in place", 1),
    ("in place", 100),
    ("relu by hand", 2),
    ("relu by hand", 100),
]


def named(entries: list[Entry]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class FloatMeansDouble(TorchFunctionMode):
    """Lets a network that insists on ``.float()`` run in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].double() if func is Tensor.float else func(*args, **(kwargs or {}))


def events_everywhere(model: nn.Module, x: Tensor) -> Any:
    """Sparsify; what is predicted to gain nothing at these small sizes is pinned to events."""
    fast: Any = sparsify(model, x, timing=False)
    plan = fast.plan
    for site in fast.report.sites:
        if site.decision == "dense" or site.code == "no-gain":
            plan = plan.pin(site.name, "event")
    return fast if plan == fast.plan else sparsify(model, x, plan=plan, timing=False)


def assert_events(fast: Any, entry: Entry) -> None:
    """The expected sites ran as events, and no site is there twice: every loop was rolled."""
    decisions = {site.name: site.decision for site in fast.report.sites}
    missing = [name for name in entry.events if decisions.get(name) != "event"]
    repeated = [name for name in decisions if "#" in name]
    assert not missing and not repeated, f"{missing} {repeated}\n{fast.report}"


def assert_equal(got: object, expected: object) -> None:
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    assert pairs
    for one, other in pairs:
        assert one.dtype == other.dtype and torch.equal(one, other)


def assert_same_bits(got: object, expected: object) -> None:
    """As ``assert_equal``; float64 against float32."""
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert torch.equal(one.double(), other.double())


@named(EXACT)
def test_exact_arithmetic_gives_equal_results(entry: Entry) -> None:
    model, x = entry.dyadic_model(), entry.inputs(EXACT_STEPS)
    expected = copy.deepcopy(model)(x)
    with FloatMeansDouble():
        in_double = entry.dyadic_model(torch.float64)(x.double())
    assert_same_bits(expected, in_double)  # the premise: no sum was rounded

    fast = events_everywhere(model, x)
    assert_events(fast, entry)
    operands = fast.compiled.compiled.recording.calling.operands((x,), {})
    first, *later = fast.stages
    recorded = first.graph(*operands)
    assert later
    for stage in later:
        assert_equal(stage.graph(*operands), recorded)
    assert_equal(fast(x), expected)


@named(COMPILED)
def test_real_weights_are_verified_at_every_size(entry: Entry) -> None:
    model, x = entry.model(), entry.inputs()
    fast = events_everywhere(model, x)
    verify(model, fast, x, events=len(entry.events))
    batches = (BATCH, BATCH) if entry.keeps_state else (5, 2)
    for steps, batch in zip((7, 19), batches, strict=True):
        other = entry.inputs(steps, batch)
        verify(model, fast, other, events=len(entry.events))
    assert fast.compiled.recordings <= entry.recordings, f"\n{fast.report}"


@named([entry for entry in COMPILED if entry.name in IN_DOUBLE])
def test_float64_agrees_to_rounding(entry: Entry) -> None:
    model, x = entry.model(torch.float64), entry.inputs(dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    fast = events_everywhere(model, x)
    assert_events(fast, entry)
    for got, wanted in zip(tensors_of(fast(x)), tensors_of(expected), strict=True):
        if set(wanted.unique().tolist()) <= {0.0, 1.0}:
            assert torch.equal(got, wanted)
            continue
        # A sum of n terms is off by at most n/2 ulps of its largest partial sum, and a state
        # gathers the error of 12 steps: 200 terms, 12 steps and partial sums of up to ten times
        # the largest value stay below 2 ** 15 half ulps.
        bound = 2.0**15 * 2.0**-53 * float(wanted.abs().max())
        assert float((got - wanted).abs().max()) <= bound


@pytest.mark.parametrize(("name", "steps"), LENGTHS)
def test_any_number_of_steps(name: str, steps: int) -> None:
    """Recorded and verified at that length."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, x = entry.model(), entry.inputs(steps, batch=2)
    fast = events_everywhere(model, x)
    figures = verify(model, fast, x, events=len(entry.events))
    assert max(region.steps for region in figures.regions) == steps


def test_a_thousand_steps() -> None:
    """In float64, where a flip of rounding is as good as impossible: the same spikes."""
    entry = next(entry for entry in ENTRIES if entry.name == "recurrent")
    model, x = entry.model(torch.float64), entry.inputs(1000, 2, torch.float64)
    fast = events_everywhere(model, x)
    assert_events(fast, entry)
    assert_equal(fast(x), model(x))


@named(LEFT_ALONE)
def test_left_alone_with_the_reason(entry: Entry) -> None:
    model, x = entry.model(), entry.inputs()
    fast: Any = sparsify(model, x, timing=False)
    assert fast.report.sites
    for site in fast.report.sites:
        assert (site.decision, site.code) == ("kept", entry.code), f"\n{fast.report}"
        assert site.reason
    assert_equal(fast(x), model(x))


@named(list(ENTRIES))
def test_no_network_is_silent_or_busy(entry: Entry) -> None:
    """The zoo tests something: outputs are neither all zero nor all the same."""
    for result in (entry.model()(entry.inputs()), entry.model()(entry.inputs(EXACT_STEPS))):
        assert any(len(t.unique()) > 1 for t in tensors_of(result))
