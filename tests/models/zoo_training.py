"""Networks as people train them: event-based gated units, and neurons with learnable parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.zoo_feedforward import HIDDEN, IN, OUT
from tests.models.zoo_surrogates import ATan, FastSigmoid, Window

TOKENS = 11


class EventGate(torch.autograd.Function):
    """1 above threshold; a triangle of half-width ``1 / epsilon`` is its gradient (EvNN)."""

    gamma, epsilon = 0.7, 1.0

    @staticmethod
    def forward(ctx: Any, above: Tensor) -> Tensor:
        ctx.save_for_backward(above)
        return (above > 0).to(above.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (above,) = ctx.saved_tensors
        slope = EventGate.gamma * torch.relu(1 - EventGate.epsilon * above.abs())
        result: Tensor = grad * slope
        return result


class EGRULayer(nn.Module):
    """The EvNN form: input products of all steps at once, one exchange of events per step.

    ``zoneout`` is the chance that a unit keeps its state in training; its mean applies in eval.
    Thresholds are kept between 0 and 1, by a write as in EvNN or in the forward's arithmetic.
    """

    def __init__(
        self, inputs: int, hidden: int, zoneout: float = 0.0, in_place: bool = False
    ) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, 3 * hidden)
        self.rec = nn.Linear(hidden, 3 * hidden)
        self.theta = nn.Parameter(torch.linspace(0.05, 0.4, hidden))
        self.zoneout, self.in_place = zoneout, in_place

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[T, B, hidden]`` and their exponential trace."""
        if self.in_place:
            self.theta.data.clamp_(0, 1)
        theta = self.theta if self.in_place else self.theta.clamp(0, 1)
        h = y = trace = x.new_zeros(x.shape[1], self.theta.shape[0])
        outputs, traces = [], []
        for p in self.inp(x):
            p_z, p_r, p_g = p.chunk(3, dim=1)
            q_z, q_r, q_g = self.rec(y).chunk(3, dim=1)
            z = torch.sigmoid(p_z + q_z)
            r = torch.sigmoid(p_r + q_r)
            g = torch.tanh(p_g + r * q_g)
            c = z * h + (1 - z) * g
            if self.zoneout:
                keep: Tensor | float = self.zoneout
                if self.training:
                    keep = torch.bernoulli(torch.full_like(c, self.zoneout))
                c = keep * h + (1 - keep) * c
            o = EventGate.apply(c - theta)
            y = o * c
            h = c - o * theta
            trace = 0.9 * trace + 0.1 * y
            outputs.append(y)
            traces.append(trace)
        return torch.stack(outputs), torch.stack(traces)


class EGRU(nn.Module):
    """One layer over real-valued input; the read-out takes the trace."""

    def __init__(self, zoneout: float = 0.0, in_place: bool = False) -> None:
        super().__init__()
        self.layer = EGRULayer(IN, HIDDEN, zoneout, in_place)
        self.read = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.read(self.layer(x)[1])
        return logits


