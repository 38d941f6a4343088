"""Operations that are recorded as others: creation, copies, masked and in-place writes."""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparsify.graph_meta import Source, TensorInfo
from sparsify.recording.operations import (
    BATCH_NORMS,
    EMPTIES,
    FILLS,
    REPLACES_STORAGE,
    SAME,
    Op,
    bind,
    functional_of,
    operation_of,
    receivers,
)
from sparsify.recording.recorder import Call, CannotRecord, Recorder
from sparsify.recording.result_types import find_result_types
from sparsify.recording.values import NO_ORIGIN, Value

aten = torch.ops.aten
Rule = Callable[[Recorder, Call], None]
MOST_COMPARED = 1 << 16  # elements of a constant that are compared with those known already


def fill(recorder: Recorder, call: Call) -> None:
    """``zeros``, ``ones_like``, ``new_full``, ... as ``full``."""
    number = FILLS[call.op]
    if number is None:
        given = bind(call.op, call.args, call.kwargs)
        number = given["s"] if "s" in given else given["fill_value"]
    result = call.run()
    value = recorder.values.add_root(
        result, recorder.emit_full(recorder.values.info(result), number)
    )
    value.has_layout = result.is_contiguous()
    value.number = number if result.dim() == 0 else None
    value.origin = NO_ORIGIN


def empty(recorder: Recorder, call: Call) -> None:
    result = call.run()
    if result.layout is not torch.strided:
        raise CannotRecord(f"a {result.layout} tensor is made")
    value = recorder.values.add_root(result, recorder.emit_full(recorder.values.info(result), 0))
    value.has_layout = result.is_contiguous()


def same(recorder: Recorder, call: Call) -> None:
    """``detach`` and its like: another tensor, the same elements."""
    given = call.args[0]
    if call.op is aten.lift_fresh.default and recorder.values.get(given) is None:
        constant(recorder, call)
        return
    parent = recorder.value_of(given)
    node = recorder.read(parent)
    result = call.run()
    if result is not given:
        value = recorder.values.add_view(result, node, parent, None)
        value.number = parent.number


def constant(recorder: Recorder, call: Call) -> None:
    """A tensor made of Python data: a number if it has only one, else a placeholder."""
    given = call.args[0]
    if not given.untyped_storage().resizable():
        raise CannotRecord(
            "a tensor shares memory with an array of numpy or another library, whose content may "
            "change unseen; keep it as a tensor of the model"
        )
    result = call.run()
    if result.dim() == 0 and not result.dtype.is_complex:
        value = recorder.values.add_root(result, None)
        value.number = result.item()
        value.origin = NO_ORIGIN
        return
    content = result.detach().clone()
    node = _known_constant(recorder, content)
    value = recorder.values.add_root(result, node)
    value.origin = NO_ORIGIN


def _known_constant(recorder: Recorder, content: Tensor) -> fx.Node:
    """The placeholder of a constant with this content."""
    if content.numel() <= MOST_COMPARED:
        for node, tensor in recorder.placeholders.items():
            if node.meta["source"].kind == "constant" and _same_bits(tensor, content):
                return node
    number = sum(n.meta["source"].kind == "constant" for n in recorder.placeholders)
    recorder.add_placeholder(content, Source("constant", f"constant_{number}"))
    return next(reversed(recorder.placeholders))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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
    """``masked_fill`` and ``x[mask] = number`` as ``where``; in place or not."""
    given = bind(call.op, call.args, call.kwargs)
    found = _mask_and_number(recorder, given)
    if found is None:
        _write_or_record(recorder, call)
        return
    mask, number = found
    target = given["self"]
    node = _where(recorder, mask, number, target)
    if not call.facts.written:
        result = call.run()
        node.meta["val"] = recorder.values.info(result)
        recorder.values.add_root(result, node)
        return
    recorder.announce_write(target)
    call.run()
    recorder.write(target, node, recorder.value_of(target).has_layout)


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
    info, value = _info(recorder, target), recorder.lower(target)
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


def _write_or_record(recorder: Recorder, call: Call) -> None:
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
    """In training it writes to the running statistics, which its schema does not say."""
    x, weight, bias, mean, variance, training, momentum, eps = call.args
    if not training or mean is None:
        recorder.record_call(call)
        return
    op = aten._native_batch_norm_legit_functional.default
    args = (x, weight, bias, mean, variance, training, momentum, eps)
    lowered = [recorder.lower(a) for a in args]
    for written in (mean, variance):
        recorder.announce_write(written)
    result = call.run()
    infos = [recorder.values.info(t) for t in (*result, mean, variance)]
    node = recorder.emit(op, lowered, {}, tuple(infos))
    parts = [_part(recorder, node, k, info) for k, info in enumerate(infos)]
    for tensor, part in zip(result, parts[:3], strict=True):
        recorder.values.add_root(tensor, part)
    recorder.write(mean, parts[3], True)
    recorder.write(variance, parts[4], True)


def _part(recorder: Recorder, node: fx.Node, index: int, info: TensorInfo) -> fx.Node:
    return recorder.emit(operator.getitem, (node, index), {}, info)


def replaces_storage(recorder: Recorder, call: Call) -> None:
    name = call.op._schema.name.removeprefix("aten::")
    raise CannotRecord(f"{name} replaces the memory of a tensor")


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
    given = bind(call.op, call.args, call.kwargs)
    targets = _targets(call.op, given)
    shapes = [recorder.values.info(target) for target in targets]
    for target in targets:
        recorder.value_of(target)
        recorder.announce_write(target)
    received = set(receivers(call.op))
    defaults = {a.name: a.default_value for a in call.op._schema.arguments}
    missing = {a.name for a in op._schema.arguments if not a.has_default_value()} - given.keys()
    pure = {name: value for name, value in given.items() if name not in received}
    pure.update({name: defaults[name] for name in missing})
    args, kwargs = _arranged(op, pure)
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


def _arranged(op: Op, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments in the order of the schema, positional as far as they go."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        if argument.name not in given:
            continue
        if argument.kwarg_only or len(args) < _position(op, argument.name):
            kwargs[argument.name] = given[argument.name]
        else:
            args.append(given[argument.name])
    return args, kwargs


def _position(op: Op, name: str) -> int:
    return next(k for k, argument in enumerate(op._schema.arguments) if argument.name == name)


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
    rules.update(dict.fromkeys(REPLACES_STORAGE, replaces_storage))
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
