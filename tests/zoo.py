"""The zoo: networks as people write them, with inputs and what is expected of each.

Every entry exists with real-valued weights and, where its arithmetic allows, in a dyadic variant:
weights and inputs are small integers times a power of two and few steps are run, so that sums are
exact in any order and results must be equal, not close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.errors import RefusalCode
from tests import zoo_feedforward as feedforward
from tests import zoo_rates as rates
from tests import zoo_recurrent as recurrent
from tests import zoo_snntorch as snntorch_nets
from tests import zoo_stateful as stateful
from tests.zoo_feedforward import HIDDEN, IN

BATCH = 3
EXACT_STEPS = 4


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    ``events``: how many products read events and can run as such. ``code``: why nothing can.
    ``gain`` scales the weights and ``bias`` shifts the biases to a realistic activity. ``layout``
    is the input's: time first ``[T, B, N]``, batch first ``[B, T, N]``, or one ``static`` vector
    ``[B, N]`` for all steps; ``rate`` is how much of a spike train is 1.
    ``grid`` is the power of two that dyadic weights are multiples of, None where the arithmetic
    cannot be exact (an exponential, a tanh). Without ``doubles`` the network itself insists on
    float32.
    """

    name: str
    build: Callable[[], nn.Module]
    events: int
    code: RefusalCode | None = None
    gain: float = 1.5
    layout: str = "time first"
    rate: float = 0.2
    bias: float = 0.0
    grid: float | None = 2**-6
    keeps_state: bool = False
    doubles: bool = True

    @property
    def is_static(self) -> bool:
        return self.layout == "static"

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network in eval mode with real-valued weights."""
        return fill_weights(self.build(), self.gain, self.bias, None).to(dtype).eval()

    def dyadic_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        assert self.grid is not None, self.name
        return fill_weights(self.build(), self.gain, self.bias, self.grid).to(dtype).eval()

    def inputs(
        self, steps: int = 12, batch: int = BATCH, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Spike trains, or a static vector of multiples of 1/8."""
        generator = torch.Generator().manual_seed(steps * 1000 + batch)
        if self.is_static:
            return (torch.randint(0, 9, (batch, IN), generator=generator) / 8).to(dtype)
        sizes = (batch, steps, IN) if self.layout == "batch first" else (steps, batch, IN)
        return (torch.rand(sizes, generator=generator) < self.rate).to(dtype)


def fill_weights(model: nn.Module, gain: float, bias: float, grid: float | None) -> nn.Module:
    """Draw matrices with spread ``gain / sqrt(fan-in)`` and biases, on ``grid`` if given."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_bias = "bias" in name
            if parameter.dim() < 2 and not is_bias:
                continue  # decays, thresholds: as the network sets them
            spread = 0.1 * gain if is_bias else gain / parameter.shape[-1] ** 0.5
            drawn = torch.randn(parameter.shape, generator=generator) * spread + is_bias * bias
            parameter.copy_(drawn if grid is None else torch.round(drawn / grid) * grid)
    return model


def tensors_of(result: object) -> Iterator[Tensor]:
    """The tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        yield result
        return
    assert isinstance(result, (tuple, list, dict)), type(result)
    for value in result.values() if isinstance(result, dict) else result:
        yield from tensors_of(value)


ENTRIES = (
    Entry("step by step", feedforward.StepByStep, events=1),
    Entry("layer by layer", feedforward.LayerByLayer, events=2, gain=2.2, layout="batch first"),
    Entry("delayed reset", feedforward.DelayedReset, events=1),
    Entry("four deep", feedforward.FourDeep, events=3, gain=2.2),
    Entry("skip, no reset", feedforward.SkipNoReset, events=3),
    Entry("in place", feedforward.InPlace, events=1, layout="batch first"),
    Entry("static image", feedforward.StaticImage, events=1, layout="static"),
    Entry("current based", feedforward.CurrentBased, events=1, layout="batch first"),
    Entry("graded spikes", feedforward.GradedSpikes, events=1),
    Entry("exponential decay", feedforward.ExpDecay, events=1, grid=None),
    Entry("recurrent", recurrent.Recurrent, events=1),
    Entry("recurrent, hoisted", recurrent.RecurrentHoisted, events=2),
    Entry("first step differs", recurrent.FirstStepDiffers, events=1, layout="batch first"),
    Entry("feedback", recurrent.Feedback, events=5),
    Entry("adaptive threshold", recurrent.Adaptive, events=1),
    Entry("straight-through sums", recurrent.SumSpikes, events=0, code="no-event", grid=None),
    Entry("no self-connection", recurrent.NoSelfConnection, events=1),
    Entry("graded recurrent", recurrent.GradedRecurrent, events=1, gain=1.0, grid=2**-3),
    Entry("resets itself", stateful.ResetsItself, events=2),
    Entry("buffer state", lambda: stateful.BufferState(BATCH), events=1, keeps_state=True),
    Entry("tuple state", stateful.TupleState, events=1),
    Entry("dict state", stateful.DictState, events=1, layout="batch first"),
    Entry("relu by hand", rates.ReluRNN, events=2, bias=-1.0, grid=2**-2),
    Entry(
        "nn.RNN relu",
        lambda: rates.TorchRNN(nn.RNN(IN, HIDDEN, nonlinearity="relu")),
        events=2,
        bias=-0.5,
        grid=2**-2,
    ),
    Entry(
        "nn.RNN relu, two layers",
        lambda: rates.TorchRNN(
            nn.RNN(IN, HIDDEN, num_layers=2, nonlinearity="relu", batch_first=True)
        ),
        events=4,
        bias=-0.4,
        grid=2**-2,
        layout="batch first",
    ),
    Entry("LISTA", rates.LISTA, events=1, layout="static", gain=0.5, grid=2**-3),
    Entry(
        "soft-threshold video",
        rates.SoftThresholdVideo,
        events=2,
        gain=0.8,
        layout="batch first",
        grid=2**-3,
    ),
    Entry("snnTorch, static", snntorch_nets.StaticNet, events=1, layout="static", doubles=False),
    Entry("snnTorch, spike trains", snntorch_nets.SpikingInputNet, events=1, doubles=False),
    Entry("snnTorch, RLeaky", snntorch_nets.RecurrentNet, events=2, doubles=False),
    Entry("tanh by hand", rates.TanhRNN, events=0, code="no-event", grid=None),
    Entry(
        "nn.RNN tanh",
        lambda: rates.TorchRNN(nn.RNN(IN, HIDDEN)),
        events=0,
        code="no-event",
        grid=None,
    ),
    Entry(
        "nn.GRU",
        lambda: rates.TorchRNN(nn.GRU(IN, HIDDEN)),
        events=0,
        code="no-event",
        grid=None,
    ),
    Entry(
        "nn.LSTM",
        lambda: rates.TorchRNN(nn.LSTM(IN, HIDDEN, batch_first=True)),
        events=0,
        code="no-event",
        grid=None,
        layout="batch first",
    ),
)
