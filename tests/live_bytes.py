"""How much memory tensors take while something runs, as torch's allocator tells its profiler."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that were allocated inside and alive at once; the result is kept till the end.

    Views count with the memory that they keep alive, and what operations need inside counts too.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    del result
    events = seen.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        alive += change
        peak = max(peak, alive)
    return peak
