"""Which backend serves a call, and what becomes of a model that moves."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.api import sparsify
from sparsify.codegen.backend import Source
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.errors import BackendUnavailable, KernelFault, Refusal, RefusedError
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.serving import backends
from sparsify.serving.backends import Compilers, find_device, make_backends, require_backend
from sparsify.serving.engine import Engine
from sparsify.serving.install import Sparsified, install
from tests.emulated import OnlyStrategies
from tests.models.small_nets import RecurrentNet, spikes

X = spikes()
META = torch.device("meta")


def run(module: nn.Module, *args: Any) -> Any:
    with torch.no_grad():
        return module(*args)


def engine_of(fast: nn.Module) -> Engine:
    assert isinstance(fast, Sparsified)
    return fast.compiled


def test_the_processor_has_the_cpp_backend() -> None:
    assert make_backends(None)["cpu"].name == "cpp"
    compiler = Compilers(Options()).serving([("x", X)])
    assert not isinstance(compiler, Refusal)
    assert compiler.binaries.backend.name == "cpp"
    assert compiler is not Compilers(Options()).serving([("x", X)])


def test_a_device_without_a_backend_is_refused() -> None:
    refusal = Compilers(Options()).serving([("x", X.to(META))])
    assert isinstance(refusal, Refusal)
    assert refusal.code == "backend-unavailable"
    assert "no backend for tensors on meta" in refusal.reason
    assert "Kernels run on CPU and CUDA" in refusal.remedy


def test_a_backend_that_is_asked_for_serves_its_device_only() -> None:
    refusal = Compilers(Options(backend="cpp")).serving([("x", X.to(META))])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "backend='cpp' serves tensors on cpu; these are on meta."


@pytest.mark.parametrize("name", ["nvptx", "", "CPP"])
def test_unknown_backends_are_named(name: str) -> None:
    known = "known: 'cpp', 'cuda', 'cuda-emulated', or None"
    with pytest.raises(ValueError, match=f"unknown backend '{name}'; {known}"):
        sparsify(RecurrentNet(), backend=name)


def test_numbers_and_indices_may_be_beside_another_device() -> None:
    beside = [("tau", torch.tensor(2.0)), ("lengths", torch.tensor([3, 2]))]
    assert find_device([*beside, ("x", X.to(META))]) == META
    assert find_device(beside) == torch.device("cpu")
    assert find_device([]) == torch.device("cpu")


def test_tensors_on_two_devices_are_named() -> None:
    refusal = find_device([("x", X), ("inp.weight", X.to(META)), ("inp.bias", X.to(META))])
    assert isinstance(refusal, Refusal)
    assert refusal.code == "unsupported-layout"
    assert refusal.reason.endswith("different devices: x on cpu, inp.weight on meta.")


def test_a_call_with_tensors_on_two_devices_runs_the_original() -> None:
    class Reads(RecurrentNet):
        def forward(self, x: Tensor, scale: dict[str, Tensor] | None = None) -> Tensor:
            out: Tensor = super().forward(x)
            return out

    model = Reads().eval()
    fast = sparsify(model)
    message = r"different devices: argument 0 on cpu, argument 1\]\['s' on meta"
    with pytest.warns(UserWarning, match=message):
        result = run(fast, X, {"s": X.to(META)})
    assert torch.equal(result, run(model, X))
    assert "different devices" in str(engine_of(fast).report)


def test_a_model_that_moves_is_served_where_it_is() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, X, timing=False)
    assert "kernels of the backend cpp on cpu" in str(engine_of(fast).report)
    model.to("meta")
    with pytest.warns(UserWarning, match="no backend for tensors on meta"):
        assert run(fast, X.to(META)).device == META
    with pytest.raises(RefusedError, match="no backend for tensors on meta"):
        sparsify(model, X.to(META), strict=True)


def test_every_backend_keeps_its_kernels_and_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices that are both the processor; double precision stands for the other one."""

    def device_of_dtype(tensors: Any) -> torch.device:
        is_double = any(tensor.dtype is torch.float64 for _, tensor in tensors)
        return torch.device("cuda", 0) if is_double else torch.device("cpu")

    monkeypatch.setattr(backends, "find_device", device_of_dtype)
    first, second = CppBackend(), CppBackend()
    model = RecurrentNet().eval()
    engine = Engine(model, Options(timing=False), None, {"cpu": first, "cuda": second})
    fast = install(engine)
    expected = run(model, X)
    assert torch.equal(run(fast, X), expected)
    plan = engine.plan
    model.double()
    assert torch.equal(run(fast, X.double()), run(model, X.double()))
    assert [entry.backend for entry in engine.entries] == [first, second]
    (made,) = (
        {kernel for kernel, _ in each.made} for each in engine._recorded.compilers.binaries[1:]
    )
    assert made and all(w.dtype == "float64" for kernel in made for w in kernel.weights)
    model.float()
    recordings = engine.recordings
    assert torch.equal(run(fast, X), expected)
    assert (engine.recordings, len(engine.entries)) == (recordings, 2)
    assert engine._recorded.plans.of(first) == plan
    assert engine.plan is engine._recorded.plans.of(second)


