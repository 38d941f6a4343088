"""Writes of one number where a mask says so, as ``where``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsify.graph_meta import TensorInfo
from sparsify.recording.calls import Call
from sparsify.recording.operations import bind
from sparsify.recording.recorder import Recorder

aten = torch.ops.aten


def record_masked(recorder: Recorder, call: Call) -> bool:
    """``masked_fill`` and ``x[mask] = number`` as ``where``. False if it is another use of them."""
    given = bind(call.op, call.args, call.kwargs)
    found = _mask_and_number(recorder, given)
    if found is None:
        return False
    mask, number = found
    target = given["self"]
    node = _where(recorder, mask, number, target)
    if not call.facts.written:
        result = call.run()
        node.meta["val"] = recorder.values.info(result)
        recorder.values.add_root(result, node)
        return True
    recorder.announce_write(target)
    call.run()
    recorder.write(target, node, recorder.value_of(target).has_layout)
    return True


def _mask_and_number(recorder: Recorder, given: dict[str, Any]) -> tuple[fx.Node, Any] | None:
    """The mask as a node that broadcasts against the target, and a number or 0-dim tensor."""
    target, mask = given["self"], given.get("mask")
    lead = 0
    if mask is None:
        tensors = [i for i in given["indices"] if i is not None]
        number = given["values"]
        if len(tensors) != 1 or tensors[0].dtype is not torch.bool or given.get("accumulate"):
            return None
        mask = tensors[0]
        lead = next(k for k, i in enumerate(given["indices"]) if i is not None)
    else:
        number = given["value"]
    if isinstance(number, Tensor):
        value = recorder.value_of(number)
        if value.number is not None:
            number = value.number
        elif number.dim() or number.device != target.device:
            return None
    if mask.dim() + lead > target.dim():
        return None
    node = recorder.lower(mask)
    rest = 0 if "mask" in given else target.dim() - lead - mask.dim()
    if rest:
        shape = (*mask.shape, *(1 for _ in range(rest)))
        info = TensorInfo(shape, (*mask.stride(), *shape[mask.dim() :]), mask.dtype, mask.device)
        node = recorder.emit(aten.reshape.default, (node, list(shape)), {}, info)
    return node, number


def _where(recorder: Recorder, mask: fx.Node, number: Any, target: Tensor) -> fx.Node:
    info, value = recorder.values.info(target), recorder.lower(target)
    if isinstance(number, Tensor):
        filler = recorder.lower(number)
        if number.dtype != target.dtype:
            scalar = TensorInfo((), (), target.dtype, target.device)
            options = {"dtype": target.dtype}
            filler = recorder.emit(aten._to_copy.default, (filler,), options, scalar)
        return recorder.emit(aten.where.self, (mask, filler, value), {}, info)
    if torch.result_type(target, number) != target.dtype:
        scalar = TensorInfo((), (), target.dtype, target.device)
        filler = recorder.emit_full(scalar, number)
        return recorder.emit(aten.where.self, (mask, filler, value), {}, info)
    return recorder.emit(aten.where.ScalarSelf, (mask, number, value), {}, info)
