"""Loops that run from the last step to the first: every pass keeps the direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from sparsify.comparing.regions import check_regions
from sparsify.errors import MismatchError
from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.set_apart import set_apart
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.nodes.result import PassResult
from sparsify.passes.products.scan_products import scan_products
from sparsify.regions.region import Region
from sparsify.rounding.error_bounds import ErrorBounds
from sparsify.scans.scan import Scan, retyped
from sparsify.serving.general_modules import GeneralModules
from tests.models.looped_models import WEIGHTS, B, H, layer_order, recurrent
from tests.passes.test_random_loops import BATCH, N, RandomModel
from tests.passes.test_roll_loops import assert_same
from tests.passes.test_set_apart import normalised_input, spikes_and_softmax
from tests.regions.test_random_kernels_of_loops import quarters
from tests.run_lowered import ReferenceLaunchable, lowered, scans_of, with_regions
from tests.unrolled import Tape, Unrolled, dyadic, record_unrolled

Pass = Callable[[fx.GraphModule], PassResult]
STEPS = 6


def reversed_loops(recorded: Unrolled) -> fx.GraphModule:
    """The recording, rolled up, with every loop running backwards."""
    graph = roll_loops(recorded.graph).graph
    assert scans_of(graph), "nothing was rolled"
    for scan in scans_of(graph).values():
        scan.reverse = True
    return graph


def fading(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """The batch size is written into the body."""
    v, out = torch.zeros(x.shape[1:]), []
    for t in tape.loop(range(x.size(0))):
        v = v * 0.5 + x[t] + torch.ones(x.shape[1:])
        out.append(v)
    return torch.stack(out), v


def record(model: Any) -> Unrolled:
    return record_unrolled(model, [dyadic(STEPS, B, H, seed=7)], WEIGHTS)


def one_reversed() -> tuple[Scan, tuple[Any, ...]]:
    """A recurrent layer and the operands of a call."""
    recorded = record(recurrent)
    [scan] = scans_of(reversed_loops(recorded)).values()
    consts = [WEIGHTS[p.name] for p in scan.placeholders[scan.carries + scan.xs :]]
    carries = [torch.zeros(B, H), torch.zeros(B, H)]
    return scan, (STEPS, carries, [recorded.operands[-1]], consts)


def forwards(scan: Scan) -> Scan:
    return Scan(scan.body, scan.carries, scan.xs, scan.consts, scan.location)


def test_it_is_the_loop_over_flipped_time() -> None:
    scan, (steps, carries, [x], consts) = one_reversed()
    results = scan(steps, carries, [x], consts)
    flipped = forwards(scan)(steps, carries, [x.flip(0)], consts)
    expected = (*flipped[: scan.carries], *(y.flip(0) for y in flipped[scan.carries :]))
    assert all(map(torch.equal, results, expected))
    assert not torch.equal(results[-1], forwards(scan)(steps, carries, [x], consts)[-1])


def test_fewer_steps_than_the_input_has_start_at_the_last_of_them() -> None:
    scan, (_, carries, [x], consts) = one_reversed()
    shorter = scan(2, carries, [x], consts)
    assert all(map(torch.equal, shorter, scan(2, carries, [x[:2]], consts)))


def test_traced_states_stand_at_the_steps_that_start_from_them() -> None:
    scan, (steps, carries, [x], consts) = one_reversed()
    trace = scan.trace_states(steps, carries, [x], consts)
    assert all(map(torch.equal, trace.outputs, scan(steps, carries, [x], consts)))
    for step in range(steps):
        results = scan.body(*(carry[step] for carry in trace.carries), x[step], *consts)
        assert torch.equal(results[-1], trace.outputs[-1][step])


def test_it_prints_its_direction_and_keeps_it_when_retyped() -> None:
    scan, _ = one_reversed()
    assert scan.extra_repr().endswith(", reverse=True")
    assert "reverse" not in forwards(scan).extra_repr()
    assert scan.retyped(torch.float64).reverse


def test_bounds_follow_time() -> None:
    graph = reversed_loops(recorded := record(recurrent))
    bounds = ErrorBounds(graph).evaluate(recorded.operands)
    for bounded, result in zip(bounds.outputs, graph(*recorded.operands), strict=True):
        assert torch.equal(bounded.value.float(), result)  # dyadic data: nothing is rounded


@pytest.mark.parametrize(
    ("model", "rewrite"),
    [(layer_order, split_time), (normalised_input, set_apart), (spikes_and_softmax, set_apart)],
)
def test_split_loops_keep_the_direction(model: Any, rewrite: Pass) -> None:
    graph = reversed_loops(recorded := record(model))
    rewritten = rewrite(find_events(graph).graph)
    assert rewritten.done
    assert all(scan.reverse for scan in scans_of(rewritten.graph).values())
    assert_same(rewritten.graph(*recorded.operands), graph(*recorded.operands))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.integers(1, 4))
@example(seed=5402, steps=3)
def test_random_kernels_keep_the_bits_of_reversed_loops(seed: int, steps: int) -> None:
    model = RandomModel(seed)
    generator = torch.Generator().manual_seed(seed)
    model.weights = {k: quarters(tuple(w.shape), generator) for k, w in model.weights.items()}
    shape = (BATCH, steps, N) if model.batch_first else (steps, BATCH, N)
    recorded = record_unrolled(model, [quarters(shape, generator)], model.weights)
    graph = roll_loops(recorded.graph).graph
    for scan in scans_of(graph).values():
        scan.reverse = True
    expected = graph(*recorded.operands)
    double = retyped(graph, torch.float64)(*(t.double() for t in recorded.operands))
    assume(all(torch.equal(a, b.double()) for a, b in zip(double, expected, strict=True)))

    split = scan_products(split_time(find_events(graph).graph).graph).graph
    launchables = with_regions(split)
    assert_same(split(*recorded.operands), expected)
    assert all(launchable.calls == 1 for launchable in launchables.values())
    # A product may have been made a loop of its own, which has no states and no direction.
    kernels = [launchable.kernel for launchable in launchables.values()]
    assert all(kernel.reverse for kernel in kernels if kernel.states)


def test_one_module_for_two_sizes_must_run_one_way() -> None:
    small, large = (
        record_unrolled(fading, [dyadic(STEPS, batch, H, seed=7)], {}) for batch in (3, 8)
    )
    [scan], [other] = (scans_of(reversed_loops(recorded)).values() for recorded in (small, large))
    assert GeneralModules().module(scan, scan) is scan
    assert GeneralModules().module(scan, forwards(scan)) is None
    assert GeneralModules().module(scan, forwards(other)) is None
    general = GeneralModules().module(scan, other)
    assert isinstance(general, Scan)
    assert general.reverse


def region_graph(scan: Scan, kernel_of: Scan, place: fx.GraphModule) -> fx.GraphModule:
    compiled = fx.GraphModule(dict(place.named_children()), place.graph)
    kernel = lowered(kernel_of)
    [name] = scans_of(place)
    setattr(compiled, name, Region(scan, kernel, ReferenceLaunchable(kernel.kernel)))
    return compiled


def test_verification_steps_backwards() -> None:
    graph = reversed_loops(recorded := record(recurrent))
    [scan] = scans_of(graph).values()
    [figures] = check_regions(graph, region_graph(scan, scan, graph), recorded.operands)
    assert figures.steps == STEPS
    wrong = region_graph(scan, forwards(scan), graph)
    with pytest.raises(MismatchError, match="one call against single steps"):
        check_regions(graph, wrong, recorded.operands)


def test_directions_make_different_kernels() -> None:
    scan, _ = one_reversed()
    kernel = lowered(scan).kernel
    assert kernel.reverse
    assert lowered(forwards(scan)).kernel == replace(kernel, reverse=False)