def test_an_original_that_runs_on_one_device_is_not_pinned_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reads(RecurrentNet):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            if out.is_cpu:
                float(out.sum())
            return out

    fast = sparsify(Reads().eval())
    with pytest.warns(UserWarning, match="cannot be recorded"):
        run(fast, X)
    asked: list[torch.device] = []

    def note(tensors: Any) -> Refusal:
        asked.append(next(iter(tensors))[1].device)
        return Refusal("backend-unavailable", "noted")

    monkeypatch.setattr(backends, "find_device", note)
    fast.to("meta")
    with pytest.warns(UserWarning, match="noted"):
        run(fast, X.to(META))
    assert META in asked


def test_without_a_driver_the_original_runs_and_the_report_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusal = Refusal("backend-unavailable", "CuPy is not installed.", "pip install '.[cuda13]'.")
    monkeypatch.setattr(Gpu, "why_unavailable", lambda self: refusal)
    monkeypatch.setattr(backends, "find_device", lambda tensors: torch.device("cuda", 0))
    model = RecurrentNet().eval()
    fast = sparsify(model)
    with pytest.warns(UserWarning, match="CuPy is not installed") as told:
        assert torch.equal(run(fast, X), run(model, X))
        assert torch.equal(run(fast, X), run(model, X))
    assert len(told) == 1
    report = engine_of(fast).report
    assert {site.code for site in report.sites} == {"backend-unavailable"}
    assert "pip install '.[cuda13]'" in str(report)
    with pytest.raises(BackendUnavailable, match=r"CuPy is not installed. pip install"):
        require_backend("cuda")


def test_the_emulator_takes_tensors_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """And compiles every site that reads events, whatever it costs."""
    monkeypatch.setenv("SPARSIFY_EMULATOR", "reverse")
    model = RecurrentNet().eval()
    fast = sparsify(model, X, backend="cuda-emulated")
    assert torch.equal(run(fast, X), run(model, X))
    engine = engine_of(fast)
    assert "kernels of the backend cuda-emulated on cpu" in str(engine.report)
    assert engine.report["rec"].decision == engine.report["out"].decision == "event"
    assert engine.kernels
    for view in engine.kernels.values():
        assert 'extern "C" __global__ void' in view.source
    assert all(given for view in engine.kernels.values() for given, _ in view.events.values())
    clone = copy.deepcopy(fast)
    assert torch.equal(run(clone, X), run(model, X))
    assert engine_of(clone).compiled.backend.name == "cuda-emulated"


class WithoutBarriers(CudaBackend):
    """As if the text of kernels had a bug."""

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Source:
        source = super().render(kernel, schedule)
        assert "__syncthreads();" in source.text
        return replace(source, text=source.text.replace("__syncthreads();", ";"))


def test_a_fault_names_its_region() -> None:
    """It is raised: memory of a device that a kernel may have written to is not to be trusted."""
    backend = WithoutBarriers(EmulatedDevice(checks=True))
    engine = Engine(RecurrentNet().eval(), Options(), None, {"cpu": backend})
    with pytest.raises(KernelFault, match=r"' failed:\nrace: ") as caught:
        run(install(engine), X)
    name, what = caught.value.kernel.split(" with ")
    assert f"run_{name}.cu:" in str(caught.value)  # the kernel's line
    assert re.fullmatch(r".*rec\.weight from .*small_nets\.py:\d+  v = self\.beta \* v .*", what)


def test_the_report_says_what_the_emulator_does_not_have() -> None:
    plan = Plan({"rec": "dense", "out": "dense"})
    backend = OnlyStrategies("forward", ["dense-tiles"])
    model = RecurrentNet().eval()
    engine = Engine(model, Options(), plan, {"cpu": backend})
    assert torch.equal(run(install(engine), X), run(model, X))
    schedules = [view.schedule.strategy for view in engine.kernels.values()]
    assert "dense-tiles" in schedules
    note = ": plain products stand for those of tensor cores on the emulator"
    assert str(engine.report).count(note) == schedules.count("dense-tiles")
