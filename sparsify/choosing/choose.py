"""Decide how a region runs: its candidates timed on the example, or predicted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsify import ir
from sparsify.bench import Timings, measure_pairs, wait_for_devices
from sparsify.choosing.candidates import Candidate
from sparsify.choosing.comparisons import Comparisons
from sparsify.codegen.backend import Launchable
from sparsify.comparing.regions import RegionCheck
from sparsify.errors import MismatchError, Refusal
from sparsify.free_memory import free_memory
from sparsify.passes.lowering.without_packing import without_packing
from sparsify.regions.region import Region, batch_of, fetches_of
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan

BUDGET_SECONDS = 0.1  # of timing, for a region
SLOW_SECONDS = 0.1  # an original that takes this long is timed once
TIMED_STEPS = 100  # of a longer loop: every one takes the same time
TIMED_SECONDS = 0.01  # a call that takes longer is timed on fewer steps
LEAST_STEPS = 10  # but on so many: a call looks at the weights once
FAR = 3.0  # so is one that takes this many times longer than a kernel
HOPELESS = 10.0  # and where that is so many times, one call of it is enough
CHECKED_STEPS = 3
CHECKED_ROWS = 512  # where there are no steps: rows of all of them are many
FIRST_CALLS = 3
LEAST_ROUNDS = 2  # beside the first calls
MOST_ROUNDS = 9
LEAST_MS = 1.0  # of calls of one kernel before the next one runs: most find their weights cached
ENOUGH_SECONDS = 0.05  # that two first calls took: a third would tell no more
BEHIND = 1.5  # a kernel that takes this many times longer than the fastest one is timed no further
SLACK_SECONDS = 20e-6  # a call may be slower than eager by this much, or by 5 %
SLACK_SHARE = 1.05
REMEDY = "Larger batches, more neurons or fewer events move the balance; a plan can pin the site."
QUIETER = "Call sparsify again when the machine is quiet. "
KINDS = {
    "dense": "dense",
    "event": "event",
    "parameters": "pruned",
    "both": "pruned event",
}
REPORT = "Please report this with the model and its input; until then the original runs."


@dataclass(frozen=True)
class Choice:
    """What a Scan is replaced by, or why it is kept.

    ``took_ms`` has what was measured, by "original" and by the labels of candidates.
    """

    region: Region | None
    refusal: Refusal | None = None
    took_ms: Mapping[str, float] = field(default_factory=dict)
    events: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Task:
    """A Scan to be decided, with its kernel and the operands of the example, or their layouts.

    ``original_seconds`` is what the Scan took when it made the operands of others, None if unknown.
    """

    name: str
    scan: Scan
    lowered: Lowered
    operands: tuple[Any, ...]
    original_seconds: float | None = None

    @property
    def steps(self) -> int:
        return int(self.operands[0])

    @property
    def batch(self) -> int:
        _, carries, xs, consts = self.operands
        return batch_of(self.lowered, {"carry": carries, "x": xs, "const": consts})


def choose_region(
    task: Task,
    candidates: Sequence[Candidate],
    load: Callable[[ir.Kernel, ir.Schedule], Launchable],
    timing: bool,
    comparisons: Comparisons | None = None,
) -> Choice:
    """Run every candidate on the example's operands and take the fastest.

    Without ``timing`` the first candidate is taken, which is the one predicted to be fastest. It is
    compared with the original unless ``comparisons`` know it.
    """
    regions = [
        Region(task.scan, task.lowered, load(task.lowered.kernel, c.schedule)) for c in candidates
    ]
    with torch.no_grad():
        events, seconds = _exact_events(task, regions[0])
        if timing:
            seconds = max(seconds, candidates[0].predicted_seconds)
            choice = _choose_timed(task, candidates, regions, events, seconds)
        else:
            choice = _chosen(regions[0], {}, events)
        regions.clear()  # the others' packed weights
        if choice.region is None:
            return choice
        known = Comparisons() if comparisons is None else comparisons
        if known.is_known(choice.region, task.operands, CHECKED_STEPS):
            return choice
        wrong = why_wrong(task, choice.region)
        if wrong is not None:
            return Choice(None, wrong, choice.took_ms, events)
        known.note_right(choice.region, task.operands, CHECKED_STEPS)
        return choice


def why_wrong(task: Task, region: Region) -> Refusal | None:
    """Compare the first steps of a kernel with the original operations, as ``verify`` does all."""
    steps, carries, xs, consts = _some_rows(task, CHECKED_ROWS).operands
    first = min(steps, CHECKED_STEPS)
    try:
        check = RegionCheck(task.name, region, first, carries, [x[:first] for x in xs], consts)
        check.run(most_undecided=1.0)
    except MismatchError as error:
        reason = f"The kernel does not compute what the original operations do: {error}"
        return Refusal("unsupported-op", reason, REPORT, task.scan.location)
    finally:
        region.launchable.reset_events()
    return None


def _some_rows(task: Task, most: int) -> Task:
    """The task with the first and the last of its rows, where they are what differs between steps.

    All of them where one of its operations may know how many they are.
    """
    steps, carries, xs, consts = task.operands
    rows, half = task.batch, most // 2
    fetches = [fetch for fetch in fetches_of(task.lowered) if fetch.has_rows]
    read = {fetch.binding.index for fetch in fetches if fetch.binding.role == "x"}
    is_divided = len(read) == len(fetches) == len(xs) and not carries
    if rows <= most or not is_divided or any(fetch.binding.lead != 1 for fetch in fetches):
        return task
    given = [(node.args, node.kwargs) for node in task.scan.body.graph.nodes]
    if rows in [value for value in tree_leaves(given) if isinstance(value, int)]:
        return task
    parts = [torch.cat([x[:, :half], x[:, -half:]], 1) if x.shape[1] == rows else x for x in xs]
    return replace(task, operands=(steps, carries, parts, consts))


def _choose_timed(
    task: Task,
    candidates: Sequence[Candidate],
    regions: Sequence[Region],
    events: Mapping[str, tuple[int, int]],
    expected_seconds: float,
) -> Choice:
    timings, seconds = time_candidates(task, regions, expected_seconds)
    by_label: dict[str, float] = {"original": seconds[-1]}
    for candidate, took in zip(candidates, seconds[:-1], strict=True):
        by_label[candidate.label] = min(took, by_label.get(candidate.label, took))
    took_ms = {label: took * 1e3 for label, took in by_label.items()}
    contended = timings.why_contended
    best = min(range(len(regions)), key=lambda i: seconds[i])
    if seconds[best] >= seconds[-1]:
        pair = seconds[best], seconds[-1]
        return _no_gain(task, candidates[best], *pair, took_ms, events, contended)
    note = f"decided by disturbed times: {contended}" if contended else ""
    if contended and seconds[0] < seconds[-1]:  # what is predicted was not seen to lose
        best, note = 0, f"decided by prediction, because {contended}"
    return _chosen(regions[best], took_ms, events, note)


def time_candidates(
    task: Task, regions: Sequence[Region], expected_seconds: float = 0.0
) -> tuple[Timings, list[float]]:
    """Interleaved rounds; the shortest times of the regions and, last, of the original Scan.

    Other work only ever adds to a time: of few rounds, the shortest one has the least of it. The
    original and regions take part only where they are close, and the first region, which is
    predicted to be the fastest. Of many steps some are timed, of a call that takes long fewer.
    """
    task, share = in_the_middle(task, regions[0], timed_steps(task, expected_seconds))
    operands = task.operands
    # Nobody writes to weights here. To find that out, others are read than those that were packed.
    functions: dict[str, Callable[[], Any]] = {
        str(i): partial(region.again, *operands) for i, region in enumerate(regions)
    }
    once = {name: seconds_of(function) for name, function in functions.items()}
    kernels = min(once.values())
    original = task.original_seconds
    original_call = _original_call(task)
    if original is None or original < FAR * kernels:  # one run may have been disturbed
        slow = max(TIMED_SECONDS, HOPELESS * kernels)
        original = seconds_of(original_call, slow=min(slow, SLOW_SECONDS))
    is_close = original < FAR * kernels
    functions = {n: f for n, f in functions.items() if n == "0" or once[n] <= BEHIND * kernels}
    if is_close and original < SLOW_SECONDS:
        functions["original"] = original_call
    budget = BUDGET_SECONDS if len(functions) > 1 else 0.0
    round_seconds = kernels * len(functions) + original * is_close
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(round_seconds, 1e-3))))
    once["original"] = original
    timings = measure_pairs(functions, rounds, least_ms=LEAST_MS, known=once)
    once |= {name: min(once[name], *timings.seconds[name]) for name in functions}
    return timings, [seconds / share for seconds in once.values()]


def timed_steps(task: Task, expected_seconds: float) -> int:
    """How many steps of the task are timed."""
    steps = int(task.operands[0])
    wanted = math.ceil(steps * TIMED_SECONDS / max(expected_seconds, 1e-9))
    return min(TIMED_STEPS, max(LEAST_STEPS, wanted))


def in_the_middle(task: Task, run: Callable[..., Any], timed: int) -> tuple[Task, float]:
    """The task with ``timed`` of many steps, and their share of all.

    They are in the middle of the loop, from the states that ``run`` comes there with: at the start
    nothing may fire yet.
    """
    steps, carries, xs, consts = task.operands
    if steps < 2 * timed:
        return task, 1.0
    before = (steps - timed) // 2
    first, middle = range(before), range(before, before + timed)

    def part(which: range) -> list[Tensor]:
        """Rows of the xs, in the order in which steps run."""
        start, stop = which.start, which.stop
        if task.scan.reverse:
            start, stop = steps - stop, steps - start
        return [x[start:stop] for x in xs]

    if carries:
        carries = run(before, carries, part(first), consts)[: task.scan.carries]
    share = timed / steps
    took = None if task.original_seconds is None else task.original_seconds * share
    operands = (timed, carries, part(middle), consts)
    return replace(task, operands=operands, original_seconds=took), share


def seconds_of(
    function: Callable[[], Any], enough: float = 0.0, slow: float = SLOW_SECONDS
) -> float:
    """The shortest time of some calls; the first may have to warm up.

    What takes longer than ``slow`` is called once, and so is what takes less than ``enough``.
    """
    free_memory()  # each call may leave a hole of the size of its results
    took: list[float] = []
    for _ in range(FIRST_CALLS):
        wait_for_devices()
        start = time.perf_counter()
        function()
        wait_for_devices()
        took.append(time.perf_counter() - start)
        if min(took) > slow or min(took) < enough or (len(took) > 1 and sum(took) > ENOUGH_SECONDS):
            break
    return min(took)


def is_slower(ours: float, original: float) -> bool:
    """True if ``ours`` breaks the promise on what a call may cost over the original's."""
    return ours > max(SLACK_SHARE * original, original + SLACK_SECONDS)


