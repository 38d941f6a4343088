"""One call of an operation, and why it may be impossible to record."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sparsify.recording.operations import Op, Operation, operation_of

aten = torch.ops.aten
RNN_FILE = torch.nn.modules.rnn.__file__
NORM_FILE = torch.nn.modules.batchnorm.__file__
PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class CannotRecord(Exception):
    """Internal: why the run cannot be recorded; caught by the recorder.

    ``of``: the tensor that it is about where the run is over; the user is told where it was made.
    """

    def __init__(self, reason: str, of: Tensor | None = None) -> None:
        super().__init__(reason)
        self.of = of


class Call:
    """One call of an operation, and its result once it has run."""

    __slots__ = ("args", "facts", "has_run", "kwargs", "op", "result")

    def __init__(
        self, op: Op, facts: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.op, self.facts, self.args, self.kwargs = op, facts, args, kwargs
        self.has_run = False
        self.result: Any = None

    def run(self) -> Any:
        if not self.has_run:
            self.result = self.op(*self.args, **self.kwargs)
            self.has_run = True
        return self.result


def check_plain(tensor: Tensor) -> None:
    """Raise for tensors whose memory is not that of their elements."""
    kind = type(tensor)
    if kind not in PLAIN_TYPES:
        raise CannotRecord(f"a tensor of the class {kind.__name__} is used")
    if tensor.layout is not torch.strided:
        remedy = "make it dense (to_dense) before the call"
        raise CannotRecord(f"a tensor with the layout {tensor.layout} is used; {remedy}")
    if tensor.is_quantized:
        raise CannotRecord("a quantized tensor is used")


def why_not_reveal(op: Op) -> str:
    """Why the result of ``op`` must not reach Python."""
    what = "item(), bool(), int(), float() or an index"
    if op is aten._local_scalar_dense.default and _is_asked_by(RNN_FILE):
        return (
            "the lengths of a packed sequence reach Python; give padded tensors, and take each "
            "sequence's last step with torch.gather"
        )
    if op is aten._local_scalar_dense.default and _is_asked_by(NORM_FILE):
        return (
            "how many batches a norm has seen reaches Python; give it a momentum, which is None in "
            "training mode"
        )
    if op is aten._local_scalar_dense.default:
        return (
            f"a tensor's value reaches Python ({what}), so that another input could take another "
            "way; compute with tensors (torch.where) instead"
        )
    name = op._schema.name.removeprefix("aten::")
    if operation_of(op).shape_depends_on_values:
        return (
            f"the shape of {name}'s result depends on values; compute with a mask of fixed shape "
            "(torch.where) instead"
        )
    return f"{name} gives a tensor's value to Python; compute with tensors instead"


def _is_asked_by(file: str) -> bool:
    """Whether code of ``file`` is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return frame is not None
