"""The networks that training is tested on, with inputs and the sites that kernels must train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify.errors import RefusalCode
from tests.models import zoo_feedforward as feedforward
from tests.models import zoo_rates as rates
from tests.models import zoo_recurrent as recurrent
from tests.models import zoo_stateful as stateful
from tests.models import zoo_training as training
from tests.models.zoo import ENTRIES, Entry, fill_weights
from tests.models.zoo_feedforward import HIDDEN, IN

BATCH, STEPS = 3, 9


@dataclass(frozen=True)
class TrainingNet:
    """A network that is trained.

    ``sites`` are the products that kernels must run in forward and differentiate in backward.
    ``layout`` is the input's: ``time first`` ``[T, B, N]``, ``batch first``, ``static`` ``[B, N]``
    or ``tokens`` ``[T, B]`` of int64. ``gain`` and ``bias`` set the activity, as in the zoo.
    ``mode`` is the module's: networks with dropout or zoneout draw random numbers in training.
    ``code`` is why kernels can run no site, None if they can, ``on_cuda`` whether CUDA has kernels
    for the sites, too.
    """

    name: str
    build: Callable[[], nn.Module]
    sites: tuple[str, ...]
    gain: float = 1.5
    bias: float = 0.0
    layout: str = "time first"
    mode: str = "train"
    code: RefusalCode | None = None
    on_cuda: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        model = fill_weights(self.build(), self.gain, self.bias, None).to(dtype)
        return model.train(self.mode == "train")

    def inputs(
        self, steps: int = STEPS, batch: int = BATCH, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Spike trains that fire in a fifth of all steps, or tokens."""
        generator = torch.Generator().manual_seed(steps * 1000 + batch)
        if self.layout == "tokens":
            return torch.randint(0, training.TOKENS, (steps, batch), generator=generator)
        if self.layout == "static":
            return torch.rand(batch, IN, generator=generator, dtype=dtype)
        sizes = (batch, steps, IN) if self.layout == "batch first" else (steps, batch, IN)
        return (torch.rand(sizes, generator=generator) < 0.2).to(dtype)


def layer_by_layer() -> nn.Module:
    """Without its dropout, which draws random numbers in training."""
    model = feedforward.LayerByLayer()
    model.layers[1] = nn.Identity()
    return model


NETS = (
    TrainingNet("step by step", feedforward.StepByStep, ("fc2",)),
    TrainingNet("delayed reset", feedforward.DelayedReset, ("fc2",)),
    TrainingNet(
        "four deep", feedforward.FourDeep, ("linears.1", "linears.2", "linears.3"), gain=2.2
    ),
    TrainingNet("skip, no reset", feedforward.SkipNoReset, ("b", "c", "skip")),
    TrainingNet("static image", feedforward.StaticImage, ("fc2",), layout="static"),
    TrainingNet("current based", feedforward.CurrentBased, ("w2",), layout="batch first"),
    TrainingNet("graded spikes", feedforward.GradedSpikes, ("fc2",)),
    TrainingNet("exponential decay", feedforward.ExpDecay, ("fc2",)),
    TrainingNet(
        "layer by layer",
        layer_by_layer,
        ("layers.2.linear", "layers.3.linear"),
        gain=2.2,
        layout="batch first",
    ),
    TrainingNet("recurrent", recurrent.Recurrent, ("rec",)),
    TrainingNet("dropout in every step", training.Dropping, ("rec", "up", "read")),
    TrainingNet("Poisson encoder", training.Encoded, ("inp", "rec"), layout="static"),
    TrainingNet("recurrent, hoisted", recurrent.RecurrentHoisted, ("rec", "out")),
    TrainingNet("first step differs", recurrent.FirstStepDiffers, ("rec",), layout="batch first"),
    TrainingNet("feedback", recurrent.Feedback, ("rec1", "down", "up", "rec2", "read")),
    TrainingNet("adaptive threshold", recurrent.Adaptive, ("rec",)),
    TrainingNet("graded recurrent", recurrent.GradedRecurrent, ("rec",), gain=1.0),
    TrainingNet("straight-through sums", recurrent.SumSpikes, ("rec",)),
    TrainingNet("resets itself", stateful.ResetsItself, ("net.2", "net.4")),
    TrainingNet("dict state", stateful.DictState, ("layers.high",), layout="batch first"),
    TrainingNet("relu by hand", rates.ReluRNN, ("h2h", "h2o"), bias=-1.0),
    TrainingNet(
        "nn.RNN relu",
        lambda: rates.TorchRNN(nn.RNN(IN, HIDDEN, nonlinearity="relu")),
        ("rnn.weight_hh_l0", "fc"),
        bias=-0.5,
    ),
    TrainingNet("LISTA", rates.LISTA, ("lateral",), layout="static", gain=0.5),
    TrainingNet("EGRU of EvNN", training.EGRU, ("layer.rec",)),
    TrainingNet("EGRU, clamped in place", lambda: training.EGRU(in_place=True), ("layer.rec",)),
    TrainingNet("EGRU, zoneout", lambda: training.EGRU(0.1), ("layer.rec",)),
    TrainingNet("EGRU, zoneout in eval", lambda: training.EGRU(0.1), ("layer.rec",), mode="eval"),
    TrainingNet(
        "EGRU language model",
        training.EGRULanguageModel,
        ("layers.0.rec", "layers.1.rec", "layers.2.rec", "layers.1.inp", "layers.2.inp", "decode"),
        layout="tokens",
    ),
    TrainingNet("EGRU, learnt threshold", training.TwoExchangeEGRU, ("u", "r", "z_rec")),
    TrainingNet("learnable neuron", training.LearnableNeuron, ("rec", "read")),
    TrainingNet("second order", training.SecondOrder, ("rec",), gain=3.0),
    TrainingNet("learnable adaptation", training.LearnableAdaptation, ("rec",)),
    TrainingNet("homeostatic", training.Homeostatic, ("rec",)),
)

# Networks of the zoo whose results do not depend on anything in a differentiable way: their spikes
# are comparisons.
WITHOUT_GRADIENTS = ("in place", "no self-connection", "gates in place", "buffer state")
IN_FLOAT32 = (
    "snnTorch, static",
    "snnTorch, spike trains",
    "snnTorch, RLeaky",
    "snnTorch, Synaptic",
)
ROUNDED = "EGRU of eighths"  # weights and inputs have gradients that are zero, by ``round``
# Where training differs from inference: the sites that kernels run, and why they run none.
IN_TRAINING: dict[str, tuple[tuple[str, ...], RefusalCode | None]] = {
    "tanh by hand": (("inp", "rec"), None),  # nothing is silent, but the dense loop is fused
    # The gradient of a convolution of the own state has no kernel.
    "recurrent maps": ((), "unsupported-layout"),
}


def from_zoo(entry: Entry) -> TrainingNet:
    """As the zoo has it; its EGRU draws random numbers in training."""
    sites, code = IN_TRAINING.get(entry.name, (entry.events, entry.code))
    return TrainingNet(
        entry.name,
        entry.build,
        sites,
        entry.gain,
        entry.bias,
        entry.layout,
        "eval" if entry.name == "EGRU" else "train",
        code,
        entry.on_cuda,
    )


ELSEWHERE = {each.name for each in NETS} | {*WITHOUT_GRADIENTS, *IN_FLOAT32}
# All others of the zoo.
ZOO_NETS = tuple(from_zoo(entry) for entry in ENTRIES if entry.name not in ELSEWHERE)


def net(name: str) -> TrainingNet:
    return next(each for each in NETS if each.name == name)