def _call(module: torch.nn.Module, operands: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: module.forward(*operands)


def _original_call(task: Task) -> Callable[[], Any]:
    """The Scan without packing: were it kept, bits would be packed outside of it."""
    steps, carries, xs, consts = task.operands
    unpacked = without_packing(task.scan)
    return _call(unpacked.scan, (steps, carries, unpacked.xs_of(xs), consts))


def _exact_events(task: Task, region: Region) -> tuple[dict[str, tuple[int, int]], float]:
    """Active senders and senders of each Gather, from the counters of a kernel, and its seconds.

    Every kernel counts them for every Gather, whether it reads events or not.
    """
    wait_for_devices()
    start = time.perf_counter()
    region(*task.operands)
    wait_for_devices()
    took = time.perf_counter() - start
    events = region.launchable.events
    region.launchable.reset_events()
    return events, took


def _chosen(
    region: Region,
    took_ms: Mapping[str, float],
    events: Mapping[str, tuple[int, int]],
    note: str = "",
) -> Choice:
    return Choice(region, None, took_ms, events, note)


def _no_gain(
    task: Task,
    candidate: Candidate,
    ours: float,
    original: float,
    took_ms: Mapping[str, float],
    events: Mapping[str, tuple[int, int]],
    contended: str,
) -> Choice:
    kind = KINDS[candidate.label]
    reason = (
        f"The {kind} kernel took {ours * 1e3:.3g} ms, the original operations took "
        f"{original * 1e3:.3g} ms."
    )
    if contended:
        reason += f" Other work disturbed that: {contended}."
    facts = {"kernel_ms": ours * 1e3, "original_ms": original * 1e3}
    remedy = f"{QUIETER if contended else ''}{REMEDY}"
    refusal = Refusal("no-gain", reason, remedy, task.scan.location, facts)
    return Choice(None, refusal, took_ms, events)
