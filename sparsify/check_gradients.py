"""The last word on a recording made for training: its gradients are the model's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify.check_recording import perturb
from sparsify.errors import TraceError
from sparsify.keep_state import keep_state
from sparsify.recording.recording import Recording
from sparsify.training_step import differentiate_result


def why_gradients_differ(
    model: nn.Module, recording: Recording, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """How the gradients of the recorded graph differ from the model's; "" if they do not.

    Both run on perturbed inputs, with the same random gradients of all results. Raises TraceError
    if the model's own backward fails.
    """
    call = perturb((args, kwargs))
    with keep_state(model, call):
        operands = recording.calling.operands(*call)
        result = model.forward(*call[0], **call[1])
        held = recording.guard.matches(args, kwargs)
        try:
            expected = differentiate_result(result, operands)
        except RuntimeError as error:
            raise TraceError(f"the model's own backward fails: {error}") from error
        del result
        if held and not recording.guard.matches(args, kwargs):
            changed = recording.guard.explain(args, kwargs)
            return f"its backward changes Python state: {changed}"
    with keep_state(model, call):
        operands = recording.calling.operands(*call)
        values = fx.Interpreter(recording.graph).run(*operands)
        got = differentiate_result(recording.calling.deliver(values, *call), operands)
    names = _names(recording, operands)
    for name, ours, theirs in zip(names, got, expected, strict=True):
        reason = _why_differ(ours, theirs)
        if reason:
            return f"the gradient of {name} {reason}"
    return ""


def _names(recording: Recording, operands: list[Tensor]) -> list[str]:
    placeholders = [n for n in recording.graph.graph.nodes if n.op == "placeholder"]
    return [
        getattr(node.meta.get("source"), "name", node.name)
        for node, operand in zip(placeholders, operands, strict=True)
        if operand.requires_grad
    ]


def _why_differ(ours: Tensor | None, theirs: Tensor | None) -> str:
    if ours is None or theirs is None:
        if ours is theirs:
            return ""
        return "is None" if ours is None else "is not None as the model's is"
    if torch.equal(ours, theirs):
        return ""
    # The same operations run, but gradients of one tensor may be added in another order: that moves
    # a sum by some eps. A wrong surrogate or a detach that was missed changes leading digits.
    most = math.sqrt(torch.finfo(theirs.dtype).eps)
    same_nan = torch.equal(ours.isnan(), theirs.isnan())
    distance = float(torch.linalg.vector_norm((ours - theirs).nan_to_num()))
    norm = float(torch.linalg.vector_norm(theirs.nan_to_num()))
    if same_nan and distance <= most * norm:
        return ""
    return f"is {distance:.3g} away from the model's, whose norm is {norm:.3g}"
