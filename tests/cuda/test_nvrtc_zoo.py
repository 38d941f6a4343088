"""Kernels of every network of the zoo through NVRTC, without a spill; only text is rendered.

``python -m pytest tests/release_nvrtc_zoo.py`` does so for every strategy and target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from sparsify.choosing.rendered import Rendered
from sparsify.codegen.backend import Source
from sparsify.codegen.cuda import nvrtc
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import H100, Limits
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.headers import headers_for
from sparsify.options import Options
from sparsify.serving.engine import Engine
from tests.cuda_wheels import needs_nvrtc
from tests.models.zoo import ENTRIES, Entry

COMPILED = [entry for entry in ENTRIES if entry.code is None and entry.on_cuda]


def sources(entry: Entry, limits: Limits, *, all_strategies: bool) -> Iterator[Source]:
    """The text of the network's kernels, of the chosen strategies or of all that take them."""
    backend = CudaBackend(Gpu(limits.architecture), limits)
    model, x = entry.model(), entry.inputs(4, 3)
    engine = Engine(model, Options(timing=False), None, {"cpu": Rendered(backend)})
    engine.compile_example((x,), {}, gradients=False)
    for view in engine.kernels.values():
        chosen = view.schedule.strategy
        for strategy in backend.strategies if all_strategies else ():
            plan = replace(view.schedule, strategy=strategy.name)
            if strategy.name != chosen and backend.why_not(view.kernel, plan) is None:
                yield backend.render(view.kernel, plan)
        yield backend.render(view.kernel, view.schedule)


def check_no_stack(entry: Entry, limits: Limits, *, all_strategies: bool) -> None:
    """Spills are errors; so is memory on the stack, which is in fact global memory."""
    texts = list(sources(entry, limits, all_strategies=all_strategies))
    assert texts, "no kernel was rendered"
    for source in texts:
        cubin = nvrtc.compile_cubin(source, headers_for(source), limits.architecture)
        assert nvrtc.usage_of(cubin, source.entry).stack_bytes == 0, source.text


@needs_nvrtc
@pytest.mark.parametrize("entry", COMPILED, ids=lambda entry: entry.name)
def test_every_network_compiles_for_a_gpu(entry: Entry) -> None:
    check_no_stack(entry, H100, all_strategies=False)
