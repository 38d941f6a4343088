"""Autocast that is switched on or off inside of forward: kernels compute in the model's dtypes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.api import sparsify
from sparsify.autocast import Autocast, autocast, autocast_as, autocast_off
from sparsify.checking.run_graph import run_graph
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.verification.model import verify
from tests.models.surrogates import FastSigmoid
from tests.models.zoo import tensors_of
from tests.networks.test_half_models import HALVES, HIDDEN, INPUTS, OUTPUTS, Recurrent, inputs

pytestmark = pytest.mark.usefixtures("quickly_compiled")

aten = torch.ops.aten


class SinglePrecisionNeurons(Recurrent):
    """The usual idiom: the input's product in a half, what the neuron adds up in float32.

    The recurrent product reads float32, which an autocast around would cast.
    """

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x:
            current = self.fc(x_t)
            with torch.autocast(x.device.type, enabled=False):
                v = self.decay * v + current.float() + self.rec(z.float())
                z = FastSigmoid.apply(v - 1.0)  # type: ignore[no-untyped-call]
                v = v - z.detach()
            votes.append(self.out(z))
        return torch.stack(votes).sum(0)


class Einsums(Recurrent):
    """Autocast casts the views that einsum makes."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x:
            v = self.decay * v + self.fc(x_t) + torch.einsum("bi,oi->bo", z, self.rec.weight)
            z = FastSigmoid.apply(v - 1.0)  # type: ignore[no-untyped-call]
            v = v - z.detach()
            votes.append(torch.einsum("oi,bi->bo", self.out.weight, z))
        return torch.stack(votes).sum(0)


