"""Operations that are recorded as others: copies, writes in place, and what makes tensors."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.graph_meta import TensorInfo
from sparsify.recording.calls import Call, CannotRecord
from sparsify.recording.creation import empty, fill, same
from sparsify.recording.drawing import draw_permuted, is_drawn_permuted
from sparsify.recording.masked import record_masked
from sparsify.recording.operations import (
    BATCH_NORMS,
    EMPTIES,
    FILLS,
    LABELS,
    REPLACES_STORAGE,
    SAME,
    UPDATE_STATISTICS,
    Op,
    bind,
    functional_arguments,
    functional_of,
    operation_of,
)
from sparsify.recording.recorder import Recorder
from sparsify.recording.result_types import find_result_types
from sparsify.recording.values import Value

aten = torch.ops.aten
Rule = Callable[[Recorder, Call], None]


def copy(recorder: Recorder, call: Call) -> None:
    """``target.copy_(source)``: the source, converted and broadcast, is the target's new value."""
    target, source = call.args[0], call.args[1]
    recorder.value_of(target)
    recorder.announce_write(target)
    given = recorder.value_of(source)
    if given.number is not None:
        node, fits = recorder.emit_full(_info(recorder, target), given.number), True
    else:
        node, fits = _converted(recorder, given, source, target)
    call.run()
    recorder.write(target, node, fits)


def _converted(
    recorder: Recorder, value: Value, source: Tensor, target: Tensor
) -> tuple[fx.Node, bool]:
    """The node of ``source`` with the target's dtype, device and shape; whether strides agree."""
    node = recorder.read(value)
    changed = {
        name: getattr(target, name)
        for name in ("dtype", "device")
        if getattr(target, name) != getattr(source, name)
    }
    if changed:
        info = TensorInfo(tuple(source.shape), tuple(source.stride()), target.dtype, target.device)
        node = recorder.emit(aten._to_copy.default, (node,), changed, info)
    if source.shape != target.shape:
        args = (node, list(target.shape))
        return recorder.emit(aten.expand.default, args, {}, _info(recorder, target)), False
    return node, value.has_layout and _same_strides(source, target)


def _same_strides(a: Tensor, b: Tensor) -> bool:
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or x == y for size, x, y in strides)


def fill_in_place(recorder: Recorder, call: Call) -> None:
    """``zero_``, ``fill_``."""
    target = call.args[0]
    recorder.value_of(target)
    recorder.announce_write(target)
    number: Any = call.args[1] if len(call.args) > 1 else 0
    info = _info(recorder, target)
    if isinstance(number, Tensor):
        value = recorder.value_of(number)
        if value.number is None:
            node, _ = _converted(recorder, value, number, target)
            call.run()
            recorder.write(target, node, False)
            return
        number = value.number
    call.run()
    recorder.write(target, recorder.emit_full(info, number), target.is_contiguous())


def masked(recorder: Recorder, call: Call) -> None:
    """``masked_fill``, ``index_put``: a ``where`` if one number goes where one mask says."""
    if record_masked(recorder, call):
        return
    if call.facts.written:
        in_place(recorder, call)
    else:
        recorder.record_call(call)


def index(recorder: Recorder, call: Call) -> None:
    """``x[indices]``; with a boolean mask the shape depends on values."""
    indices = [i for i in call.args[1] if i is not None]
    if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
        recorder.reveal(call)
    else:
        recorder.record_call(call)


