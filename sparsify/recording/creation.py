"""How tensors that an operation makes of nothing are recorded: as ``full``, or as constants."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparsify.graph_meta import Source
from sparsify.recording.calls import Call, CannotRecord
from sparsify.recording.histories import Histories
from sparsify.recording.operations import FILLS, bind
from sparsify.recording.recorder import Recorder
from sparsify.recording.values import NO_ORIGIN, Value

aten = torch.ops.aten
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
        if call.op is aten.detach.default and recorder.histories is not None:
            detach(recorder.histories, value)


def detach(histories: Histories, value: Value) -> None:
    """End the history of ``value``, which is current: with a node where autograd sees it."""
    if not histories.is_closed():
        value.node = histories.detach(value.node)
    value.detached, value.follows = True, False


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
        number = result.item()
        value = recorder.values.add_root(
            result, recorder.emit_full(recorder.values.info(result), number)
        )
        value.number = number
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
    source = Source("constant", f"constant_{number}")
    recorder.met.add_placeholder(content, source, recorder.histories)
    return next(reversed(recorder.placeholders))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
