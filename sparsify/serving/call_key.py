"""What is compared of a call before anything else: cheap, and never a reason to run a kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled, is_inference_mode_enabled, nn
from torch.utils import _pytree as pytree

from sparsify.autocast import autocast, is_any_on
from sparsify.recording.environment import saved_hooks
from sparsify.recording.recording import Args, Kwargs

ENDLESS = ("an argument contains itself",)  # what is found of it by then tells nothing


def call_key(model: nn.Module, args: Args, kwargs: Kwargs) -> object:
    """Modes and the kinds of the arguments. Calls of one key can differ in all else."""
    return modes(model), kinds(args, kwargs)


def modes(model: nn.Module) -> tuple[object, ...]:
    """What is on when ``model`` is called."""
    return (
        *(model.training, is_grad_enabled(), is_inference_mode_enabled()),
        saved_hooks(True) is not None,
        autocast() if is_any_on() else (),
    )


def kinds(args: Args, kwargs: Kwargs) -> tuple[object, ...]:
    """What tells the arguments of a call from others, but for the contents of tensors.

    ENDLESS for a list that contains itself, or so many of each other that Python gives up.
    """
    try:
        return tuple([_kind(argument) for argument in args]), _kind(kwargs) if kwargs else ()
    except RecursionError:
        return ENDLESS


def _kind(value: Any) -> object:
    if isinstance(value, Tensor):
        what = value.layout, value.dtype, value.device, value.requires_grad
        return type(value), what, None if value.is_nested else value.shape
    if isinstance(value, (tuple, list)):
        return type(value), tuple([_kind(element) for element in value])
    if isinstance(value, dict):
        return type(value), tuple(value), tuple([_kind(element) for element in value.values()])
    if pytree.tree_is_leaf(value):
        return type(value)
    leaves, structure = pytree.tree_flatten(value)  # a kind of container that others registered
    return str(structure), tuple([_kind(leaf) for leaf in leaves])