class HalfProducts(Recurrent):
    """Autocast is on around one product only, whatever is around the model."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = []
        for x_t in x:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                fed_back = self.rec(z)
            v = self.decay * v + self.fc(x_t) + fed_back
            z = FastSigmoid.apply(v - 1.0)  # type: ignore[no-untyped-call]
            v = v - z.detach()
            votes.append(self.out(z))
        return torch.stack(votes).sum(0)


class Cast(torch.autograd.Function):
    """Spikes of a product that it computes in float32 itself, under whatever autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, v: Tensor, mixing: Tensor) -> Tensor:
        ctx.save_for_backward(v, mixing)
        return (v @ mixing > 0).to(v.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        v, mixing = ctx.saved_tensors
        return gradients[0] @ mixing.t(), v.t() @ gradients[0]


class Ambient(torch.autograd.Function):
    """Its product is cast by the autocast that ``apply`` is under, in backward too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return F.linear(z, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        z, weight = ctx.saved_tensors
        d = gradients[0].to(weight.dtype)
        return d @ weight, d.t() @ z


class OwnFunctions(Recurrent):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(HIDDEN) + torch.randn(HIDDEN, HIDDEN) / 20)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        weight = self.rec.weight * 1.5  # of a parameter, autocast would keep what it casts
        votes = []
        for x_t in x:
            fed_back = Ambient.apply(z, weight)  # type: ignore[no-untyped-call]
            v = self.decay * v + self.fc(x_t) + fed_back
            z = Cast.apply(v - 1.0, self.mixing)  # type: ignore[no-untyped-call]
            v = v - z.detach()
            votes.append(self.out(z))
        return torch.stack(votes).sum(0)


class Layers(nn.Module):
    """Recurrent layers of torch, with autocast and where it is off."""

    def __init__(self) -> None:
        super().__init__()
        self.events = nn.RNN(INPUTS, HIDDEN, nonlinearity="relu")
        self.cast, self.single = nn.GRU(HIDDEN, HIDDEN), nn.LSTM(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.events(x)
        y, _ = self.cast(y)
        with torch.autocast(x.device.type, enabled=False):
            y, _ = self.single(y.float())
        result: Tensor = self.out(y).sum(0)
        return result


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    if isinstance(model, Recurrent):
        with torch.no_grad():
            model.fc.weight.mul_(2.0)
    return model


def weight_dtypes(fast: Any) -> dict[str, str]:
    return {site.name: site.weight_dtype for site in fast.report.sites if site.weight_dtype}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_where_autocast_is_off_is_a_kernel_of_float32(dtype: torch.dtype) -> None:
    model, x = made(SinglePrecisionNeurons), inputs()
    half = str(dtype).removeprefix("torch.")
    fast: Any = sparsify(model, timing=False)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        fast(x)
        assert fast(x).dtype is model(x).dtype is dtype
        verify(model, fast, x, events=2)
    assert weight_dtypes(fast) == {"rec": "float32", "out": half}
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(fast(x).float(), torch.tensor([0, 1, 2]))
        checked = verify(model, fast, x, gradients=True, must_replace=True)
    torch.autograd.backward(loss)
    assert weight_dtypes(fast)["rec"] == weight_dtypes(fast)["rec.backward"] == "float32"
    assert {"rec.weight", "decay"} <= {figures.operand for figures in checked.gradients}


def test_gradients_are_the_same_if_backward_is_called_under_autocast() -> None:
    """Of eager they are not: there, products of float32 would be cast then."""
    found = []
    for is_inside in (False, True):
        model, x = made(SinglePrecisionNeurons), inputs()
        fast: Any = sparsify(model, timing=False)
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = fast(x).float().square().sum()
                if is_inside:
                    torch.autograd.backward(loss)
            if not is_inside:
                torch.autograd.backward(loss)
        decisions = [fast.report[name].decision for name in ("rec", "rec.backward")]
        assert "kept" not in decisions
        found.append([parameter.grad for parameter in model.parameters()])
    for outside, inside in zip(*found, strict=True):
        assert outside is not None and inside is not None
        assert torch.equal(outside, inside)


@pytest.mark.parametrize("around", [None, *HALVES])
def test_a_product_where_autocast_is_on_is_a_kernel_of_halves(around: torch.dtype | None) -> None:
    model, x = made(HalfProducts), inputs()
    with torch.no_grad(), nullcontext() if around is None else torch.autocast("cpu", dtype=around):
        fast: Any = sparsify(model, x, timing=False)
        assert fast(x).dtype is model(x).dtype
        verify(model, fast, x, events=2)
    assert weight_dtypes(fast)["rec"] == "bfloat16"
    other = "float32" if around is None else str(around).removeprefix("torch.")
    assert weight_dtypes(fast)["out"] == other


def test_own_functions_run_under_the_autocast_that_they_were_recorded_under() -> None:
    model, x, dtype = made(OwnFunctions), inputs(), torch.bfloat16
    fast: Any = sparsify(model, timing=False)
    for is_trained in (False, True):
        with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype=dtype):
            fast(x)
            assert fast(x).dtype is model(x).dtype is dtype
            verify(model, fast, x, gradients=is_trained, must_replace=True, most_undecided=0.01)
    assert weight_dtypes(fast)["rec"] == str(dtype).removeprefix("torch.")
    assert weight_dtypes(fast)["mixing"] == "float32"


@pytest.mark.parametrize(("dtype", "is_trained"), [*zip(HALVES, (False, True), strict=True)])
def test_recurrent_layers_beside_each_other(dtype: torch.dtype, is_trained: bool) -> None:
    model, x = made(Layers), inputs()
    fast: Any = sparsify(model, timing=False)
    with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype=dtype):
        fast(x)
        assert fast(x).dtype is model(x).dtype is dtype
        verify(model, fast, x, gradients=is_trained, events=1)
    sites = {site.name: site for site in fast.report.sites}
    assert sites["events.weight_hh_l0"].decision == "event"
    assert sites["cast.weight_hh_l0"].code == sites["single.weight_hh_l0"].code == "no-event"


@pytest.mark.parametrize(("dtype", "is_trained"), [*zip(HALVES, (True, False), strict=True)])
def test_einsum_is_one_product_of_halves(dtype: torch.dtype, is_trained: bool) -> None:
    model, x = made(Einsums), inputs()
    fast: Any = sparsify(model, timing=False)
    with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype=dtype):
        fast(x)
        verify(model, fast, x, gradients=is_trained, events=2)
    half = str(dtype).removeprefix("torch.")
    assert weight_dtypes(fast)["rec"] == weight_dtypes(fast)["out"] == half


class Pruned(nn.Module):
    """A recurrent layer of torch with one weight in ten."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(INPUTS, HIDDEN, **options)
        with torch.no_grad():
            for name, weight in self.layer.named_parameters():
                if "weight_h" in name:
                    weight.mul_(torch.rand(weight.shape) < 0.1)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


PRUNED: tuple[tuple[type[nn.RNNBase], torch.dtype, bool], ...] = (
    (nn.GRU, torch.bfloat16, False),
    (nn.GRU, torch.float16, True),
    (nn.LSTM, torch.bfloat16, True),
)


@pytest.mark.parametrize(("kind", "dtype", "is_trained"), PRUNED)
def test_pruned_layers_are_kernels(
    kind: type[nn.RNNBase], dtype: torch.dtype, is_trained: bool
) -> None:
    """Products are of halves. What a GRU keeps from step to step is float32."""
    model, x = Pruned(kind), inputs()
    fast: Any = sparsify(model, timing=False)
    with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype=dtype):
        fast(x)
        got, wanted = tensors_of(fast(x)), tensors_of(model(x))
        assert [t.dtype for t in got] == [t.dtype for t in wanted]
        verify(model, fast, x, gradients=is_trained, events=0, must_replace=True)
    site = fast.report["layer.weight_hh_l0"]
    assert (site.decision, site.weight_dtype) == ("dense", str(dtype).removeprefix("torch."))
    states = {s.dtype for view in fast.kernels.values() for s in view.kernel.states}
    assert ("float32" in states) or kind is nn.LSTM


