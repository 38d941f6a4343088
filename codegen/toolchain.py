"""Finds the system's C++ compiler; turns source text into a shared library, through the cache."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from sparsify.codegen.cache import BuildFailed, KernelCache, Recipe, is_intact, open_cache
from sparsify.codegen.cache_folder import cache_path
from sparsify.errors import BackendUnavailable, Refusal

SCHEMA = "1"  # raise it when entries of the cache are to be made anew
COMPILERS = ("c++", "g++", "clang++")
SOURCE, BINARY = "kernel.cpp", "kernel.so"
KERNEL_HEADERS = (
    "kernel.h",
    "ahead.h",
    "arrivals.h",
    "events.h",
    "fused.h",
    "scalar.h",
    "halves.h",
    "half_vectors.h",
    "bits.h",
    "elementary.h",
    "logarithms.h",
    "error_function.h",
    "restricted.h",
    "kept_rows.h",
    "kept_products.h",
    "masked_rows.h",
    "convolve.h",
)  # that kernel.h includes, and what generated kernels do beside it
# Of loops that run no further than a condition holds GCC makes two, which takes it a sixth of its
# time and gains nothing, as measured of packing.
UNSPLIT = "-fno-split-loops"
# Kernels throw nothing and need nothing of C++'s own library: to look through it takes the linker
# longer than all else that it does.
ALONE = ("-fno-exceptions", "-nodefaultlibs", "-lm", "-lgcc", "-lc")
COMPILE_LIMIT_S = 120.0
VERSION_LIMIT_S = 20.0
CPU_LABELS = (  # x86 and Arm
    *("vendor_id", "cpu family", "model", "flags"),
    *("Features", "CPU implementer", "CPU part"),
)
INSTALL = {
    "linux": "Install a C++ compiler (`apt install g++`, `dnf install gcc-c++`, `apk add g++` or"
    " `conda install gxx`), or name one in $CXX.",
    "darwin": "Install Apple's compiler with `xcode-select --install`, or name one in $CXX.",
}


@dataclass(frozen=True)
class Compiler:
    """A compiler that answered: its command and all that it says about its version."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | Refusal:
    """The compiler in $CXX, if that is set, else the first of c++, g++, clang++ that runs."""
    if sys.platform not in INSTALL:
        reason = f"The cpp backend does not support {sys.platform}."
        return Refusal("backend-unavailable", reason, "Use Linux or macOS.")
    chosen = os.environ.get("CXX", "").strip()
    found: list[str] = []
    for command in (chosen,) if chosen else COMPILERS:
        answer = _answer_of(command)
        if isinstance(answer, Compiler):
            return answer
        found.append(f"{command}: {answer}")
    asked = "The compiler that $CXX names does not run" if chosen else "No C++ compiler runs"
    return Refusal("backend-unavailable", f"{asked} ({'; '.join(found)}).", INSTALL[sys.platform])


def why_unavailable() -> Refusal | None:
    """Why no compiler can be used; says what to install."""
    compiler = find_compiler()
    return compiler if isinstance(compiler, Refusal) else None


@cache
def ask_version(command: tuple[str, ...], changed_ns: int) -> Compiler | str:
    """The compiler behind ``command``, or why it does not answer.

    ``changed_ns`` is its file's time of change, so that an update is noticed.
    """
    try:
        answer = run_limited((*command, "--version"), VERSION_LIMIT_S)
    except BuildFailed as failure:
        return f"{failure.message} {failure.log}".strip()
    return Compiler(command, answer)


def run_limited(command: tuple[str, ...], limit_s: float, folder: Path | None = None) -> str:
    """Run ``command`` in ``folder``; its output. Raises BuildFailed on failure or timeout."""
    environment = {**os.environ, "LC_ALL": "C"}
    if folder:
        environment["TMPDIR"] = str(folder)  # what a killed compiler leaves goes with the folder
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # So that the compiler's own children can be ended with it. In a session of its own
            # Linux would schedule it as another program is, whatever its niceness.
            process_group=0,
        )
    except OSError as error:
        raise BuildFailed(f"{command[0]} cannot be run: {error}.", "") from error
    with process:
        try:
            log, _ = process.communicate(timeout=limit_s)
        except BaseException as interruption:  # the limit, or the user
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(interruption, subprocess.TimeoutExpired):
                raise
            message = f"{command[0]} did not finish within {limit_s:g} s."
            raise BuildFailed(message, "") from interruption
    if process.returncode != 0:
        raise BuildFailed(f"{command[0]} failed with exit status {process.returncode}.", log)
    return log


def compile_flags() -> tuple[str, ...]:
    """Optimised for this machine, without anything that changes the value of an expression."""
    # Where -march is a family of processors, -mcpu names the one at hand.
    target = "-mcpu=native" if platform.machine() in ("arm64", "ppc64le") else "-march=native"
    # First takes back what $CXX may bring along; it would also bring back contraction.
    exact = ("-fno-fast-math", "-ffp-contract=off")
    # Neither errno nor the exception flags are read, so a choice may become a blend.
    unread = ("-fno-math-errno", "-fno-trapping-math")
    # Visible variables of a header would be one in the whole process, RTLD_LOCAL or not.
    own = "-fvisibility=hidden"
    return ("-std=c++17", "-O3", target, *exact, *unread, own, "-fPIC", "-shared")


