"""The last word on a recording made for training: its gradients are the model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import TraceError
from sparsify.recording.recording import Args, Kwargs, Recording
from sparsify.training_step import differentiate_result

SPENT = "backward through the graph a second time"  # as torch says it
# Of n terms that cancel, sqrt(n) eps of their size is left as they are rounded: n are the places of
# all maps, 2^16 and more. The largest gradient stands for their size; up to 23 eps were measured.
MOST_ROUNDING = 256.0
Call = tuple[Args, Kwargs]
Gradients = Sequence[Tensor | None]


def differentiate_model(
    recording: Recording, given: Call, result: Any, operands: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of ``operands`` from random ones of ``result``, which the model has just made.

    Raises TraceError if the model's own backward fails, or changes what the guard of the ``given``
    call looks at.
    """
    held = recording.guard.matches(*given)
    try:
        found = differentiate_result(result, operands)
    except RuntimeError as error:
        raise _explain(error) from error
    if held and not recording.guard.matches(*given):
        changed = recording.guard.explain(*given)
        raise TraceError(f"its backward changes Python state: {changed}")
    return found


def _explain(error: RuntimeError) -> TraceError:
    """A state that was forgotten to be reset is no reason to give the model up for good."""
    if SPENT not in str(error):
        return TraceError(f"the model's own backward fails: {error}")
    reason = (
        "the model's own backward fails: a state that it keeps belongs to the graph of an earlier "
        "call, which that call's backward has freed. Reset or detach the state between calls."
    )
    return TraceError(reason, may_settle=True)


def why_gradients_differ(
    recording: Recording, call: Call, got: Gradients, expected: Gradients
) -> str:
    """How gradients of the recorded graph on ``call`` differ from the model's; "" if not."""
    if not expected:
        return ""
    names = _names(recording, recording.calling.operands(*call))
    largest = max((_norm(gradient) for gradient in expected if gradient is not None), default=0.0)
    for name, ours, theirs in zip(names, got, expected, strict=True):
        reason = _why_differ(ours, theirs, largest)
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


def _why_differ(ours: Tensor | None, theirs: Tensor | None, largest: float) -> str:
    if ours is None or theirs is None:
        if ours is theirs:
            return ""
        return "is None" if ours is None else "is not None as the model's is"
    if torch.equal(ours, theirs):
        return ""
    # The same operations run, but gradients of one tensor may be added in another order: that moves
    # a sum by some eps. A wrong surrogate or a detach that was missed changes leading digits.
    eps = torch.finfo(theirs.dtype).eps
    distance, norm = _norm(ours - theirs), _norm(theirs)
    # A sum that cancels, as that of a bias before a batch norm, is nothing but its own rounding.
    is_rounding = max(norm, _norm(ours)) <= MOST_ROUNDING * eps * largest
    same_nan = torch.equal(ours.isnan(), theirs.isnan())
    if same_nan and (is_rounding or distance <= math.sqrt(eps) * norm):
        return ""
    return f"is {distance:.3g} away from the model's, whose norm is {norm:.3g}"


def _norm(gradient: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient.nan_to_num()))
