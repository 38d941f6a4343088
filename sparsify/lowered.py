"""A Scan written as a kernel, and how the kernel's tensors are those of the Scan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparsify import ir
from sparsify.errors import Location

Role = Literal["carry", "x", "const"]
View = Literal["transpose", "flatten", "expand"]


@dataclass(frozen=True)
class Binding:
    """Where a tensor of the kernel comes from: operand ``index`` of ``role``, through ``views``.

    ``"transpose"``: a weight ``[S, R]`` as ``[R, S]``; ``"flatten"``: the neuron dims as one;
    ``"expand"``: broadcast to the full ``[N]`` before it is flattened.
    """

    name: str
    role: Role
    index: int
    views: tuple[View, ...] = ()


@dataclass(frozen=True)
class LoweredSite:
    """A product of the Scan's body that became a Gather of the kernel."""

    gather: str  # the Gather's result
    weight: str  # path of the parameter in the model, or the operand's name
    module: str
    location: Location | None


@dataclass(frozen=True)
class Lowered:
    """``outputs[i]`` names the kernel's output that holds result i of the Scan."""

    kernel: ir.Kernel
    bindings: tuple[Binding, ...]
    outputs: tuple[str, ...]
    sites: tuple[LoweredSite, ...]
