"""The time of a step of inference: our kernels, every peer, and the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_attempts import FAULTS
from gpu_machine import median_ms, release
from gpu_ours import CHOSEN, chosen, variants
from gpu_peers import EAGER, Function, cudnn_layers, graphed, graphed_peers, hoisted
from gpu_place import Place
from networks import FeedForward, Recurrent, spike_trains
from torch import Tensor, nn
from training_networks import EGRULayer

from sparsify.errors import SparsifyError

INPUTS, INPUT_RATE = 700, 0.02
CALIBRATION = (40, 16)  # steps and samples on which thresholds are chosen
EXACT = ("lif", "feed-forward")  # their sums are exact in any order, so spikes are equal
FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, SparsifyError)
"""What a row reports and goes on after: of torch, of a check, of us."""


@dataclass(frozen=True)
class Forward:
    """What is measured.

    ``network`` is ``lif``, ``egru``, the same of float16 ``egru-half``, ``feed-forward`` or
    ``convolutional``.
    """

    network: str
    hidden: int
    batch: int
    activity: float
    steps: int = 100
    inputs: int = INPUTS


def measure_forward(place: Place, case: Forward, rounds: int) -> dict[str, Any]:
    """A row: microseconds a step of everything, in interleaved rounds, and what failed."""
    with place.device, torch.no_grad():
        torch.manual_seed(0)
        model, x = make_network(case)
        expected = model(x)
        active = float((expected != 0).float().mean())
        makers, predicted = _makers(place, case, model, x)
        made, failed = _make(place, makers, x, expected, exact=case.network in EXACT)
        made |= _layers(case, x) if case.network in ("lif", "egru") else {}
        times = median_ms(place, made, x, rounds)
    step_us = {name: 1e3 * times[name] / case.steps for name in made}
    release()
    return {
        **asdict(case),
        "measured_activity": active,
        "us_per_step": step_us,
        "predicted_us_per_step": {n: 1e3 * ms / case.steps for n, ms in predicted.items()},
        "failed": failed,
    }


def make_network(case: Forward) -> tuple[Any, Tensor]:
    """The calibrated network and its input ``[T, B, ...]`` on the default device."""
    trains = spike_trains(case.steps, case.batch, case.inputs, INPUT_RATE)
    if case.network == "egru":
        return _make_egru(case)
    if case.network == "egru-half":
        model, x = _make_egru(case)
        return model.half(), x.half()
    if case.network == "convolutional":
        return _make_convolutional(case)
    model = (Recurrent if case.network == "lif" else FeedForward)(case.inputs, case.hidden).eval()
    model.calibrate(spike_trains(*CALIBRATION, case.inputs, INPUT_RATE), case.activity)
    return model, trains


def _make_egru(case: Forward) -> tuple[nn.Module, Tensor]:
    """One layer that reads another one's events."""
    layer = EGRULayer(case.hidden, case.hidden).eval()
    shape = (case.steps, case.batch, case.hidden)
    x = torch.randn(shape) * (torch.rand(shape) < case.activity)
    low, high = 0.0, 1.0
    for _ in range(10):
        layer.theta.fill_((low + high) / 2)
        if float((layer(x[:40, :16]) != 0).float().mean()) > case.activity:
            low = (low + high) / 2
        else:
            high = (low + high) / 2
    return layer, x


class Convolutional(nn.Module):
    """Two convolutions with leaky neurons behind them, and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, stride=2, bias=False)
        self.out = nn.Linear(channels * 16 * 16, 10, bias=False)
        self.theta = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[T, B, 10]`` of events ``[T, B, 2, 32, 32]``."""
        v = w = torch.zeros(1, device=x.device)
        logits = []
        for x_t in x:
            v = 0.9 * v + self.first(x_t)
            z = (v > self.theta).to(v.dtype)
            v = v - z * self.theta
            w = 0.9 * w + self.second(z)
            s = (w > self.theta).to(w.dtype)
            w = w - s * self.theta
            logits.append(self.out(s.flatten(1)))
        return torch.stack(logits)


def _make_convolutional(case: Forward) -> tuple[nn.Module, Tensor]:
    x = (torch.rand(case.steps, case.batch, 2, 32, 32) < case.activity).float()
    model = Convolutional(case.hidden).eval()
    for conv in (model.first, model.second):
        conv.weight.mul_(4)
    return model, x


def _makers(
    place: Place, case: Forward, model: Any, x: Tensor
) -> tuple[dict[str, Callable[[], Function]], dict[str, float]]:
    """How to make everything that is compared, and what is predicted of our kernels."""
    makers: dict[str, Callable[[], Function]] = {EAGER: lambda: model}
    if place.is_gpu:
        best = hoisted(model) if case.network in ("lif", "feed-forward") else model
        makers |= graphed_peers(best, x)
    makers[CHOSEN] = partial(chosen, place, model, x)
    predicted: dict[str, float] = {}
    try:
        place.attempts.begin("our kernels")  # of which one runs so that it counts its events
        for variant in variants(place, model, x):
            makers[variant.name] = partial(_same, variant.module)
            predicted[variant.name] = variant.predicted_ms
    except FAULTS:
        raise
    except FAILURES as error:
        makers["our kernels"] = partial(_fail, error)
    if place.is_gpu:
        makers[f"{CHOSEN}, graphed"] = lambda: graphed(chosen(place, model, x), x)
    return makers, predicted


def _fail(error: Exception) -> Function:
    raise error


def _same(module: Function) -> Function:
    return module


def _make(
    place: Place,
    makers: Mapping[str, Callable[[], Function]],
    x: Tensor,
    expected: Tensor,
    exact: bool,
) -> tuple[dict[str, Function], dict[str, str]]:
    """What runs and gives the right result, and why the others do not."""
    made, failed = {}, {}
    for name, make in makers.items():
        try:
            place.attempts.begin(name)
            function = make()
            check_output(function(x), expected, exact)
        except FAULTS:
            raise
        except FAILURES as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:400]}"
            continue
        made[name] = function
    place.attempts.end()
    return made, failed


def check_output(output: Tensor, expected: Tensor, exact: bool) -> None:
    """Spikes are equal where sums are exact; the others are as many as two draws would be."""
    if exact:
        differ = int((output != expected).sum())
        assert not differ, f"{differ} of {expected.numel()} values differ from eager's"
        return
    # One flip of rounding sends a network another way: the counts of two runs then differ as
    # two draws do, by about the square root; six of them is never seen by chance.
    count, other = float((expected != 0).sum()), float((output != 0).sum())
    assert abs(other - count) <= 6 * count**0.5, f"{other:.0f} events, not {count:.0f}"


def _layers(case: Forward, x: Tensor) -> dict[str, Function]:
    return {name: layer.eval() for name, layer in cudnn_layers(x.shape[2], case.hidden).items()}