def test_a_state_that_autocast_makes_another_dtype_is_refused() -> None:
    """The projection of an LSTM is a half, its cell is not."""
    model, x = Pruned(nn.LSTM, proj_size=8), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fast: Any = sparsify(model, x, timing=False)
        results = zip(tensors_of(fast(x)), tensors_of(model(x)), strict=True)
        assert all(torch.equal(got, wanted) for got, wanted in results)
    site = fast.report["layer.weight_hh_l0"]
    assert (site.decision, site.code) == ("kept", "unsupported-op")
    assert "Under autocast the states of nn.LSTM change their dtype" in site.reason
    assert "proj_size" in site.remedy


def recorded(model: nn.Module, x: Tensor) -> Recording:
    found = record(model, (x,), {})
    assert isinstance(found, Recording), found
    return found


def test_a_recorded_graph_runs_alike_under_any_autocast() -> None:
    """A layer that is recorded whole has the autocast that it ran under; so have Functions."""
    for kind in (SinglePrecisionNeurons, HalfProducts, OwnFunctions, Layers):
        model, x = made(kind), inputs()
        for is_trained in (False, True):
            with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype=torch.bfloat16):
                recording = recorded(model, x)
                operands = recording.calling.operands((x,), {})
                expected = model(x)
                with autocast_off():
                    (inside,) = run_graph(recording.graph, operands)
            with torch.set_grad_enabled(is_trained):
                (outside,) = run_graph(recording.graph, operands)
            assert torch.equal(inside, expected) and torch.equal(outside, expected)


def test_only_what_is_whole_is_recorded_with_its_autocast() -> None:
    model, x = made(Layers), inputs()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        targets = [node.target for node in recorded(model, x).graph.graph.nodes]
    settings = (("cpu", torch.bfloat16),)
    wholes = [target for target in targets if isinstance(target, Autocast)]
    assert wholes == [Autocast(aten.rnn_relu.input, settings), Autocast(aten.gru.input, settings)]
    assert aten.lstm.input in targets


def test_autocast_is_put_back() -> None:
    def all_off() -> bool:
        return autocast() == ()

    settings = (("cpu", torch.float16),)
    assert all_off()
    with autocast_as(settings):
        assert autocast() == settings
        with autocast_off():
            assert all_off()
        assert autocast() == settings
        with pytest.raises(ZeroDivisionError), autocast_off():
            _ = 1 / 0
        with autocast_as((("cpu", torch.bfloat16),)):
            assert autocast() == (("cpu", torch.bfloat16),)
        assert autocast() == settings
    assert all_off()
