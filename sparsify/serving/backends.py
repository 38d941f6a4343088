"""Which backend serves a call: that of the device of its tensors, or the one that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from sparsify.choosing.binaries import Binaries
from sparsify.codegen.backend import Backend
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.compiling.compile_recording import Compiler
from sparsify.errors import BackendUnavailable, Refusal
from sparsify.options import Options
from sparsify.serving.emulation import emulated_device

MOVE = "Move the model and its inputs to one device."
NamedTensor = tuple[str, Tensor]


def make_backends(asked: str | None) -> dict[str, Backend]:
    """The backends by the type of device that they serve; the one that is asked for, or all.

    Nothing is compiled or looked for before a call needs it.
    """
    if asked == "cuda-emulated":
        return {"cpu": CudaBackend(emulated_device())}
    known: dict[str, Backend] = {"cpu": CppBackend(), "cuda": CudaBackend(Gpu())}
    return {device: each for device, each in known.items() if asked in (None, each.name)}


def require_backend(asked: str) -> Backend:
    """The backend of that name. Raises BackendUnavailable where it cannot run."""
    (backend,) = make_backends(asked).values()
    refusal = backend.why_unavailable() or backend.why_not_ready()
    if refusal is not None:
        raise BackendUnavailable(f"{refusal.reason} {refusal.remedy}".rstrip())
    return backend


class Compilers:
    """One compiler for each backend, with the kernels that it compiled for a model."""

    def __init__(self, options: Options, backends: Mapping[str, Backend] | None = None) -> None:
        self._asked = options.backend
        found = make_backends(options.backend) if backends is None else backends
        self._by_device = {
            device: Compiler(options, Binaries(backend)) for device, backend in found.items()
        }

    def serving(self, tensors: Iterable[NamedTensor]) -> Compiler | Refusal:
        """The compiler for a call with these tensors, or why no backend serves it."""
        device = find_device(tensors)
        if isinstance(device, Refusal):
            return device
        compiler = self._by_device.get(device.type)
        return compiler or self._refuse_device(device)

    @property
    def binaries(self) -> tuple[Binaries, ...]:
        return tuple(compiler.binaries for compiler in self._by_device.values())

    @contextmanager
    def ending_early(self) -> Iterator[None]:
        """No compiler begins after it with what might have been needed; see ``Binaries.begin``."""
        try:
            yield
        finally:
            for binaries in self.binaries:
                binaries.end_early()

    def _refuse_device(self, device: torch.device) -> Refusal:
        if self._asked is not None:
            served = ", ".join(self._by_device) or "no device"
            reason = f"backend={self._asked!r} serves tensors on {served}; these are on {device}."
            remedy = "Leave backend out, or move the model."
            if self._asked == "cuda" and device.type == "cpu":
                remedy += " backend='cuda-emulated' checks the same kernels on the processor."
            return Refusal("backend-unavailable", reason, remedy)
        served = " and ".join(device.upper() for device in self._by_device)
        reason = f"There is no backend for tensors on {device}."
        return Refusal("backend-unavailable", reason, f"Kernels run on {served}: move the model.")


def tensors_of(model: nn.Module, args: Any, kwargs: Any) -> Iterator[NamedTensor]:
    """What a call may read, by name: the arguments, then parameters and buffers that are made."""
    for path, leaf in pytree.tree_leaves_with_path((args, dict(kwargs))):
        if isinstance(leaf, Tensor):
            yield f"argument {pytree.keystr(path[1:]).strip('[]') or path[0]}", leaf
    stored = chain(model.named_parameters(), model.named_buffers())
    yield from (named for named in stored if not is_lazy(named[1]))


def find_device(tensors: Iterable[NamedTensor]) -> torch.device | Refusal:
    """The device that all are on; the CPU if there are none.

    Beside another device, numbers and indices may be on the CPU, as torch allows.
    """
    first: dict[torch.device, str] = {}
    beside: set[torch.device] = set()
    for name, tensor in tensors:
        if tensor.device.type == "cpu" and (not tensor.dim() or not tensor.is_floating_point()):
            beside.add(tensor.device)
        else:
            first.setdefault(tensor.device, name)
    if len(first) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in first.items())
        reason = f"The tensors of a call are on different devices: {places}."
        return Refusal("unsupported-layout", reason, MOVE)
    return next(iter([*first, *beside]), torch.device("cpu"))
