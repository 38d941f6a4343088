"""What a node of a recorded graph knows about itself.

Every node of a recording, and every node that a pass creates, has in ``node.meta``:

    val         TensorInfo, or a tuple of them for an op with several results
    source      Source of a placeholder; of a weight that is computed, and of its parts, the
                parameter that it is made of
    location    Location: the user's line
    module      dotted path of the innermost submodule whose forward ran, "" for the root
    loops       tuple of LoopStep, outermost first
    function    name of the autograd.Function whose forward ran, or ""
    grad        whether gradients were enabled there
    autocast    the autocast dtype, or None
    activity    of a product: measured share of non-zeros in the activation that it reads, or of
                values that matter, where ``only`` is given
    pattern     weight_pattern.Pattern of a weight, or of what a product multiplies by; a part of a
                weight has that of the whole
    looked_up   of a product whose rows are looked up: how many are, see ``look_up_products``
    whole       of an operation that could be taken apart: Refusal, why its loop is not worth it
    only        Mask, written by ``restrict_products``: where a product's values matter
    fact        Fact, written by ``find_events``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sparsify.errors import Location

SourceKind = Literal["input", "parameter", "buffer", "attribute", "constant", "ones"]
Payload = Literal["zero", "binary", "constant", "integer", "real"]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's layout without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorInfo:
        return TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class LoopStep:
    """One iteration of one run of a Python loop.

    ``frame`` numbers the runs of code objects, ``loop`` is the loop's place in the code (first and
    last bytecode offset), ``iteration`` counts from 0.
    """

    frame: int
    loop: tuple[int, int]
    iteration: int
    location: Location


@dataclass(frozen=True)
class Source:
    """Where a placeholder's tensor comes from at each call.

    ``name`` is the dotted path of a parameter, buffer or attribute in the model, the path in the
    arguments of an input (``"x"``, ``"state[0].v"``), or a readable name of a constant.
    """

    kind: SourceKind
    name: str


# The weight of a sum over neurons, which is no product of the model; see ``write_reductions``.
ONES = Source("ones", "ones")


@dataclass(frozen=True)
class Fact:
    """What is known of a value for every input, not only for the example.

    ``event``: a threshold decides which elements are zero. ``payload`` says what the others are;
    ``constant`` ones are all ``value``, ``zero`` means that there are none.
    """

    event: bool
    payload: Payload = "real"
    value: float | None = None
    origin: Location | None = None
