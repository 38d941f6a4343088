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
    if kwargs or not all(isinstance(argument, Tensor) for argument in args):
        return modes, _any_kinds(args, kwargs)
    return modes, tuple([_kind(argument) for argument in args])


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return type(tensor), tensor.layout, tensor.dtype, tensor.device, tensor.shape


def _any_kinds(args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
    leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
    kinds = tuple(_kind(leaf) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)
    return kinds, str(structure)
