"""Feed-forward spiking networks, each as somebody would write it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo_surrogates import ATan, FastSigmoid, Graded, Triangle

IN, HIDDEN, OUT = 24, 48, 10


class StepByStep(nn.Module):
    """Two layers, all of a step before the next one; soft reset at once."""

    def __init__(self, beta: float = 0.75) -> None:
        super().__init__()
        self.beta = beta
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, OUT)
        self.spike = FastSigmoid.apply

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = torch.zeros(x.size(1), HIDDEN, dtype=x.dtype)
        mem2 = torch.zeros(x.size(1), OUT, dtype=x.dtype)
        spk_rec, mem_rec = [], []
        for step in range(x.size(0)):
            mem1 = self.beta * mem1 + self.fc1(x[step])
            spk1 = self.spike(mem1 - 1.0)
            mem1 = mem1 - spk1
            mem2 = self.beta * mem2 + self.fc2(spk1)
            spk2 = self.spike(mem2 - 1.0)
            mem2 = mem2 - spk2
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec, dim=0), torch.stack(mem_rec, dim=0)


class LIFLayer(nn.Module):
    """A whole sequence through one layer; hard reset by multiplication."""

    def __init__(self, inputs: int, neurons: int, tau: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, neurons, bias=False)
        self.tau = tau
        self.surrogate = Triangle()

    def forward(self, x: Tensor) -> Tensor:
        current = self.linear(x)
        v = torch.zeros_like(current[:, 0])
        out = []
        for t in range(current.shape[1]):
            v = v + (current[:, t] - v) / self.tau
            s = self.surrogate(v - 0.5)
            v = v * (1 - s)
            out.append(s)
        return torch.stack(out, dim=1)


class LayerByLayer(nn.Module):
    """Layers in a Sequential over ``[B, T, N]``; rates of the last one are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            LIFLayer(IN, HIDDEN),
            nn.Dropout(0.2),
            LIFLayer(HIDDEN, HIDDEN),
            LIFLayer(HIDDEN, OUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        rates: Tensor = self.layers(x).mean(dim=1)
        return rates


class DelayedReset(nn.Module):
    """A step resets by the spike of the one before; decay and threshold are learnable."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.beta1 = nn.Parameter(torch.tensor(0.75))
        self.beta2 = nn.Parameter(torch.full((HIDDEN,), 0.5))
        self.threshold = nn.Parameter(torch.ones(HIDDEN))

    @staticmethod
    def neuron(cur: Tensor, mem: Tensor, beta: Tensor, thr: Tensor | float) -> tuple[Tensor, ...]:
        reset = FastSigmoid.apply(mem - thr).detach()
        mem = beta.clamp(0, 1) * mem + cur - reset * thr
        return FastSigmoid.apply(mem - thr), mem

    def forward(self, x: Tensor) -> Tensor:
        mem1 = mem2 = x.new_zeros(x.shape[1], HIDDEN)
        spikes: list[Tensor] = []
        for cur in x.unbind(0):
            spk, mem1 = self.neuron(self.fc1(cur), mem1, self.beta1, 1.0)
            spk, mem2 = self.neuron(self.fc2(spk), mem2, self.beta2, self.threshold)
            spikes += [spk]
        return torch.stack(spikes)


class FourDeep(nn.Module):
    """Four layers in a ModuleList, states in a list, reset to a value; the output is a sum."""

    def __init__(self, v_reset: float = -0.25) -> None:
        super().__init__()
        sizes = [IN, HIDDEN, HIDDEN, HIDDEN, OUT]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.v_reset = v_reset

    def forward(self, x: Tensor) -> Tensor:
        states: list[Tensor | None] = [None] * len(self.linears)
        total: Tensor | float = 0.0
        for t in range(len(x)):
            s = x[t]
            for i, linear in enumerate(self.linears):
                current = linear(s)
                v = states[i]
                v = current if v is None else 0.5 * v + current
                s = ATan.apply(v - 1.0, 2.0)
                states[i] = torch.where(s > 0, self.v_reset, v)
            total = total + s
        assert isinstance(total, Tensor)
        return total


class SkipNoReset(nn.Module):
    """Three layers without any reset; the first also feeds the third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.c, self.skip = nn.Linear(HIDDEN, OUT), nn.Linear(HIDDEN, OUT, bias=False)
        self.fire: Callable[[Tensor], Tensor] = lambda v: FastSigmoid.apply(v - 1)

    def forward(self, x: Tensor) -> Tensor:
        va = vb = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype, device=x.device)
        vc = torch.zeros(x.shape[1], OUT, dtype=x.dtype, device=x.device)
        mean = torch.zeros_like(vc)
        for frame in x:
            va = 0.5 * va + self.a(frame)
            za = self.fire(va)
            vb = 0.5 * vb + self.b(za)
            zb = self.fire(vb)
            vc = 0.75 * vc + self.c(zb) + self.skip(za)
            mean += self.fire(vc) / x.shape[0]
        return mean