def batch_norm(recorder: Recorder, call: Call) -> None:
    """In training it writes to the running statistics, which its schema does not say.

    What cuDNN returns beside the result and its statistics is for its own gradient alone.
    """
    x, weight, bias, mean, variance, training, momentum, eps = call.args
    if not training or mean is None:
        recorder.record_call(call)
        return
    op = aten._native_batch_norm_legit_functional.default
    args = (x, weight, bias, mean, variance, training, momentum, eps)
    lowered = [recorder.lower(a) for a in args]
    if recorder.histories is not None:  # autograd saves them, and the call writes to them later
        lowered[3:5] = [
            recorder.emit(aten.clone.default, (node,), {}, node.meta["val"])
            for node in lowered[3:5]
        ]
    for written in (mean, variance):
        recorder.announce_write(written)
    result = call.run()
    infos = [recorder.values.info(t) for t in (*result[:3], mean, variance)]
    node = recorder.emit(op, lowered, {}, tuple(infos))
    parts = [_part(recorder, node, k, info) for k, info in enumerate(infos)]
    for tensor, part in zip(result, parts[:3], strict=False):
        recorder.values.add_root(tensor, part)
    recorder.write(mean, parts[3], True)
    recorder.write(variance, parts[4], True)


def updates_statistics(recorder: Recorder, call: Call) -> None:
    """It writes to running statistics if it has them, which its schema does not say."""
    given = bind(call.op, call.args, call.kwargs)
    if any(given.get(name) is not None for name in ("running_mean", "running_var")):
        name = call.op._schema.name.removeprefix("aten::")
        raise CannotRecord(
            f"{name} writes to running statistics; give it none, or use a batch norm"
        )
    (in_place if call.facts.written else Recorder.record_call)(recorder, call)


def _part(recorder: Recorder, node: fx.Node, index: int, info: TensorInfo) -> fx.Node:
    return recorder.emit(operator.getitem, (node, index), {}, info)


def replaces_storage(recorder: Recorder, call: Call) -> None:
    name = call.op._schema.name.removeprefix("aten::")
    raise CannotRecord(f"{name} replaces the memory of a tensor")


def label(recorder: Recorder, call: Call) -> None:
    """Told to the profiler of the recorded run only."""
    call.run()


def in_place_view(recorder: Recorder, call: Call) -> None:
    """``x.t_()``, ``x.unsqueeze_(0)``: the tensor becomes a view of what it was."""
    target = call.args[0]
    name = call.op._schema.name.removeprefix("aten::")[:-1]
    view = getattr(getattr(aten, name, None), call.op._overloadname, None)
    value = recorder.value_of(target)
    if view is None or (value.parent is None and value.memory.placeholder is not None):
        raise CannotRecord(f"{name}_ changes the shape of a tensor that the model keeps")
    args = [recorder.lower(argument) for argument in call.args]
    call.run()
    node = recorder.emit(view, args, call.kwargs, recorder.values.info(target))
    recorder.values.add_view(target, node, value, (view, call.args[1:], call.kwargs))


def in_place(recorder: Recorder, call: Call) -> None:
    """Any other write: the functional variant's results are the new values."""
    op = functional_of(call.op)
    if op is None or keyword.iskeyword(op._overloadname):
        raise CannotRecord(f"{call.op} writes to a tensor and has no functional variant")
    if is_drawn_permuted(call):
        draw_permuted(recorder, call, op)
        return
    given = bind(call.op, call.args, call.kwargs)
    targets = _targets(call.op, given)
    shapes = [recorder.values.info(target) for target in targets]
    for target in targets:
        recorder.value_of(target)
        recorder.announce_write(target)
    args, kwargs = functional_arguments(op, call.op, given)
    types = find_result_types(op, args, kwargs)
    lowered = [recorder.lower(a) for a in args], {k: recorder.lower(a) for k, a in kwargs.items()}
    result = call.run()
    own = _own_results(call.op, result)
    infos = [recorder.values.info(tensor) for tensor in [*own, *targets]]
    resized = [t for t, before in zip(targets, shapes, strict=True) if t.shape != before.shape]
    for target in resized:
        _start_anew(recorder, target)
    parts = _emit_functional(recorder, op, lowered, infos)
    for tensor, part in zip(own, parts, strict=False):
        recorder.values.add_root(tensor, part)
    types = types[len(own) :] if types else [t.dtype for t in targets]
    written = zip(targets, parts[len(own) :], types, strict=True)
    for target, part, dtype in written:
        keeps = operation_of(op).is_pointwise and target.is_contiguous()
        recorder.write(target, _as_dtype(recorder, part, dtype, target), keeps)