class EGRULanguageModel(nn.Module):
    """Tokens ``[T, B]`` through an embedding and three layers of events."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, IN)
        self.layers = nn.ModuleList(EGRULayer(size, HIDDEN) for size in (IN, HIDDEN, HIDDEN))
        self.decode = nn.Linear(HIDDEN, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        logits: Tensor = self.decode(x)
        return logits


class TwoExchangeEGRU(nn.Module):
    """The paper's form: the candidate reads r * y, so units exchange events twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.u = nn.Linear(IN + HIDDEN, HIDDEN)
        self.r = nn.Linear(IN + HIDDEN, HIDDEN)
        self.z_in = nn.Linear(IN, HIDDEN)
        self.z_rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.theta = nn.Parameter(torch.full((HIDDEN,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        c = y = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for x_t in x:
            both = torch.cat([x_t, y], dim=1)
            u = torch.sigmoid(self.u(both))
            r = torch.sigmoid(self.r(both))
            z = torch.tanh(self.z_in(x_t) + self.z_rec(r * y))
            c = u * z + (1 - u) * c - y
            y = c * EventGate.apply(c - self.theta)
            outputs.append(y)
        return torch.stack(outputs)


class Dropping(nn.Module):
    """Two layers; each step has masks of its own, on spikes and on recurrent currents."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.up = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, OUT)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        v = u = z = x.new_zeros(x.shape[1], HIDDEN)
        outputs = []
        for x_t in x:
            v = 0.9 * v + self.inp(x_t) + self.dropout(self.rec(z))
            z = ATan.apply(v - 1, 2.0)
            v = v - z.detach()
            u = 0.9 * u + self.up(self.dropout(z))
            y = ATan.apply(u - 1, 2.0)
            u = u - y.detach()
            outputs.append(self.read(self.dropout(y)))
        return torch.stack(outputs)


class Encoded(nn.Module):
    """A noisy layer that is shown ``[B, N]`` as random spikes, as by spikingjelly's encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, OUT)

    def forward(self, image: Tensor) -> Tensor:
        v = z = image.new_zeros(image.shape[0], HIDDEN)
        votes: Tensor | float = 0.0
        for _ in range(9):
            x = torch.rand_like(image).le(image).to(image)
            v = 0.8 * v + self.inp(x) + self.rec(z) + 0.1 * torch.randn_like(v)
            z = ATan.apply(v - 1, 2.0)
            v = v - z.detach()
            votes = votes + self.read(z)
        assert isinstance(votes, Tensor)
        return votes


class LearnableNeuron(nn.Module):
    """Decay and threshold of every neuron are learnt; the reset passes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, OUT)
        self.decay = nn.Parameter(torch.linspace(0.3, 1.1, HIDDEN))
        self.threshold = nn.Parameter(torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        votes = x.new_zeros(x.shape[1], OUT)
        for x_t in x:
            v = self.decay.clamp(0, 1) * v + self.inp(x_t) + self.rec(z)
            z = ATan.apply(v - self.threshold, 2.0)
            v = v - z.detach() * self.threshold
            votes = votes + self.read(z)
        return votes


class SecondOrder(nn.Module):
    """A synaptic current with its own learnable decay before the membrane; a compact window."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN)
        self.alpha = nn.Parameter(torch.tensor(0.6))
        self.beta = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        v = i = z = x.new_zeros(x.shape[1], HIDDEN)
        spikes, voltages = [], []
        for x_t in x:
            i = self.alpha * i + self.inp(x_t) + self.rec(z)
            v = self.beta * v * (1 - z) + (1 - self.beta) * i
            z = Window.apply(v - 0.4, 0.4)
            spikes.append(z)
            voltages.append(v)
        return torch.stack(spikes), torch.stack(voltages)


class LearnableAdaptation(nn.Module):
    """ALIF with learnable time constant and strength of its adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.rho = nn.Parameter(torch.full((HIDDEN,), 0.9))
        self.kappa = nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor) -> Tensor:
        v = a = z = x.new_zeros(x.shape[1], HIDDEN)
        spikes = []
        for x_t in x:
            a = self.rho * a + (1 - self.rho) * z
            v = 0.8 * v + self.inp(x_t) + self.rec(z) - z
            z = FastSigmoid.apply(v - 1 - self.kappa * a)
            spikes.append(z)
        return torch.stack(spikes)


class Homeostatic(nn.Module):
    """The threshold follows the mean rate, which is tracked without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        rate = torch.zeros_like(z)
        spikes = []
        for x_t in x:
            v = 0.8 * v + self.inp(x_t) + self.rec(z)
            z = FastSigmoid.apply(v - 1 - rate)
            v = v - z
            with torch.no_grad():
                rate = 0.9 * rate + 0.1 * z
            spikes.append(z)
        return torch.stack(spikes)


class CarriedState(nn.Module):
    """Takes the state of the chunk before and returns its own: truncated back-propagation."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(IN, HIDDEN)
        self.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.read = nn.Linear(HIDDEN, OUT)

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(x.shape[1], HIDDEN)
        return zeros, zeros

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        v, z = state
        logits = []
        for x_t in x:
            v = 0.8 * v + self.inp(x_t) + self.rec(z)
            z = FastSigmoid.apply(v - 1)
            v = v - z
            logits.append(self.read(z))
        return torch.stack(logits), (v, z)
