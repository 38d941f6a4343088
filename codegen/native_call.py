"""Calls like earlier ones, made in C++: an extension of Python that is compiled here, once for all.

Where it cannot be made, as without Python's headers, ``Prepared`` makes such calls in Python.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from sparsify.codegen.toolchain import checked, compile_shared_library, read_source
from sparsify.errors import BackendUnavailable, CompileError

NAME = "native_call"
HEADERS = ("read_tensors.h", "original_call.h", "call_sooner.h")
FOLDERS = ("include", "platinclude")  # of Python's headers
DLPACK = Path(torch.__file__).parent / "include/ATen/dlpack.h"

Repeater = Callable[..., tuple[torch.Tensor, ...] | None]
"""``repeater(frozen, *sequences)``: results of such a call, None where it is another one."""


class OriginalCall(Protocol):
    """A call that runs the original, made again: see original_call.h."""

    served: int

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any: ...


class NativeCall(Protocol):
    """The extension; see native_call.cpp."""

    def layouts_of(self, tensors: list[torch.Tensor]) -> bytes | None:
        """Their dtypes, devices, sizes and strides: equal where all are. None where unknown."""

    def repeater(self, *what: Any) -> Repeater | None:
        """Called by ``Prepared.repeater``; None for tensors that it cannot read."""

    def original_call(self, *what: Any) -> OriginalCall | None:
        """Called by ``last_original``; None for calls that it cannot tell from others."""

    def call_sooner(self, cls: type, *what: Any) -> None:
        """Called by ``hasten``: from now on calls of modules of ``cls`` run no line of Python."""


class Loading:
    """Loads the extension in another thread, which compiles it if need be."""

    def __init__(self) -> None:
        self._begun: Future[NativeCall | None] | None = None
        self._process = os.getpid()

    def begin(self) -> None:
        """Begin, unless it is loaded or a thread of this process does it; a fork has none."""
        is_here = self._process == os.getpid()
        if self._begun is None or not (is_here or self._begun.done()):
            self._process = os.getpid()
            pool = ThreadPoolExecutor(max_workers=1)
            self._begun = pool.submit(load_native_call)
            pool.shutdown(wait=False)

    def is_awaited(self) -> bool:
        """Whether it may be there later, and is not yet."""
        return self._begun is not None and not self._begun.done()

    def now(self) -> NativeCall | None:
        return self._begun.result() if self._begun is not None and self._begun.done() else None


@cache
def loading() -> Loading:
    """The one of this process. Whoever makes calls that are like others begins."""
    return Loading()


def native_call() -> NativeCall | None:
    """The extension, if it is there by now."""
    return loading().now()


@cache
def load_native_call() -> NativeCall | None:
    """The extension, compiled if need be; None where that is not possible."""
    folders = [Path(sysconfig.get_path(folder)) for folder in FOLDERS]
    without_lock = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # it relies on the lock
    has_headers = DLPACK.exists() and (folders[0] / "Python.h").exists()
    if without_lock or not has_headers or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    try:
        return _load(compile_native_call(folders))
    except (BackendUnavailable, CompileError, ImportError, OSError):
        return None


def compile_native_call(folders: Sequence[Path]) -> Path:
    """Compile it with Python's headers in ``folders``. Raises as ``compile_shared_library``."""
    options = [f"-I{folder}" for folder in dict.fromkeys(folders)]
    if sys.platform == "darwin":
        options += ["-undefined", "dynamic_lookup"]
    headers = {name: read_source(name) for name in HEADERS}
    headers["dlpack.h"] = DLPACK.read_text(encoding="utf-8")
    text = read_source(f"{NAME}.cpp")
    return compile_shared_library(text, NAME, headers=headers, options=options)


def _load(path: Path) -> NativeCall:
    loader = ExtensionFileLoader(NAME, str(checked(path)))
    spec = spec_from_loader(NAME, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return cast(NativeCall, module)
