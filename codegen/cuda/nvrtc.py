"""CUDA text to cubin through NVRTC, and what the assembler says about it. Needs no GPU or driver.

CuPy's low-level calls are used: its own ways to compile want a device and flush denormals to zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sparsify.codegen.backend import Source
from sparsify.codegen.cache import BuildFailed, Recipe, write_text
from sparsify.codegen.cuda.device import STATED
from sparsify.codegen.toolchain import current_cache
from sparsify.errors import BackendUnavailable, Refusal

SCHEMA = "1"  # raise it when entries of the cache are to be made anew
BINARY, LOG = "kernel.cubin", "ptxas.txt"
TARGETS = tuple(limits.architecture for limits in STATED)
"""What every kernel is compiled for in the tests."""
OLDEST = (7, 0)  # independent threads of a warp, on which kernels rely
INSTALL = "pip install 'sparsify-fx[cuda13]' (with a torch for CUDA 12: 'sparsify-fx[cuda12]')."


@dataclass(frozen=True)
class Usage:
    """What a thread, or a block, of a kernel needs: the assembler's answer."""

    registers: int
    shared_bytes: int
    """Static shared memory of a block."""
    stack_bytes: int
    spill_bytes: int


def why_unavailable() -> Refusal | None:
    """Why nothing can be compiled here; says what to install."""
    found = find_nvrtc()
    return found if isinstance(found, Refusal) else None


@cache
def find_nvrtc() -> Any | Refusal:
    """CuPy's module ``nvrtc`` with a library behind it, or why there is none."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        return Refusal("backend-unavailable", f"CuPy is not installed ({error}).", INSTALL)
    try:
        nvrtc.getVersion()
    except (RuntimeError, OSError, AssertionError) as error:  # CuPy's ways to say: no library
        reason = f"CuPy found no NVRTC ({str(error).strip().splitlines()[0]})."
        return Refusal("backend-unavailable", reason, INSTALL)
    return nvrtc


def nvrtc_version() -> tuple[int, int]:
    """Raises BackendUnavailable if there is no NVRTC."""
    major, minor = _require_nvrtc().getVersion()
    return int(major), int(minor)


def architecture_for(capability: tuple[int, int]) -> str | Refusal:
    """The target for a device of ``capability``: its own, or an earlier one whose code it runs."""
    named = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        reason = f"The GPU has {named}; kernels need at least {OLDEST[0]}.{OLDEST[1]}."
        return Refusal("backend-unavailable", reason, "Use a GPU of 2017 or later, or the CPU.")
    supported = [divmod(int(number), 10) for number in _require_nvrtc().getSupportedArchs()]
    fitting = [c for c in supported if c[0] == capability[0] and c <= capability]
    if fitting:
        return "sm_{}{}".format(*max(fitting))
    version = ".".join(map(str, nvrtc_version()))
    reason = f"NVRTC {version} does not compile for {named}."
    newest = "a newer NVRTC" if capability > max(supported) else "CuPy and NVRTC of CUDA 12"
    return Refusal("backend-unavailable", reason, f"Install {newest}.")


def options_for(architecture: str, spills: bool) -> tuple[str, ...]:
    """No contraction, no flush to zero, exact division and root."""
    exact = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
    flags = ("-v",) if spills else ("-v", "-warn-spills", "-Werror")
    assembler = tuple(f"--ptxas-options={flag}" for flag in flags)
    return (f"--gpu-architecture={architecture}", "--std=c++17", *exact, "-lineinfo", *assembler)


def compile_cubin(
    source: Source, headers: Mapping[str, str], architecture: str, *, spills: bool = False
) -> Path:
    """The cubin of ``source`` for ``sm_XX``, from the cache or made now; its Usage lies beside it.

    ``headers`` are the files that it includes, by name. Without ``spills``, it is an error that a
    thread has more values than registers.
    Raises CompileError (log, path of the kept source) and BackendUnavailable (no NVRTC, or no
    folder to write to).
    """
    return current_cache().get(recipe_for(source, headers, architecture, spills))


def recipe_for(
    source: Source, headers: Mapping[str, str], architecture: str, spills: bool
) -> Recipe:
    """How to compile ``source``, and all that the result depends on."""
    options = options_for(architecture, spills)
    version = ".".join(map(str, nvrtc_version()))
    parts = {
        "schema": SCHEMA,
        "backend": "cuda",
        "text": source.text,
        **{f"header {file}": content for file, content in headers.items()},
        "architecture": architecture,
        "options": " ".join(options),
        "NVRTC version": version,
    }

    def build(folder: Path) -> None:
        cubin, log = _compile(source, headers, options, f"NVRTC {version}")
        (folder / BINARY).write_bytes(cubin)
        write_text(folder / LOG, log)

    files = {source.filename: source.text, **headers}
    return Recipe(source.entry, parts, files, source.filename, BINARY, build)


def usage_of(cubin: Path, entry: str) -> Usage:
    """What ``entry`` in a cubin of ``compile_cubin`` needs."""
    return parse_usage((cubin.parent / LOG).read_text(encoding="utf-8"), entry)


def parse_usage(log: str, entry: str) -> Usage:
    """Read the assembler's ``-v``. Raises ValueError if it says nothing of ``entry``."""
    of_entry = re.search(rf"Compiling entry function '{re.escape(entry)}'.*?Used .*?\n", log, re.S)
    if of_entry is None:
        raise ValueError(f"the assembler's log has no function {entry!r}:\n{log}")
    said = of_entry.group()

    def number(what: str) -> int:
        return sum(map(int, re.findall(rf"(\d+) bytes {what}", said)))

    registers = re.search(r"Used (\d+) registers", said)
    if registers is None:
        raise ValueError(f"the assembler's log has no registers of {entry!r}:\n{log}")
    spilled = max(number("spill stores"), number("spill loads"))
    return Usage(int(registers[1]), number("smem"), number("stack frame"), spilled)


def _compile(
    source: Source, headers: Mapping[str, str], options: Iterable[str], compiler: str
) -> tuple[bytes, str]:
    """The cubin and the log. Raises BuildFailed."""
    nvrtc = _require_nvrtc()
    names, texts = [_encode(name) for name in headers], [_encode(t) for t in headers.values()]
    # CuPy encodes strictly what it takes as str; a model's file name may hold anything.
    text = _encode(source.text).decode()
    program = nvrtc.createProgram(text, source.filename, texts, names)
    try:
        nvrtc.compileProgram(program, tuple(options))
        # CuPy strips a closing zero, which a cubin does not have: its last byte is lost, and is 0.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise BuildFailed(f"{compiler} rejected {source.filename}: {error}.", log) from error
    finally:
        nvrtc.destroyProgram(program)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="backslashreplace")


def _require_nvrtc() -> Any:
    nvrtc = find_nvrtc()
    if isinstance(nvrtc, Refusal):
        raise BackendUnavailable(f"{nvrtc.reason} {nvrtc.remedy}")
    return nvrtc
