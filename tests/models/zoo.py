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
from tests.models import zoo_convolutional as convolutional
from tests.models import zoo_feedforward as feedforward
from tests.models import zoo_gated as gated
from tests.models import zoo_pools as pools
from tests.models import zoo_pruned as pruned
from tests.models import zoo_rates as rates
from tests.models import zoo_recurrent as recurrent
from tests.models import zoo_snntorch as snntorch_nets
from tests.models import zoo_stateful as stateful
from tests.models.zoo_feedforward import HIDDEN, IN

BATCH = 3
EXACT_STEPS = 4


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    ``events``: the sites that read events and must run as such. ``code``: why no site can.
    ``gain`` scales the weights and ``bias`` shifts the biases to a realistic activity. ``layout``
    is the input's: time first ``[T, B, N]``, batch first ``[B, T, N]``, or one ``static`` vector
    ``[B, N]`` for all steps; ``rate`` is how much of a spike train is 1.
    ``grid`` is the power of two that dyadic weights are multiples of, None where the arithmetic
    cannot be exact (an exponential, a tanh). After ``recordings`` a graph must serve all sizes:
    two, and one more where the first call leaves an attribute behind, or where each length has a
    kernel of its own. ``on_cuda`` says whether CUDA has kernels for ``events``, too.
    """

    name: str
    build: Callable[[], nn.Module]
    events: tuple[str, ...] = ()
    code: RefusalCode | None = None
    gain: float = 1.5
    layout: str = "time first"
    rate: float = 0.2
    bias: float = 0.0
    grid: float | None = 2**-6
    keeps_state: bool = False
    recordings: int = 2
    on_cuda: bool = True

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
    Entry("step by step", feedforward.StepByStep, events=("fc2",)),
    Entry(
        "layer by layer",
        feedforward.LayerByLayer,
        events=("layers.2.linear", "layers.3.linear"),
        gain=2.2,
        layout="batch first",
    ),
    Entry(
        "convolved steps",
        convolutional.ConvolvedSteps,
        events=("conv2", "fc"),
        gain=0.6,
        on_cuda=False,
    ),
    Entry(
        "convolved layers, normed",
        convolutional.ConvolvedLayers,
        events=("conv2", "fc"),
        gain=0.9,
        grid=None,
        on_cuda=False,
    ),
    Entry(
        "strided maps",
        convolutional.StridedMaps,
        events=("conv2", "conv3"),
        gain=0.9,
        on_cuda=False,
    ),
    Entry(
        "recurrent maps",
        convolutional.RecurrentMaps,
        events=("recur",),
        gain=0.6,
        on_cuda=False,
    ),
    Entry("delayed reset", feedforward.DelayedReset, events=("fc2",)),
    Entry(
        "four deep", feedforward.FourDeep, events=("linears.1", "linears.2", "linears.3"), gain=2.2
    ),
    Entry("skip, no reset", feedforward.SkipNoReset, events=("b", "c", "skip"), recordings=3),
    Entry("in place", feedforward.InPlace, events=("fc2",), layout="batch first"),
    Entry("static image", feedforward.StaticImage, events=("fc2",), layout="static"),
    Entry(
        "current based",
        feedforward.CurrentBased,
        events=("w2",),
        layout="batch first",
        recordings=3,
    ),
    Entry("graded spikes", feedforward.GradedSpikes, events=("fc2",)),
    Entry("exponential decay", feedforward.ExpDecay, events=("fc2",), grid=None),
    Entry("recurrent", recurrent.Recurrent, events=("rec",)),
    Entry("recurrent, hoisted", recurrent.RecurrentHoisted, events=("rec", "out")),
    Entry("first step differs", recurrent.FirstStepDiffers, events=("rec",), layout="batch first"),
    Entry("feedback", recurrent.Feedback, events=("rec1", "down", "up", "rec2", "read")),
    Entry("free running", recurrent.FreeRunning, events=("inp", "rec", "predict", "read")),
    Entry("adaptive threshold", recurrent.Adaptive, events=("rec",)),
    Entry("straight-through sums", recurrent.SumSpikes, events=("rec",), grid=None),
    Entry("no self-connection", recurrent.NoSelfConnection, events=("w_rec",)),
    Entry("graded recurrent", recurrent.GradedRecurrent, events=("rec",), gain=1.0, grid=2**-3),
    Entry(
        "EGRU", lambda: gated.EGRU(zoneout=0.125), events=("rnns.0.recurrent_kernel",), grid=None
    ),
    Entry(
        "EGRU, two layers",
        lambda: gated.EGRU(2, trace=False),
        events=(
            "rnns.0.recurrent_kernel",
            "rnns.1.kernel",
            "rnns.1.recurrent_kernel",
            "decoder",
        ),
        grid=None,
    ),
    Entry(
        "EGRU, two exchanges",
        gated.TwoExchangeEGRU,
        events=("gates", "candidate"),
        grid=None,
    ),
    Entry(
        "EGRU, joined operands",
        gated.JoinedEGRU,
        events=("gates", "candidate"),
        grid=None,
        layout="batch first",
    ),
    Entry("EGRU of eighths", gated.QuantisedEGRU, events=("recur",), grid=2**-3),
    Entry(
        "GRUCell, thresholded",
        lambda: gated.ThresholdedCell(nn.GRUCell(IN, HIDDEN)),
        events=("cell.weight_hh",),
        grid=None,
    ),
    Entry(
        "LSTMCell, thresholded",
        lambda: gated.ThresholdedCell(nn.LSTMCell(IN, HIDDEN)),
        events=("cell.weight_hh",),
        grid=None,
    ),
    Entry("normed currents", pools.NormedCurrents, events=("rec",), grid=None),
    Entry("inhibitory pool", pools.InhibitoryPool, events=("rec", "to_pool", "out")),
    Entry("homeostatic", pools.Homeostatic, events=("rec",), grid=None),
    Entry("EGRU, normed", pools.NormedEGRU, events=("rec",), grid=None),
    Entry("gates in place", gated.InPlaceGates, events=("recur",), grid=2**-3),
    Entry("resets itself", stateful.ResetsItself, events=("net.2", "net.4"), recordings=3),
    Entry("buffer state", lambda: stateful.BufferState(BATCH), events=("rec",), keeps_state=True),
    Entry("tuple state", stateful.TupleState, events=("recurrent_weights",)),
    Entry("dict state", stateful.DictState, events=("layers.high",), layout="batch first"),
    Entry("relu by hand", rates.ReluRNN, events=("h2h", "h2o"), bias=-1.0, grid=2**-2),
    Entry(
        "nn.RNN relu",
        lambda: rates.TorchRNN(nn.RNN(IN, HIDDEN, nonlinearity="relu")),
        events=("rnn.weight_hh_l0", "fc"),
        bias=-0.5,
        grid=2**-2,
    ),
    Entry(
        "nn.RNN relu, two layers",
        lambda: rates.TorchRNN(
            nn.RNN(IN, HIDDEN, num_layers=2, nonlinearity="relu", batch_first=True)
        ),
        events=("rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1", "fc"),
        bias=-0.4,
        grid=2**-2,
        layout="batch first",
    ),
    Entry("LISTA", rates.LISTA, events=("lateral",), layout="static", gain=0.5, grid=2**-3),
    Entry(
        "soft-threshold video",
        rates.SoftThresholdVideo,
        events=("keep", "decode"),
        gain=0.8,
        layout="batch first",
        grid=2**-3,
    ),
    Entry(
        "snnTorch, static",
        snntorch_nets.StaticNet,
        events=("fc2",),
        layout="static",
        recordings=3,
    ),
    Entry(
        "snnTorch, spike trains",
        snntorch_nets.SpikingInputNet,
        events=("fc2",),
        recordings=3,
    ),
    Entry(
        "snnTorch, RLeaky",
        snntorch_nets.RecurrentNet,
        events=("rlif.recurrent", "fc2"),
        recordings=3,
    ),
    Entry(
        "snnTorch, Synaptic",
        snntorch_nets.SynapticNet,
        events=("fc2",),
        recordings=3,
    ),
    Entry(
        "nn.GRU, pruned",
        lambda: rates.TorchRNN(pruned.pruned(nn.GRU(IN, HIDDEN), "weight_hh_l0", "weight_ih_l0")),
        events=("rnn.weight_hh_l0", "rnn.weight_ih_l0"),
        grid=None,
    ),
    Entry(
        "nn.LSTM, pruned",
        lambda: rates.TorchRNN(
            pruned.pruned(nn.LSTM(IN, HIDDEN, batch_first=True), "weight_hh_l0")
        ),
        events=("rnn.weight_hh_l0",),
        grid=None,
        layout="batch first",
    ),
    Entry(
        "nn.RNN tanh, pruned",
        lambda: rates.TorchRNN(pruned.pruned(nn.RNN(IN, HIDDEN), "weight_hh_l0")),
        events=("rnn.weight_hh_l0",),
        grid=None,
    ),
    Entry("GRUCell, pruned", pruned.gru_cells, events=("cell.weight_hh",), grid=None),
    Entry("tanh by hand", rates.TanhRNN, code="no-event", grid=None),
    Entry(
        "nn.RNN tanh",
        lambda: rates.TorchRNN(nn.RNN(IN, HIDDEN)),
        code="no-event",
        grid=None,
    ),
    Entry(
        "nn.GRU",
        lambda: rates.TorchRNN(nn.GRU(IN, HIDDEN)),
        code="no-event",
        grid=None,
    ),
    Entry(
        "nn.LSTM",
        lambda: rates.TorchRNN(nn.LSTM(IN, HIDDEN, batch_first=True)),
        code="no-event",
        grid=None,
        layout="batch first",
    ),
)
