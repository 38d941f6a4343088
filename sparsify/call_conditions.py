"""When a call has to run the original, whatever was compiled: asked at every call."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from sparsify.errors import Refusal, TraceError

COMPUTED = (BasePruningMethod, SpectralNorm, WeightNorm)  # hooks that make a weight, of tensors
HOOK_REMEDY = "Remove the hook, or register it on the whole model, where it keeps firing."


def is_intercepted() -> bool:
    """True if something watches torch operations: a mode, a transform, another compiler."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return True
    if not torch._C._len_torch_function_stack():
        return False
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def needs_grad(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_observed(model: nn.Module) -> Refusal | None:
    """A forward hook that would not fire: on a submodule, or on all modules.

    Masks of ``torch.nn.utils.prune`` and norms of ``torch.nn.utils`` are hooks that compute with
    tensors alone; they are recorded. Those of lazy modules are gone when their parameters are made.
    """
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module is not model and not all(map(_is_of_torch, hooks)):
            reason = f"A forward hook on {name!r} reads what runs inside of the kernels."
            return Refusal("observed", reason, HOOK_REMEDY)
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return Refusal("observed", "A forward hook is registered on all modules.", HOOK_REMEDY)
    return None


def _is_of_torch(hook: object) -> bool:
    makes_parameters = getattr(hook, "__func__", None) is LazyModuleMixin._infer_parameters
    return makes_parameters or isinstance(hook, COMPUTED)


def why_unmade(model: nn.Module) -> TraceError | None:
    """A parameter or buffer of a lazy module, which a first call makes."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            reason = f"{name!r} of a lazy module has no shape yet; call the model once before"
            return TraceError(reason, may_settle=True)
    return None
