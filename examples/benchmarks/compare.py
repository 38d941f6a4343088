"""Measure one network at one size: every peer, our dense and event kernels, and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from memory import measure_memory
from networks import Network, spike_trains
from peers import dense_peers
from roofline import measure_roofline
from torch import Tensor

import sparsify
from sparsify.bench import Timings, measure_pairs
from sparsify.ir import Layout

DENSE, EVENT, FROZEN = "sparsify dense", "sparsify event", "the same, frozen"
# These keep the order of every operation but the sums, which are exact: their spikes are equal.
EQUAL = ("eager", "hoisted", DENSE, EVENT, FROZEN)
INPUTS, INPUT_RATE = 700, 0.02
EXAMPLES = 4  # inputs that take turns
LEAST_MS = 10.0  # of calls of one network before the next one runs: all find their weights cached
CALIBRATION = (40, 16)  # steps and samples on which thresholds are chosen


@dataclass(frozen=True)
class Size:
    """What is measured; ``activity`` is the share of neurons that fire in a step."""

    hidden: int
    batch: int
    activity: float = 0.075
    steps: int = 100


def measure(
    build: Callable[[int, int], Network],
    size: Size,
    *,
    rounds: int,
    compiled: bool,
    memory: bool = True,
) -> dict[str, Any]:
    """Calibrate the network, measure everything, print a table and return its figures.

    ``compiled`` adds torch.compile to the peers.
    """
    torch.manual_seed(0)
    model = build(INPUTS, size.hidden).eval()
    model.calibrate(spike_trains(*CALIBRATION, INPUTS, INPUT_RATE), size.activity)
    inputs = draw_inputs(size.steps, size.batch)
    activity = float(model(inputs[0]).mean())
    print(
        f"\n{type(model).__name__}, {size.hidden} neurons a layer, batch {size.batch}, "
        f"{size.steps} steps, {INPUTS} inputs at {INPUT_RATE:.0%}; {activity:.1%} of neurons fire"
    )
    peers = dense_peers(model, inputs[0], compiled=compiled)
    ours = our_variants(model, inputs[0])
    timings = measure_pairs(
        {**peers, **ours}, rounds, inputs=inputs, check=check_outputs, least_ms=LEAST_MS
    )
    best = best_peer(peers, timings)
    least = least_ms(model, inputs, ours[EVENT])
    _print(timings, best, least)
    taken = measure_memory(model, {**asdict(size), "rate": INPUT_RATE}, INPUTS) if memory else None
    if taken is not None:
        print(taken)
    return {
        **asdict(size),
        "network": type(model).__name__,
        "measured_activity": activity,
        "median_ms": {name: timings.median_ms(name) for name in timings.seconds},
        "event_over": {name: asdict(timings.ratio(name, EVENT)) for name in timings.seconds},
        "best_dense_peer": best,
        "frozen_over": {name: asdict(timings.ratio(name, FROZEN)) for name in timings.seconds},
        "dense_over_best_peer": asdict(timings.ratio(best, DENSE)),
        "roofline_ms": least,
        "memory_mib": asdict(taken) if taken is not None else None,
        "contended": timings.why_contended,
    }


def draw_inputs(steps: int, batch: int) -> list[Tensor]:
    """Examples ``[steps, batch, INPUTS]`` that take turns."""
    return [spike_trains(steps, batch, INPUTS, INPUT_RATE) for _ in range(EXAMPLES)]


def best_peer(peers: Iterable[str], timings: Timings) -> str:
    """The fastest of ``peers``, eager left out."""
    return min(set(peers) - {"eager"}, key=timings.median_ms)


def our_variants(model: Network, x: Tensor) -> dict[str, Any]:
    """The sparsified model with every site that has a kernel dense, and with events.

    The last one is frozen: it does not look for changes of weights.
    """
    fast = sparsify.sparsify(model, x)
    decisions = ((DENSE, "dense"), (EVENT, "event"), (FROZEN, "event"))
    found = {name: pinned(fast, model, x, decision) for name, decision in decisions}
    found[FROZEN].freeze()
    return found


def pinned(
    fast: Any, model: Network, x: Tensor, decision: Any, layout: Layout | None = None
) -> Any:
    """``model`` with every site that has a kernel in ``fast`` decided, and its weights' layout."""
    plan = fast.plan
    for site in fast.report.sites:
        if site.decision != "kept":
            plan = plan.pin(site.name, decision, layout)
    return sparsify.sparsify(model, x, plan=plan)


def check_outputs(outputs: Mapping[str, Any]) -> None:
    """Spikes must be equal, or as many where another library chose its own order of rounding."""
    expected = outputs["eager"]
    count = float(expected.sum())
    for name, output in outputs.items():
        if name in EQUAL:
            assert torch.equal(output, expected), f"{name} gives other spikes than eager"
            continue
        # One flip of rounding sends a network another way: the counts of two runs then differ as
        # two draws do, by about the square root; six of them is never seen by chance.
        other = float(np.asarray(output).sum())
        assert abs(other - count) <= 6 * count**0.5, f"{name}: {other:.0f} spikes, not {count:.0f}"


def least_ms(model: Network, inputs: Sequence[Tensor], fast: Any) -> float:
    """The time that the event products alone must take: bytes and additions at the limits."""
    weights = [fast.report[site.name] for site in fast.report.sites if site.decision == "event"]
    adds = sum(site.event_operations or 0.0 for site in weights)
    matrices = model.products()[-len(weights) :] if weights else []
    total_bytes = sum(4.0 * weight.numel() for weight in matrices)
    roofline = measure_roofline(round(total_bytes))
    batch = inputs[0].shape[1]
    # Rows that several samples of a batch touch in a step need to be read once only.
    touched = 4 * adds / batch
    print(
        f"limits: {roofline.bytes_per_second / 1e9:.0f} GB/s from an array of "
        f"{total_bytes / 2**20:.0f} MiB, {roofline.adds_per_second / 1e9:.0f} G adds/s; "
        f"{adds / 1e6:.1f} M event adds a call"
    )
    return roofline.least_ms(touched, adds)


def _print(timings: Timings, best: str, least: float) -> None:
    print(timings)
    print(f"fusion gain: dense kernel over best dense peer ({best}): {timings.ratio(best, DENSE)}")
    print(f"sparsity gain: event kernel over dense kernel: {timings.ratio(DENSE, EVENT)}")
    print(f"event kernel over best dense peer: {timings.ratio(best, EVENT)}")
    print(f"the same, frozen: {timings.ratio(best, FROZEN)}")
    share = least / timings.median_ms(EVENT)
    print(f"roofline of the event products: {least:.3f} ms, {share:.0%} of the event kernel's time")
