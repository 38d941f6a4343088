"""What must hold on a device before anything is measured on it; a check raises if it does not."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_forward import Forward, make_network
from gpu_machine import release
from gpu_peers import graphed, new_stream
from gpu_place import ROOT, Place
from torch import Tensor

import sparsify
from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.reference import Array, run_reference

sys.path.append(str(ROOT))  # kernels that the tests have, too
from tests.kernels.example_kernels import gradient_data, lif, lif_data, lif_gradient, schedule
from tests.kernels.gated_kernels import egru

EXTENTS = ((1, 1), (5, 3), (3, 16), (4, 140))  # steps and batch rows
MOST_NEURONS = 100_000  # in all steps and rows: the interpreter is slow


@dataclass(frozen=True)
class Check:
    """``kernels``, or of ``case`` ``model``, and on a GPU ``graph``, ``streams`` and ``move``."""

    kind: str
    case: Forward | None = None


def run_check(place: Place, check: Check) -> dict[str, Any]:
    """A row that says what was checked."""
    if check.kind == "kernels":
        return {"check": check.kind, "verified": list(check_kernels(place))}
    assert check.case is not None
    checks: dict[str, Callable[[Place, Any, Any, Tensor], str]] = {
        "model": check_model,
        "graph": check_graph,
        "streams": check_streams,
        "move": check_move,
    }
    with place.device, torch.no_grad():
        torch.manual_seed(0)
        model, x = make_network(check.case)
        fast: Any = sparsify.sparsify(model, x, **{**place.options, "timing": False})
        said = checks[check.kind](place, model, fast, x)
        strategies = {name: view.schedule.strategy for name, view in fast.kernels.items()}
    assert strategies, f"no kernel was compiled:\n{fast.report}"
    release()
    return {"check": check.kind, "network": check.case.network, "verified": said, **strategies}


def check_kernels(place: Place) -> Iterator[str]:
    """Kernels of all strategies give the bits of the reference interpreter."""
    found = list(kernels(place))
    pairs = [
        (kernel, plan)
        for kernel, _ in found
        for plan in (schedule(kernel, strategy.name) for strategy in place.backend.strategies)
        if place.backend.why_not(kernel, plan) is None
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # then found in the cache
        list(pool.map(lambda pair: place.backend.compile(*pair), pairs))
    for kernel, make_data in found:
        compiled = [place.backend.compile(*pair) for pair in pairs if pair[0] is kernel]
        launches = [place.backend.load(each) for each in compiled]
        neurons = kernel.populations[-1].size
        for steps, batch in EXTENTS:
            if steps * batch * neurons <= MOST_NEURONS:
                data = make_data(steps, batch)
                wanted = run_reference(kernel, data, steps=steps, batch=batch)
                for launch in launches:
                    _compare(place, launch, data, wanted, (steps, batch))
        strategies = ", ".join(launch.schedule.strategy for launch in launches)
        yield f"{kernel.name} of {neurons}: {strategies}"


def kernels(place: Place) -> Iterator[tuple[ir.Kernel, Callable[[int, int], Mapping[str, Array]]]]:
    """Kernels and their data; small ones for the emulator."""
    for inputs, hidden in ((70, 130), (300, 1000), (64, 3001)) if place.is_gpu else ((20, 40),):
        yield (recurrent := lif(inputs, hidden)), partial(lif_data, recurrent)
        yield (gradient := lif_gradient(hidden)), partial(gradient_data, gradient, share=0.3)
    if place.is_gpu:  # as large as it has to be to send mail
        yield (gated := egru(1350)), partial(gated_data, gated)


def gated_data(kernel: ir.Kernel, steps: int, batch: int) -> dict[str, Array]:
    """Data with which some 15 % of the units are active."""
    rng, hidden = np.random.default_rng(0), kernel.populations[0].size
    data = {o.name: rng.standard_normal((steps, batch, hidden)) for o in kernel.operands[:3]}
    data |= {w.name: rng.standard_normal((hidden, hidden)) / 8 for w in kernel.weights}
    data |= {"theta": np.full(hidden, 1.0), "h0": rng.standard_normal((batch, hidden))}
    data["y0"] = data["h0"] * (data["h0"] > 1)
    return {name: value.astype("float32") for name, value in data.items()}


def _compare(
    place: Place,
    launch: Launchable,
    data: Mapping[str, Array],
    wanted: Mapping[str, Array],
    extent: tuple[int, int],
) -> None:
    tensors = {name: torch.from_numpy(value).to(place.device) for name, value in data.items()}
    got = launch(tensors, steps=extent[0], batch=extent[1])
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        array = got[name].cpu().numpy()
        bits = f"u{value.dtype.itemsize}"
        equal = (array.view(bits) == value.view(bits)) | ((array != array) & (value != value))
        what = f"{launch.kernel.name}, {launch.schedule.strategy}, steps and rows {extent}: {name}"
        assert equal.all(), f"{what}: {np.count_nonzero(~equal)} of {equal.size} differ"


def check_model(place: Place, model: Any, fast: Any, x: Tensor) -> str:
    """Step by step from the model's own states, within derived bounds."""
    return str(sparsify.verify(model, fast, x, must_replace=True))


def check_graph(place: Place, model: Any, fast: Any, x: Tensor) -> str:
    """Captured, and replayed after the weights have changed."""
    replay = graphed(fast, x)
    assert torch.equal(replay(x), model(x)), "a captured call differs"
    for parameter in model.parameters():
        parameter.mul_(0.5)
    assert torch.equal(replay(x), model(x)), "a replay does not see that weights have changed"
    return "capture and replay, also with changed weights"


def check_streams(place: Place, model: Any, fast: Any, x: Tensor) -> str:
    """On other streams, from several threads at once."""
    wanted, failed = model(x), []

    def run() -> None:
        with torch.no_grad(), torch.cuda.stream(new_stream()):
            for _ in range(5):
                if not torch.equal(fast(x), wanted):
                    failed.append("a call on another stream differs")

    threads = [threading.Thread(target=run) for _ in range(4)]
    torch.cuda.synchronize()  # the streams do not wait for what was started before
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0]
    return "four threads, each with a stream of its own"


def check_move(place: Place, model: Any, fast: Any, x: Tensor) -> str:
    """The same module on the CPU and back: each call is served by the backend of its tensors."""
    wanted = fast(x)
    fast.to("cpu")
    assert torch.equal(fast(x.cpu()), wanted.cpu()), "the CPU gives other spikes"
    fast.to(place.device)
    assert torch.equal(fast(x), wanted), "spikes differ after the way to the CPU and back"
    return "moved to the CPU and back"
