"""The last word on a recording: it must give the model's bits on inputs that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sparsify.keep_state import keep_state
from sparsify.recording.recording import Recording

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


def why_not_repeated(
    model: nn.Module, recording: Recording, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """How the recorded graph differs from the model on perturbed inputs; "" if it does not.

    Both start from the same state and random numbers, which are put back, and all that they return
    or leave in buffers is compared bit by bit: they run the same operations on the same shapes.
    """
    call = perturb((args, kwargs))
    try:
        expected = _run_model(model, call)
    except (RuntimeError, IndexError, ValueError):
        # The model takes no such values (an index out of range, say): the example must do.
        call = (args, kwargs)
        expected = _run_model(model, call)
    with keep_state(model, call):
        versions = _versions(call)
        operands = recording.calling.operands(*call)
        values = fx.Interpreter(recording.graph).run(*operands)
        got = _with_states(recording.calling.deliver(values, *call), model, call, versions)
    return _compare(got, expected)


def perturb(call: Call) -> Call:
    """The arguments with their elements in other places, so that values stay typical."""
    made: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = _moved(tensor)
        return made[id(tensor)]

    args, kwargs = pytree.tree_map_only(Tensor, moved, (call[0], dict(call[1])))
    return args, kwargs


def _moved(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0 or tensor.layout is not torch.strided or 0 in tensor.stride():
        return tensor
    source = tensor.detach()
    if source.is_floating_point() or source.is_complex():
        moved = source.flatten().roll(source.numel() // 3 + 1).view(source.shape)
        if torch.equal(moved, source):
            moved = source * 0.5
    elif source.dim() > 1:
        moved = source.roll(1, 0)  # columns may be indices of different ranges
    else:
        return tensor
    # The order of dims in memory decides which kernels torch runs.
    placed = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype)
    return placed.to(source.device).copy_(moved).requires_grad_(tensor.requires_grad)


def _run_model(model: nn.Module, call: Call) -> Any:
    with keep_state(model, call):
        versions = _versions(call)
        return _with_states(model.forward(*call[0], **call[1]), model, call, versions)


def _versions(call: Call) -> list[int | None]:
    """How often each tensor of the arguments was written; inference tensors do not count."""
    tensors = (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _with_states(
    result: Any, model: nn.Module, call: Call, versions: list[int | None]
) -> tuple[Any, ...]:
    """The result, and what buffers hold after the call, and arguments that were written."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    written = [
        tensor.clone() if version is None or tensor._version != version else None
        for tensor, version in zip(tensors, versions, strict=True)
    ]
    return result, buffers, written


def _compare(got: Any, expected: Any) -> str:
    ours, our_structure = pytree.tree_flatten(got)
    theirs, structure = pytree.tree_flatten(expected)
    if our_structure != structure:
        return f"it returns {our_structure} where the model returns {structure}"
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, Tensor):
            if a != b:
                return f"value {index} is {a!r} where the model gives {b!r}"
        elif a.shape != b.shape or a.dtype != b.dtype:
            return f"value {index} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        elif not _same(a, b):
            return f"{int((a != b).sum())} elements of value {index} differ from the model's"
    return ""


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)