def only_gcc(*options: str) -> tuple[str, ...]:
    """``options`` where the compiler is GCC; others may not know them."""
    compiler = find_compiler()
    is_gcc = isinstance(compiler, Compiler) and "Free Software Foundation" in compiler.version
    return options if is_gcc else ()


@cache
def cpu_identity() -> str:
    """What ``native`` means here: folders are shared between unequal machines."""
    try:
        if sys.platform == "darwin":
            answer = run_limited(("sysctl", "-n", "machdep.cpu"), VERSION_LIMIT_S)
        else:
            answer = features_of(Path("/proc/cpuinfo").read_text(errors="replace"))
    except (OSError, BuildFailed):
        answer = f"the processor of {platform.node()}"
    return f"{platform.machine()}\n{answer}"


def features_of(cpuinfo: str) -> str:
    """The lines of /proc/cpuinfo that say what code the first core can run."""
    first_core, *_ = cpuinfo.split("\n\n")
    lines = [" ".join(line.split()) for line in first_core.splitlines()]
    return "\n".join(line for line in lines if line.split(":")[0].strip() in CPU_LABELS)


def compile_shared_library(
    text: str,
    name: str,
    *,
    headers: Mapping[str, str] | None = None,
    limit_s: float = COMPILE_LIMIT_S,
    options: Sequence[str] = (),
) -> Path:
    """The shared library of ``text``, compiled or from the cache. ``#include "runtime.h"`` works.

    Functions to be found need ``extern "C" __attribute__((visibility("default")))``.
    ``headers`` are further files (name to text) that the source includes, ``options`` of the
    compiler come behind those of all sources.
    Raises CompileError (log, path of the kept source) and BackendUnavailable (no compiler, or no
    folder to write to).
    """
    return current_cache().get(recipe_for(text, name, headers or {}, limit_s, options))


def is_compiled(
    text: str, name: str, *, headers: Mapping[str, str], options: Sequence[str] = ()
) -> bool:
    """Whether ``compile_shared_library`` has nothing to compile, as far as can be told."""
    try:
        recipe = recipe_for(text, name, headers, COMPILE_LIMIT_S, options)
    except BackendUnavailable:
        return True
    return current_cache().find(recipe) is not None


def explain_miss(text: str, name: str, *, headers: Mapping[str, str] | None = None) -> str:
    """Why compiling ``text`` would not find it in the cache: which parts of its key are new."""
    return current_cache().explain_miss(recipe_for(text, name, headers or {}, COMPILE_LIMIT_S))


def current_cache() -> KernelCache:
    """The cache that the environment names at this moment."""
    return open_cache(cache_path())


def recipe_for(
    text: str, name: str, headers: Mapping[str, str], limit_s: float, options: Sequence[str] = ()
) -> Recipe:
    """How to compile ``text``, and all that the result depends on."""
    compiler = find_compiler()
    if isinstance(compiler, Refusal):
        raise BackendUnavailable(f"{compiler.reason} {compiler.remedy}")
    headers = {"runtime.h": read_source("runtime.h"), **headers}
    # Of libraries among the options only those are looked through that stand behind the source.
    command = (*compiler.command, *compile_flags(), SOURCE, *options, "-o", BINARY)
    parts = {
        "schema": SCHEMA,
        "backend": "cpp",
        "text": text,
        **{f"header {file}": content for file, content in headers.items()},
        "command": shlex.join(command),
        "compiler version": compiler.version,
        "CPU": cpu_identity(),
        "system": f"{platform.system()} {' '.join(platform.libc_ver())}",
    }

    def build(folder: Path) -> None:
        run_limited(command, limit_s, folder)

    return Recipe(name, parts, {SOURCE: text, **headers}, SOURCE, BINARY, build)


@cache
def read_source(file: str) -> str:
    """The text of a C++ file that backends share, or of one of the C++ backend's own."""
    shared = resources.files("sparsify.codegen")
    path = shared.joinpath(file)
    return (path if path.is_file() else shared.joinpath("cpp", file)).read_text(encoding="utf-8")


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """The library at ``path``, opened once per process; calls release the GIL.

    Raises OSError if it is not what the compiler wrote, or cannot be loaded.
    """
    return ctypes.CDLL(str(checked(path)), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def checked(path: Path) -> Path:
    """``path``, to be opened by name. Raises OSError if it is not what the compiler wrote.

    In between only this user can exchange it, because the cache lies in a folder that nobody else
    can write or replace.
    """
    if not is_intact(path):
        raise OSError(f"{path} is not what was compiled; it was not loaded. Delete {path.parent}.")
    return path


def _answer_of(command: str) -> Compiler | str:
    try:
        program, *arguments = shlex.split(command)
    except ValueError as error:
        return str(error)
    path = shutil.which(program)
    if path is None:
        return "not found"
    path = os.path.abspath(path)  # it will be run in another folder
    return ask_version((path, *arguments), os.stat(path).st_mtime_ns)
