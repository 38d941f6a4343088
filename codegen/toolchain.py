"""Finds the system's C++ compiler and turns source text into a shared library, through the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import Refusal


@dataclass(frozen=True)
class Compiler:
    """A compiler that answered: its command line so far and the first line of its version."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | Refusal:
    """The first of $CXX (alone, if set), c++, g++, clang++ that runs."""
    raise NotImplementedError


def why_unavailable() -> Refusal | None:
    """Why no compiler can be used; says what to install."""
    raise NotImplementedError


def compile_shared_library(
    text: str, name: str, *, headers: Mapping[str, str] | None = None, limit_s: float = 120.0
) -> Path:
    """The shared library of ``text``, compiled or from the cache. ``#include "runtime.h"`` works.

    ``headers`` are further files (name to text) to lie beside the source.
    Raises CompileError (log, path of the kept source) and BackendUnavailable (no compiler).
    """
    raise NotImplementedError


def load_library(path: Path) -> ctypes.CDLL:
    """The library at ``path``, opened once per process; calls release the GIL."""
    raise NotImplementedError
