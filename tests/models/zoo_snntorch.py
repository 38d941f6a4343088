"""snnTorch networks in the form of its tutorials."""

from __future__ import annotations

import snntorch as snn
import torch
import torch.nn as nn
from snntorch import surrogate
from torch import Tensor

from tests.models.zoo_feedforward import HIDDEN, IN, OUT


class StaticNet(nn.Module):
    """A static image at every step, two layers of ``Leaky``."""

    def __init__(self, num_steps: int = 8, beta: float = 0.75) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = nn.Linear(HIDDEN, OUT)
        self.lif2 = snn.Leaky(beta=beta)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        mem2_rec = []
        for _step in range(self.num_steps):
            cur1 = self.fc1(x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class SpikingInputNet(nn.Module):
    """Spike trains in; learnable decay and threshold, hard reset."""

    def __init__(self) -> None:
        super().__init__()
        spike_grad = surrogate.fast_sigmoid(slope=25)
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.lif1 = snn.Leaky(beta=0.5, learn_beta=True, spike_grad=spike_grad)
        self.fc2 = nn.Linear(HIDDEN, OUT)
        self.lif2 = snn.Leaky(
            beta=torch.full((OUT,), 0.75),
            learn_threshold=True,
            reset_mechanism="zero",
            spike_grad=spike_grad,
        )

    def forward(self, x: Tensor) -> Tensor:
        mem1 = self.lif1.reset_mem()
        mem2 = self.lif2.reset_mem()
        spk_out = []
        for step in range(x.size(0)):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_out.append(spk2)
        return torch.stack(spk_out)


class RecurrentNet(nn.Module):
    """``RLeaky`` with all-to-all recurrence, then ``Leaky``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.rlif = snn.RLeaky(beta=0.75, linear_features=HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, OUT)
        self.lif = snn.Leaky(beta=0.75, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        spk1, mem1 = self.rlif.init_rleaky()
        mem2 = self.lif.init_leaky()
        total = torch.zeros(x.size(1), OUT, dtype=x.dtype)
        for step in range(x.size(0)):
            spk1, mem1 = self.rlif(self.fc1(x[step]), spk1, mem1)
            spk2, mem2 = self.lif(self.fc2(spk1), mem2)
            total = total + spk2
        return total


class SynapticNet(nn.Module):
    """Second-order neurons: a synaptic current beside the membrane."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(IN, HIDDEN)
        self.lif1 = snn.Synaptic(alpha=0.5, beta=0.75)
        self.fc2 = nn.Linear(HIDDEN, OUT)
        self.lif2 = snn.Synaptic(alpha=0.5, beta=0.75)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        syn1, mem1 = self.lif1.init_synaptic()
        syn2, mem2 = self.lif2.init_synaptic()
        spk2_rec = []
        mem2_rec = []
        for step in range(x.size(0)):
            spk1, syn1, mem1 = self.lif1(self.fc1(x[step]), syn1, mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)
