"""The run itself: memory, threads, tracing, scripted parts, modules used in odd ways."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.recording.record import is_recording, record
from sparsify.recording.recording import Recording, Unrecorded
from tests.recorded import Of, call, check, of, recorded, refused, same, sources, targets

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations made and that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            for layer in self.layers:
                x = torch.relu(layer(x)) * 0.5
                x[:, :3] = 0
        return x.sum(0)


def peak_of(run: Callable[[], object]) -> int:
    with torch.no_grad(), Meter() as meter:
        run()
    return int(meter.peak)


def test_intermediates_are_not_kept() -> None:
    model, x = Deep(), torch.randn(512, 64)
    eager = peak_of(lambda: model(x))
    assert eager >= 2 * x.numel() * 4
    assert peak_of(lambda: record(model, (x,), {})) <= 1.5 * eager


def test_tensors_of_the_run_die_with_it() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def forward(x: Tensor) -> Tensor:
        y = x * 2
        seen.append(weakref.ref(y))
        return y + 1

    model = of(forward)
    with torch.no_grad():
        record(model, (X,), {})
    assert seen[0]() is None


def test_threads_record_at_the_same_time() -> None:
    failures: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                model = Of(lambda self, x: x * self.scale + number, scale=float(number))
                recording = recorded(model, X)
                if not same(call(recording, X), X * float(number) + number):
                    failures.append(number)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_other_threads_are_not_recorded() -> None:
    def forward(x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: X * 5)
        other.start()
        other.join()
        return x * 2

    with torch.no_grad():
        found = record(of(forward), (X,), {})
    if isinstance(found, Recording):
        assert targets(found) == ["mul.Tensor"]


def test_labels_for_a_profiler_are_no_operations() -> None:
    def forward(x: Tensor) -> Tensor:
        with torch.profiler.record_function("twice"):
            y = x * 2
        return y + 1

    with torch.profiler.profile() as profile:
        found = recorded(of(forward), X)
    assert targets(found) == ["mul.Tensor", "add.Tensor"]
    assert "twice" in {event.key for event in profile.key_averages()}
    assert same(call(found, X), X * 2 + 1)


@pytest.mark.parametrize("around", [lambda model: model, nn.Sequential])
def test_a_module_for_several_devices_is_to_wrap_the_sparsified_one(
    around: Callable[[nn.Module], nn.Module],
) -> None:
    error = refused(around(nn.DataParallel(nn.Linear(3, 3))), X)
    assert "give it that: DataParallel(model.sparsify())" in str(error)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
def test_packed_weights_of_quantized_layers_are_refused() -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic
    model = quantize(nn.Sequential(nn.Linear(3, 3)))
    with torch.no_grad():
        found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "sparsify the model before quantization" in str(found.error)


def test_recording_is_known_inside_and_over_outside() -> None:
    inside = []

    def forward(x: Tensor) -> Tensor:
        inside.append(is_recording())
        return x * 2

    with torch.no_grad():
        record(of(forward), (X,), {})
    assert inside == [True]
    assert not is_recording()


def test_tracers_are_put_back_and_disturbances_noticed() -> None:
    def tracer(frame: Any, event: str, arg: Any) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        recorded(of(lambda x: x * 2), X)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)

    def forward(x: Tensor) -> Tensor:
        sys.settrace(tracer)
        return x * 2

    with torch.no_grad():
        assert isinstance(record(of(forward), (X,), {}), Unrecorded)
    assert sys.gettrace() is before


def test_under_a_profiler_of_torch_that_follows_python() -> None:
    """From Python 3.12 on they go beside each other."""
    model = of(lambda x: x * 2)
    with torch.no_grad(), torch.profiler.profile(with_stack=True):
        before = sys.getprofile()
        assert before is not None and not callable(before)
        found = record(model, (X,), {})
        assert sys.getprofile() is before
    if sys.version_info >= (3, 12):
        assert isinstance(found, Recording)
    else:
        assert isinstance(found, Unrecorded) and "before it" in str(found.error)
        assert torch.equal(found.result, X * 2)


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(self.fc(x))
        return x


def test_scripted_modules_are_recorded_with_their_parameters() -> None:
    inner = torch.jit.script(Scripted())
    model = Of(lambda self, x: self.inner(x) + 1)
    model.inner = inner
    with torch.no_grad():
        found = record(model, (X,), {})
        assert isinstance(found, Recording), found.error
        names = [name for kind, name in sources(found) if kind == "parameter"]
        assert names == ["inner.fc.weight", "inner.fc.bias"]
        inner.fc.weight.mul_(2)
        values = found.graph(*found.calling.operands((X,), {}))
        assert same(values[0], model(X))


def test_parametrized_and_shared_modules() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(layer, nn.Tanh(), layer)
    recording = check(model, X)
    names = [name for kind, name in sources(recording) if kind == "parameter"]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_convolutions_and_attention() -> None:
    attend = nn.functional.scaled_dot_product_attention
    check(of(lambda x: attend(x, x * 2, x + 1)), torch.randn(2, 5, 8))
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.GELU())
    recording = check(net, torch.randn(2, 2, 6, 6))
    [product] = [n for n in recording.graph.graph.nodes if "convolution" in str(n.target)]
    assert product.meta["activity"] == 1


def test_activity_is_the_share_of_nonzeros() -> None:
    weight = nn.Linear(4, 4)
    x = torch.tensor([[0.0, 1.0, 0.0, 0.0], [2.0, 0.0, float("nan"), 0.0]])
    with torch.no_grad():
        found = record(weight, (x,), {})
    assert isinstance(found, Recording)
    [product] = [n for n in found.graph.graph.nodes if "addmm" in str(n.target)]
    assert product.meta["activity"] == 3 / 8


def test_locations_of_modules_of_torch_alone() -> None:
    recording = recorded(nn.Sequential(nn.Linear(3, 3)), X)
    files = {
        n.meta["location"].file for n in recording.graph.graph.nodes if n.op == "call_function"
    }
    assert files and all("torch" in file for file in files)


def test_modules_that_call_forward_directly_and_closures() -> None:
    gain = torch.full((3,), 2.0)

    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc.forward(x) * gain

    recording = check(Direct(), X)
    [product] = [n for n in recording.graph.graph.nodes if "addmm" in str(n.target)]
    assert product.meta["module"] == "fc"
    kinds = {name: kind for kind, name in sources(recording)}
    assert [kind for name, kind in kinds.items() if name.endswith("gain")] == ["attribute"]


def test_own_generators_are_refused() -> None:
    generator = torch.Generator()
    with torch.no_grad():
        found = record(of(lambda x: x + torch.rand(3, generator=generator)), (X,), {})
    assert isinstance(found, Unrecorded)


def test_derivatives_inside_of_forward() -> None:
    check(of(lambda x: torch.func.grad(lambda a: (a.sin() * a).sum())(x)), X)
    check(of(lambda x: torch.func.jvp(lambda a: a.sin(), (x,), (x,))[1]), X)


def test_recording_does_not_import_the_compiler_of_torch() -> None:
    program = """
import sys, torch
from sparsify.recording.record import record
class Net(torch.nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0].add_(x.double()[:, 0]).clamp_(0, 1)
        return y
with torch.inference_mode():
    record(Net(), (torch.ones(2, 2),), {}).graph
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "False"
