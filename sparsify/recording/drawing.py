"""Random numbers drawn into a permuted tensor: they follow its memory, as those of a dropout do.

The operations that return what they draw make a contiguous tensor, so what ``bernoulli_`` writes
to ``empty_like(x.transpose(0, 1))`` is recorded as ``bernoulli(full(...)).transpose(0, 1)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.recording.calls import Call
from sparsify.recording.operations import Op, bind, functional_arguments, operation_of
from sparsify.recording.recorder import Recorder

aten = torch.ops.aten


def is_drawn_permuted(call: Call) -> bool:
    """Whether ``call`` fills all memory of a tensor with random numbers, in another order of dims.

    Only numbers say how: a tensor of probabilities has an order of its own.
    """
    if not operation_of(call.op).is_random or operation_of(call.op).written != ("self",):
        return False
    target, *others = call.args
    if target.is_contiguous() or any(isinstance(other, Tensor) for other in others):
        return False
    return bool(target.permute(_order(target.stride())).is_contiguous())


def draw_permuted(recorder: Recorder, call: Call, op: Op) -> None:
    """Record a call for which ``is_drawn_permuted`` holds as ``op``, which returns its numbers."""
    target = call.args[0]
    order = _order(target.stride())
    recorder.value_of(target)
    recorder.announce_write(target)
    given = bind(call.op, call.args, call.kwargs)
    (_, *args), kwargs = functional_arguments(op, call.op, given)
    info = recorder.values.info(target.permute(order))
    drawn = recorder.emit(op, (recorder.emit_full(info, 0), *args), kwargs, info)
    call.run()
    back = [order.index(dim) for dim in range(len(order))]
    node = recorder.emit(aten.permute.default, (drawn, back), {}, recorder.values.info(target))
    recorder.write(target, node, True)


def _order(stride: Sequence[int]) -> list[int]:
    """The dims, the outermost in memory first."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])
