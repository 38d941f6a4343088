"""A driver without a GPU, which keeps a log: compiled from NVIDIA's own header."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from sparsify.codegen.cuda.driver import Driver
from sparsify.codegen.toolchain import find_compiler, run_limited
from sparsify.errors import Refusal
from tests.cuda_wheels import cuda_include

SOURCE = Path(__file__).parent / "cuda" / "fake_driver.cpp"


class FakeDriver:
    """``driver`` is what the product sees; the rest is for the test."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fake_journal.restype = ctypes.c_char_p
        self.reset()
        self.driver = Driver(library)

    def reset(self, words: int = 0) -> None:
        """Forget everything. Launches pass ``words`` 8-byte words."""
        self._library.fake_reset(words)

    def answer(self, name: str, value: int) -> None:
        """Let the function ``name`` fail with the status ``value``, or an attribute be it."""
        self._library.fake_answer(name.encode(), value)

    def journal(self) -> list[str]:
        """What was called, a line each."""
        return str(self._library.fake_journal().decode()).splitlines()


def build_fake_driver(folder: Path) -> ctypes.CDLL:
    return build_with_cuda(SOURCE, folder / "libcuda.so.1")


def build_with_cuda(source: Path, out: Path) -> ctypes.CDLL:
    """The library of C++ code that includes NVIDIA's headers, written to ``out``."""
    compiler = find_compiler()
    assert not isinstance(compiler, Refusal)
    include = cuda_include()
    assert include is not None
    flags = ("-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    # Warnings of NVIDIA's own headers are none of ours.
    command = (*compiler.command, *flags, "-isystem", str(include), str(source), "-o", str(out))
    run_limited(command, 60)
    return ctypes.CDLL(str(out), mode=os.RTLD_NOW | os.RTLD_LOCAL)
