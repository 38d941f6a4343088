"""A compiled Scan: the same call, computed by one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.codegen.backend import Launchable
from sparsify.scan import Scan

Role = Literal["carry", "x", "const"]


@dataclass(frozen=True)
class Binding:
    """Where a tensor of the kernel comes from: operand ``index`` of ``role``, seen through ``view``.

    ``view`` is what the kernel's layout needs: ``"transpose"`` of a weight ``[S, R]``,
    ``"flatten"`` of neuron dims into one, ``"expand"`` to the full ``[N]``.
    """

    name: str
    role: Role
    index: int
    views: tuple[Literal["transpose", "flatten", "expand"], ...] = ()


@dataclass(frozen=True)
class LoweredSite:
    """A product of the body that became a Gather."""

    gather: str
    weight: str  # path of the parameter in the model, or the placeholder's name
    location: object  # Location | None
    module: str


@dataclass(frozen=True)
class Lowered:
    """A Scan as a kernel: ``outputs[i]`` names the kernel's output for result i of the Scan."""

    kernel: ir.Kernel
    bindings: tuple[Binding, ...]
    outputs: tuple[str, ...]
    sites: tuple[LoweredSite, ...]


class Region(nn.Module):
    """Runs ``launchable`` where ``scan`` ran: same operands, same results."""

    def __init__(self, scan: Scan, lowered: Lowered, launchable: Launchable) -> None:
        super().__init__()
        self.scan, self.lowered, self.launchable = scan, lowered, launchable
        self.frozen = False

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
    ) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError
