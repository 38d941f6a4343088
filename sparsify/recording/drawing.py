"""Random numbers drawn into a permuted tensor, as those of a dropout are.

The operations that return what they draw make a contiguous tensor. Where numbers follow memory,
what ``bernoulli_`` writes to ``empty_like(x.transpose(0, 1))`` is recorded as
``bernoulli(full(...)).transpose(0, 1)``. On processors of Intel, those of ``bernoulli_`` follow the
order of the dims, as MKL draws them, and those of ``normal_`` have an order of their own anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsify.recording.calls import Call, CannotRecord
from sparsify.recording.operations import Op, bind, functional_arguments, operation_of
from sparsify.recording.recorder import Recorder

aten = torch.ops.aten
SEEDS = 64  # until what is drawn says in which order: few numbers of two values may say nothing


def is_drawn_permuted(call: Call) -> bool:
    """Whether ``call`` fills a tensor with another order of dims, in the order of its memory.

    Only numbers say how: a tensor of probabilities has an order of its own. Raises CannotRecord for
    numbers that follow neither memory nor dims.
    """
    if not operation_of(call.op).is_random or operation_of(call.op).written != ("self",):
        return False
    target, *others = call.args
    if target.is_contiguous() or any(isinstance(other, Tensor) for other in others):
        return False
    if not target.permute(_order(target.stride())).is_contiguous():
        return False
    named = tuple((name, value) for name, value in call.kwargs.items() if name != "generator")
    layout = tuple(target.shape), target.stride(), target.dtype, target.device
    follows = _follows_memory(call.op, tuple(others), named, *layout)
    if follows is None:
        raise CannotRecord(
            f"{call.op} fills a permuted tensor in an order of its own; draw into a contiguous "
            "one: torch.empty_like(x, memory_format=torch.contiguous_format)"
        )
    return follows


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
    permuted = recorder.values.info(target)
    node = recorder.emit(aten.permute.default, (drawn, _back(order)), {}, permuted)
    recorder.write(target, node, True)


@lru_cache(maxsize=64)
def _follows_memory(
    op: Op,
    args: tuple[Any, ...],
    kwargs: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> bool | None:
    """Whether numbers drawn into such a tensor follow its memory, not dims; None for neither."""
    order, back = _order(stride), _back(_order(stride))
    sizes = [shape[dim] for dim in order]

    def drawn(into: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        op(into, *args, **dict(kwargs), generator=generator)
        return into

    for seed in range(SEEDS):
        by_dims = drawn(torch.empty(shape, dtype=dtype, device=device), seed)
        by_memory = drawn(torch.empty(sizes, dtype=dtype, device=device), seed).permute(back)
        if not torch.equal(by_dims, by_memory):
            found = drawn(torch.empty_strided(shape, stride, dtype=dtype, device=device), seed)
            return False if torch.equal(found, by_dims) else torch.equal(found, by_memory) or None
    return True


def _order(stride: Sequence[int]) -> list[int]:
    """The dims, the outermost in memory first."""
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _back(order: Sequence[int]) -> list[int]:
    """The permutation that undoes ``order``."""
    return [order.index(dim) for dim in range(len(order))]
