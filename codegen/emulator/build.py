"""Compiles kernels and the emulator's runtime with gcc, through the cache."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from sparsify.codegen.backend import Source
from sparsify.codegen.cache import Recipe
from sparsify.codegen.emulator.shared_variables import find_entries, rewrite_shared
from sparsify.codegen.toolchain import (
    COMPILE_LIMIT_S,
    Compiler,
    cpu_identity,
    current_cache,
    find_compiler,
    load_library,
    run_limited,
)
from sparsify.errors import BackendUnavailable, Refusal

SCHEMA = "1"  # raise it when entries of the cache are to be made anew
LANGUAGE = (
    "cuda_language.h",
    "cuda_runtime_calls.h",
    "cuda_vectors.h",
    "cuda_arithmetic.h",
    "cuda_blocks.h",
    "cuda_warps.h",
    "cuda_atomics.h",
    "cuda_clusters.h",
)
RUNTIME = "runtime.cpp"  # includes the others
RUNTIME_FILES = (
    RUNTIME,
    "access_history.cpp",
    "access_hooks.cpp",
    "attempt.cpp",
    "barriers.cpp",
    "checks.cpp",
    "clocks.cpp",
    "fibre.cpp",
    "launch.cpp",
    "memory.cpp",
    "ordering.cpp",
    "races.cpp",
    "reports.cpp",
    "scheduler.cpp",
    "shared_memory.cpp",
    "traps.cpp",
    "undefined_hooks.cpp",
    "warps.cpp",
    "access_history.h",
    "attempt.h",
    "barriers.h",
    "checks.h",
    "clocks.h",
    "cuda_runtime_calls.h",
    "cuda_vectors.h",
    "fibre.h",
    "launch.h",
    "launch_request.h",
    "memory.h",
    "ordering.h",
    "races.h",
    "reports.h",
    "scheduler.h",
    "threads.h",
    "traps.h",
)
OBJECT, BINARY, RUNTIME_BINARY = "kernel.o", "kernel.so", "runtime.so"
OLDEST_GCC = 11  # the first that tells accesses to volatile apart
INSTALL = "Install gcc 11 or newer (`apt install g++`), or name it in $CXX."

# One rounding per operation, as --fmad=false has it. Type punning is common in CUDA text.
NUMBERS = ("-std=c++17", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-march=native")
FOR_ALL = (*NUMBERS, "-fno-strict-aliasing", "-fPIC", "-fvisibility=hidden", "-g1", "-w")
UNCHECKED = ("-O2",)
# gcc calls a function before each access to memory, and where something is undefined: these are
# in access_hooks.cpp and undefined_hooks.cpp, not in libtsan and libubsan.
CHECKED = (
    *("-O1", "-DEMULATOR_CHECKS"),
    "-fsanitize=thread",
    *("--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0"),
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)


def find_gcc() -> Compiler | Refusal:
    """The system's gcc, or why kernels cannot be emulated here."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        reason = f"The emulator of CUDA does not support {platform.machine()} on {sys.platform}."
        return Refusal("backend-unavailable", reason, "Use Linux on x86-64.")
    compiler = find_compiler()
    if isinstance(compiler, Refusal):
        return compiler
    if "Free Software Foundation" not in compiler.version:
        first_line = compiler.version.splitlines()[0]
        reason = f"The emulator of CUDA needs gcc, and the compiler here is {first_line}."
        return Refusal("backend-unavailable", reason, INSTALL)
    release = re.search(r"(\d+)\.\d+\.\d+", compiler.version)
    if release is None or int(release[1]) < OLDEST_GCC:
        reason = f"The emulator of CUDA needs gcc {OLDEST_GCC}, and here is {compiler.version}."
        return Refusal("backend-unavailable", reason, INSTALL)
    return compiler


def compile_kernel(source: Source, headers: Mapping[str, str], *, checks: bool) -> Path:
    """The library of ``source``, from the cache or made now.

    Raises CompileError and BackendUnavailable.
    """
    compiler = _gcc()
    runtime = current_cache().get(_runtime_recipe(compiler))
    exports = "".join(f"EMULATOR_EXPORT({entry})\n" for entry in find_entries(source.text))
    text = f"{rewrite_shared(source.text)}\n{exports}"
    kernel = source.filename  # reports name the lines of this file
    files = {
        kernel: text,
        **{file: rewrite_shared(content) for file, content in headers.items()},
        **{file: read_source(file) for file in LANGUAGE},
    }
    flags = (*FOR_ALL, *(CHECKED if checks else UNCHECKED))
    included = ("-include", LANGUAGE[0])
    make = (*compiler.command, *flags, *included, "-x", "c++", "-c", kernel, "-o", OBJECT)
    # Without -fsanitize, which would link libtsan.
    link = (*compiler.command, "-shared", OBJECT, "-o", BINARY)
    parts = {
        **_parts_of(compiler, make),
        **{f"file {file}": content for file, content in files.items()},
        "runtime": _runtime_name(),
    }

    def build(folder: Path) -> None:
        run_limited(make, COMPILE_LIMIT_S, folder)
        run_limited((*link, str(runtime)), COMPILE_LIMIT_S, folder)
        (folder / OBJECT).unlink()

    recipe = Recipe(f"emulated_{Path(kernel).stem}", parts, files, kernel, BINARY, build)
    return current_cache().get(recipe)


def load_kernel(path: Path) -> ctypes.CDLL:
    """The library of a kernel, which finds the runtime by its name once that is loaded."""
    load_runtime()
    return load_library(path)


@cache
def load_runtime() -> ctypes.CDLL:
    """The runtime: one in a process, for all kernels."""
    library = load_library(current_cache().get(_runtime_recipe(_gcc())))
    library.emulator_launch.restype = ctypes.c_void_p
    library.emulator_free_reports.argtypes = [ctypes.c_void_p]
    library.emulator_free_reports.restype = None
    return library


@cache
def read_source(file: str) -> str:
    """The text of a C++ file of this package."""
    folder = resources.files("sparsify.codegen.emulator")
    return folder.joinpath(file).read_text(encoding="utf-8")


def _gcc() -> Compiler:
    compiler = find_gcc()
    if isinstance(compiler, Refusal):
        raise BackendUnavailable(f"{compiler.reason} {compiler.remedy}")
    return compiler


def _runtime_recipe(compiler: Compiler) -> Recipe:
    files = {file: read_source(file) for file in RUNTIME_FILES}
    flags = ("-std=c++17", "-O2", "-fPIC", "-fno-semantic-interposition", "-w")
    link = ("-shared", f"-Wl,-soname,{_runtime_name()}")
    command = (*compiler.command, *flags, *link, RUNTIME, "-o", RUNTIME_BINARY)
    parts = {
        **_parts_of(compiler, command),
        **{f"file {file}": content for file, content in files.items()},
    }

    def build(folder: Path) -> None:
        run_limited(command, COMPILE_LIMIT_S, folder)

    return Recipe("cuda_emulator", parts, files, RUNTIME, RUNTIME_BINARY, build)


@cache
def _runtime_name() -> str:
    """By which kernels ask the loader for the runtime: it changes with the sources."""
    texts = "\0".join(read_source(file) for file in RUNTIME_FILES)
    return f"libsparsify-emulator-{hashlib.sha256(texts.encode()).hexdigest()[:16]}.so"


def _parts_of(compiler: Compiler, command: tuple[str, ...]) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "backend": "cuda-emulated",
        "command": shlex.join(command),
        "compiler version": compiler.version,
        "CPU": cpu_identity(),
        "system": f"{platform.system()} {' '.join(platform.libc_ver())}",
    }
