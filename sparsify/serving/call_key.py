"""What is compared of a call before anything else: cheap, and never a reason to run a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.autocast import autocast, is_any_on
from sparsify.recording.environment import saved_hooks
from sparsify.recording.recording import Args, Kwargs


def call_key(model: nn.Module, args: Args, kwargs: Kwargs) -> object:
    """Modes and the kinds of the arguments. Calls of one key can differ in all else."""
    modes = (
        *(model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        saved_hooks(True) is not None,
        autocast() if is_any_on() else (),
    )
    return modes, tuple([_kind(argument) for argument in args]), _kind(kwargs)


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        return type(value), value.layout, value.dtype, value.device, value.shape
    if isinstance(value, (tuple, list)):
        return type(value), tuple([_kind(element) for element in value])
    if isinstance(value, dict):
        return type(value), tuple(value), tuple([_kind(element) for element in value.values()])
    if pytree.tree_is_leaf(value):
        return type(value)
    leaves, structure = pytree.tree_flatten(value)  # a kind of container that others registered
    return str(structure), tuple([_kind(leaf) for leaf in leaves])