class InPlace(nn.Module):
    """In-place arithmetic, masked assignment, results written into a slice; batch first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        v1 = x.new_zeros(batch, HIDDEN)
        v2 = x.new_zeros(batch, OUT)
        rec = x.new_zeros(batch, steps, OUT)
        for t in range(steps):
            v1.mul_(0.5).add_(self.fc1(x[:, t]))
            z = (v1 > 1).to(x.dtype)
            v1[v1 > 1] = 0.0
            v2 *= 0.75
            v2 += self.fc2(z)
            z2 = (v2 > 1.0).to(x.dtype)
            v2 -= z2
            rec[:, t] = z2
        return rec


class StaticImage(nn.Module):
    """The same image at every step; the input product never changes."""

    def __init__(self, num_steps: int = 8) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, image: Tensor) -> Tensor:
        v1 = v2 = 0.0
        count = 0
        for _ in range(self.num_steps):
            v1 = 0.75 * v1 + self.fc1(image)
            s1 = ATan.apply(v1 - 1.0, 3.0)
            v1 = v1 - s1
            v2 = 0.75 * v2 + self.fc2(s1)
            s2 = ATan.apply(v2 - 1.0, 3.0)
            v2 = v2 - s2
            count = count + s2
        return count  # type: ignore[return-value]


class CurrentBased(nn.Module):
    """A synaptic current filtered before the membrane, one time constant per neuron."""

    alpha: Tensor
    beta: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(IN, HIDDEN))
        self.w2 = nn.Parameter(torch.empty(HIDDEN, OUT))
        self.register_buffer("alpha", torch.tensor([0.5, 0.75]).repeat(HIDDEN // 2))
        self.register_buffer("beta", torch.tensor([0.75, 0.75, 0.5]).repeat(HIDDEN // 3))

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        h1 = torch.einsum("abc,cd->abd", inputs, self.w1)
        syn = torch.zeros_like(h1[:, 0])
        mem = torch.zeros_like(syn)
        mem_rec, spk_rec = [], []
        for t in range(inputs.shape[1]):
            out = FastSigmoid.apply(mem - 1.0)
            new_syn = self.alpha * syn + h1[:, t]
            new_mem = (self.beta * mem + syn) * (1.0 - out.detach())
            mem_rec.append(mem)
            spk_rec.append(out)
            mem, syn = new_mem, new_syn
        spikes = torch.stack(spk_rec, dim=1)
        h2 = torch.einsum("abc,cd->abd", (spikes, self.w2))
        readout = torch.zeros(inputs.shape[0], OUT, dtype=inputs.dtype)
        out_rec = [readout]
        for t in range(inputs.shape[1]):
            readout = 0.5 * readout + h2[:, t]
            out_rec.append(readout)
        return torch.stack(out_rec, dim=1).max(1)[0], [torch.stack(mem_rec, dim=1), spikes]


class GradedSpikes(nn.Module):
    """Spikes carry the membrane potential: real payloads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fire = partial(Graded.apply)

    def forward(self, x: Tensor) -> Tensor:
        v1 = v2 = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        out = []
        for x_t in x:
            v1 = 0.5 * v1 + self.fc1(x_t)
            y1 = self.fire(v1, 1.0)
            v1 = v1 - y1
            v2 = 0.5 * v2 + self.fc2(y1)
            y2 = self.fire(v2, 1.0)
            v2 = v2 - y2
            out.append(y2)
        return torch.stack(out)


class ExpDecay(nn.Module):
    """Decays as exp(-dt / tau) of learnable time constants, computed in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.log_tau = nn.Parameter(torch.linspace(0.5, 3.0, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        decay = torch.exp(-1.0 / torch.exp(self.log_tau))
        v = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
        out: Tensor | None = None
        spikes = []
        for x_t in x:
            v = decay * v + (1 - decay) * F.linear(x_t, self.fc1.weight, self.fc1.bias)
            s = ATan.apply(v - 0.3, 2.0)
            v = v * (1 - s.detach())
            out = self.fc2(s) if out is None else 0.9 * out + self.fc2(s)
            spikes.append(out)
        return torch.stack(spikes).max(dim=0).values
