"""Masks that hold: ``torch.nn.utils.prune``, with the state dict of the dense model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsify.pruning.prunable import Prunable


def set_mask(weight: Prunable, kept: Tensor) -> None:
    """Keep exactly the weights ``kept``; the mask is a buffer that later calls write into.

    It is one of bools, which is read in a quarter of the time; torch makes its own of floats.
    """
    if weight.is_masked:
        with torch.no_grad():
            weight.mask.copy_(kept)
        _refresh(weight.module, weight.name)
        return
    prune.custom_from_mask(weight.module, weight.name, kept)  # type: ignore[no-untyped-call]
    weight.module.register_buffer(f"{weight.name}_mask", kept.bool().clone())
    if _to_dense not in _hooks_of(weight.module):
        module: Any = weight.module  # torch leaves these two without annotations
        module.register_state_dict_post_hook(_to_dense)
        module.register_load_state_dict_pre_hook(_from_dense)


def remove_mask(weight: Prunable) -> None:
    """Write the zeros into the weight itself, which can be trained away from them then."""
    prune.remove(weight.module, weight.name)  # type: ignore[no-untyped-call]


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, of models that were called with masks too: torch copies no computed tensors."""
    for module in model.modules():
        for name in _masked(module):
            _refresh(module, name)
    return copy.deepcopy(model)


def _refresh(module: nn.Module, name: str) -> None:
    """What masks leave on their module, as the next call will compute it."""
    masked = module.get_buffer(f"{name}_mask") * module.get_parameter(f"{name}_orig").detach()
    setattr(module, name, masked)


def _masked(module: nn.Module) -> Iterator[str]:
    """The names of the tensors that torch.nn.utils.prune masks."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name


def _hooks_of(module: nn.Module) -> list[Any]:
    hooks: Any = module._state_dict_hooks
    return list(hooks.values())


def _to_dense(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """``weight`` in place of ``weight_orig`` and ``weight_mask``."""
    for name in _masked(module):
        orig, mask = f"{prefix}{name}_orig", f"{prefix}{name}_mask"
        if orig in state and mask in state:
            state[f"{prefix}{name}"] = state.pop(orig) * state.pop(mask)


def _from_dense(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """``weight_orig`` and ``weight_mask`` of ``weight``: what lacks more weights than the mask
    brings a mask of its own, what has more is cut by the one that is there."""
    for name in _masked(module):
        loaded = state.pop(f"{prefix}{name}", None)
        if loaded is None:
            continue
        mask = module.get_buffer(f"{name}_mask")
        brought = loaded != 0
        is_sparser = brought.shape == mask.shape and int(brought.sum()) <= int(mask.sum())
        state[f"{prefix}{name}_orig"] = loaded
        state[f"{prefix}{name}_mask"] = brought.to(mask.dtype) if is_sparser else mask
