"""A Scan written as a kernel, and how the kernel's tensors are those of the Scan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sparsify import ir
from sparsify.errors import Location

Role = Literal["carry", "x", "const"]
View = Literal["transpose", "channels", "flatten", "expand"]


@dataclass(frozen=True)
class Binding:
    """Where a tensor of the kernel comes from: operand ``index`` of ``role``, through ``views``.

    ``"transpose"``: a weight ``[S, R]`` as ``[R, S]``; ``"flatten"``: the batch dims as one and the
    neuron dims as one, those that the kernel's operand lacks dropped, or the weight of a
    convolution with all dims but the first as one; ``"expand"``: the neuron dims broadcast to
    ``neurons`` before that; ``"channels"``: a bias whose elements are those of channels. ``lead``
    of the tensor's dims (without time) are batch.
    """

    name: str
    role: Role
    index: int
    views: tuple[View, ...] = ()
    lead: int = 1
    neurons: tuple[int, ...] = ()


@dataclass(frozen=True)
class Returned:
    """How result i of the Scan comes out of the kernel.

    ``output`` names the kernel's output and ``shape`` is the result's without time, -1 standing for
    the batch; ``first_row`` says that all batch rows are equal and the result has none. Where
    ``carry`` is given, the result is the initial value of that carry, which never changes.
    """

    output: str = ""
    shape: tuple[int, ...] = ()
    first_row: bool = False
    carry: int | None = None


@dataclass(frozen=True)
class LoweredSite:
    """A product of the Scan's body that became a Gather of the kernel.

    ``event`` says that a threshold decides which of its senders are active; ``activity`` is the
    share that was measured while recording.
    """

    gather: str  # the Gather's result
    weight: str  # path of the parameter in the model, or the operand's name; "" if of ones
    module: str
    location: Location | None
    event: bool = False
    activity: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Lowered:
    """``outputs[i]`` names the kernel's output that holds result i of the Scan, "" if none does.

    ``returned`` says how each result comes out. ``batch`` is an operand whose leading dims give the
    number of batch rows; None where the Scan has no batch, and the kernel runs one row.
    Two Lowereds of recordings with other batch sizes and steps are equal if one serves both.
    """

    kernel: ir.Kernel
    bindings: tuple[Binding, ...]
    outputs: tuple[str, ...]
    sites: tuple[LoweredSite, ...]
    returned: tuple[Returned, ...] = ()
    batch: Binding | None = None

    @property
    def batched(self) -> bool:
        return self.batch is not None