def _targets(op: Op, given: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for name in operation_of(op).written:
        value = given.get(name)
        several = value if isinstance(value, (list, tuple)) else (value,)
        found.extend(tensor for tensor in several if isinstance(tensor, Tensor))
    return found


def _own_results(op: Op, result: Any) -> list[Tensor]:
    """What the operation returns beside the tensors that it wrote to."""
    results = result if isinstance(result, (tuple, list)) else [result]
    returns = op._schema.returns
    if len(returns) != len(results):
        return []
    return [r for r, spec in zip(results, returns, strict=True) if spec.alias_info is None]


def _emit_functional(
    recorder: Recorder, op: Op, lowered: tuple[list[Any], dict[str, Any]], infos: list[TensorInfo]
) -> list[fx.Node]:
    args, kwargs = lowered
    returns = op._schema.returns
    if len(returns) == 1 and str(returns[0].type) == "Tensor":
        return [recorder.emit(op, args, kwargs, infos[0])]
    node = recorder.emit(op, args, kwargs, tuple(infos))
    return [_part(recorder, node, k, info) for k, info in enumerate(infos)]


def _as_dtype(recorder: Recorder, node: fx.Node, dtype: torch.dtype, target: Tensor) -> fx.Node:
    """In place, results are converted to the target's dtype; the functional variant's are not."""
    if dtype == target.dtype:
        return node
    info = _info(recorder, target)
    node.meta["val"] = TensorInfo(info.shape, info.stride, dtype, info.device)
    return recorder.emit(aten._to_copy.default, (node,), {"dtype": target.dtype}, info)


def _start_anew(recorder: Recorder, target: Tensor) -> None:
    """``out=`` gave a tensor another size."""
    value = recorder.value_of(target)
    is_alone = value.parent is None and value.memory.tensors == 1
    if not is_alone or value.memory.placeholder is not None:
        raise CannotRecord("out= resizes a tensor that others see")
    value.info = recorder.values.info(target)


def _info(recorder: Recorder, tensor: Tensor) -> TensorInfo:
    return recorder.values.info(tensor)


def rule_of(op: Op) -> Rule | None:
    """How ``op`` is recorded; None if as it is."""
    rule = _RULES.get(op)
    if rule is not None:
        return rule
    facts = operation_of(op)
    if facts.is_inplace_view:
        return in_place_view
    return in_place if facts.written else None


def _make_rules() -> dict[Op, Rule]:
    rules: dict[Op, Rule] = dict.fromkeys(FILLS, fill)
    rules.update(dict.fromkeys(EMPTIES, empty))
    rules.update(dict.fromkeys(SAME, same))
    rules.update(dict.fromkeys(BATCH_NORMS, batch_norm))
    rules.update(dict.fromkeys(UPDATE_STATISTICS, updates_statistics))
    rules.update(dict.fromkeys(REPLACES_STORAGE, replaces_storage))
    rules.update(dict.fromkeys(LABELS, label))
    rules.update(
        {
            aten.copy_.default: copy,
            aten.fill_.Scalar: fill_in_place,
            aten.fill_.Tensor: fill_in_place,
            aten.zero_.default: fill_in_place,
            aten.masked_fill.Scalar: masked,
            aten.masked_fill.Tensor: masked,
            aten.masked_fill_.Scalar: masked,
            aten.masked_fill_.Tensor: masked,
            aten.index_put.default: masked,
            aten.index_put_.default: masked,
            aten._index_put_impl_.default: in_place,
            aten.index.Tensor: index,
        }
    )
    return rules


_RULES = _make_rules()
