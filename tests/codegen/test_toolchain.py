"""The system's compiler: found or refused, its flags exact, its failures explained."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify.codegen import toolchain
from sparsify.codegen.cache import BuildFailed, open_cache
from sparsify.codegen.toolchain import (
    ALONE,
    Compiler,
    compile_flags,
    compile_shared_library,
    explain_miss,
    features_of,
    find_compiler,
    load_library,
    only_gcc,
    run_limited,
    why_unavailable,
)
from sparsify.errors import BackendUnavailable, CompileError, Refusal

ROOT = Path(__file__).parents[2]
EXPORT = 'extern "C" __attribute__((visibility("default"))) '
ADD = EXPORT + "int add(int a, int b) { return a + b; }\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def real_compiler() -> str:
    compiler = find_compiler()
    assert isinstance(compiler, Compiler), "the tests of this file need a C++ compiler"
    return shlex.join(compiler.command)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- compiling and loading ---


def test_library_is_compiled_and_called() -> None:
    library = load_library(compile_shared_library(ADD, "add"))
    assert library["add"](20, 22) == 42


def test_second_time_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    path = compile_shared_library(ADD, "add")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert compile_shared_library(ADD, "add") == path
    open_cache.cache_clear()  # as another process, which has not seen it
    assert compile_shared_library(ADD, "add") == path


def test_library_is_opened_once() -> None:
    path = compile_shared_library(ADD, "add")
    assert load_library(path) is load_library(path)


def test_headers_lie_beside_the_source(own_cache: Path) -> None:
    text = f'#include "runtime.h"\n#include "mine.h"\n{EXPORT} int f() {{ return MINE; }}\n'
    libraries = [
        compile_shared_library(text, "f", headers={"mine.h": f"#define MINE {value}\n"})
        for value in (1, 2)
    ]
    assert [load_library(path)["f"]() for path in libraries] == [1, 2]
    assert (libraries[1].parent / "mine.h").read_text() == "#define MINE 2\n"


def test_changed_binary_is_not_loaded() -> None:
    path = compile_shared_library(ADD, "add")
    os.truncate(path, 100)
    with pytest.raises(OSError, match=r"is not what was compiled; it was not loaded. Delete /"):
        load_library(path)
    open_cache.cache_clear()
    assert load_library(compile_shared_library(ADD, "add"))["add"](1, 2) == 3


def test_library_that_needs_what_is_not_there_cannot_be_loaded() -> None:
    text = f"{EXPORT}int missing_anywhere(); {EXPORT}int f() {{ return missing_anywhere(); }}"
    path = compile_shared_library(text, "f")
    with pytest.raises(OSError, match="missing_anywhere"):
        load_library(path)


def test_nothing_of_two_libraries_is_shared() -> None:
    """Variables of a header are exported as unique in the process unless that is prevented."""
    text = f'#include "counter.h"\n{EXPORT}int count() {{ return ++counter(); }}\n'
    header = "inline int& counter() { static int value = 0; return value; }\n"
    libraries = [
        load_library(compile_shared_library(f"// {i}\n{text}", "f", headers={"counter.h": header}))
        for i in (1, 2)
    ]
    assert [library["count"]() for library in libraries] == [1, 1]


# --- exactness ---

ARITHMETIC = f"""
{EXPORT}float product_and_sum(float a, float b, float c) {{ return a * b + c; }}
{EXPORT}double reassociated(double a, double b) {{ return (a + b) - a; }}
{EXPORT}float halved(float a) {{ return a / 2; }}
{EXPORT}int is_nan(float a) {{ return a != a; }}
"""


def check_exact(library: ctypes.CDLL) -> None:
    product_and_sum, reassociated = library["product_and_sum"], library["reassociated"]
    product_and_sum.argtypes, product_and_sum.restype = [ctypes.c_float] * 3, ctypes.c_float
    reassociated.argtypes, reassociated.restype = [ctypes.c_double] * 2, ctypes.c_double
    almost_one = 1 + 2.0**-12
    # The product is 1 + 2^-11 + 2^-24; rounded to float32 it loses 2^-24, fused it would not.
    assert product_and_sum(almost_one, almost_one, -1.0) == 2.0**-11
    assert reassociated(1e300, 1.0) == 0.0
    check_denormals(library)
    assert library["is_nan"](ctypes.c_float(float("nan"))) == 1


def check_denormals(library: ctypes.CDLL) -> None:
    halved = library["halved"]
    halved.argtypes, halved.restype = [ctypes.c_float], ctypes.c_float
    assert halved(2.0**-126) == 2.0**-127


def test_compiled_arithmetic_is_exact() -> None:
    check_exact(load_library(compile_shared_library(ARITHMETIC, "exact")))


def test_flags_forbid_contraction_and_fast_math() -> None:
    flags = compile_flags()
    assert "-ffp-contract=off" in flags
    # -fno-fast-math sets several options anew: those that are meant must come after it.
    assert flags.index("-fno-fast-math") < flags.index("-ffp-contract=off")
    assert not {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"} & set(flags)


def test_options_of_gcc_are_given_to_no_other_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, wanted in (
        ("c++ (Debian 12.2.0) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.", 1),
        ("Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu", 0),
    ):
        found = Compiler(("c++",), version)
        monkeypatch.setattr(toolchain, "find_compiler", lambda found=found: found)
        assert only_gcc("-fpeel-loops") == ("-fpeel-loops",) * wanted
    refused = Refusal("backend-unavailable", "There is none.")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: refused)
    assert only_gcc("-fpeel-loops") == ()


def test_what_is_linked_alone_has_the_functions_of_c_and_of_the_compiler() -> None:
    text = """
#include <cmath>
#include <cstdint>
#define SHARED extern "C" __attribute__((visibility("default")))
SHARED int64_t middle(int64_t a, int64_t b) { return static_cast<__int128>(a) * a / b; }
SHARED double rest(double a, double b) { return std::fmod(a, b); }
"""
    library = load_library(compile_shared_library(text, "alone", options=only_gcc(*ALONE)))
    middle, rest = library["middle"], library["rest"]
    middle.argtypes, middle.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    rest.argtypes, rest.restype = [ctypes.c_double] * 2, ctypes.c_double
    assert middle(1 << 40, 1 << 41) == 1 << 39  # a function of the compiler divides
    assert rest(7.5, 2.0) == 1.5


FLUSH_PROBE = """
import sys
sys.path.insert(0, {root!r})
from tests.codegen.test_toolchain import ARITHMETIC, check_exact
from sparsify.codegen.toolchain import compile_shared_library, load_library
check_exact(load_library(compile_shared_library(ARITHMETIC, "exact")))
assert 5e-324 / 1 > 0 and 2.0**-1022 / 2 > 0, "this process flushes denormals"
"""


@pytest.mark.parametrize("flag", ["-ffast-math", "-Ofast"])
def test_fast_math_in_CXX_is_taken_back(real_compiler: str, flag: str) -> None:
    """In a process of its own: what such a library does on loading cannot be undone."""
    environment = {**os.environ, "CXX": f"{real_compiler} {flag}"}
    probe = FLUSH_PROBE.format(root=str(ROOT))
    subprocess.run([sys.executable, "-c", probe], env=environment, cwd=ROOT, check=True)


# --- finding a compiler ---


def test_compiler_is_found() -> None:
    compiler = find_compiler()
    assert isinstance(compiler, Compiler)
    assert os.path.isabs(compiler.command[0])
    assert compiler.version
    assert why_unavailable() is None


def test_no_compiler_is_refused_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    refusal = why_unavailable()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "backend-unavailable"
    assert refusal.reason == (
        "No C++ compiler runs (c++: not found; g++: not found; clang++: not found)."
    )
    assert refusal.remedy == toolchain.INSTALL[sys.platform]
    assert "nstall" in refusal.remedy
    with pytest.raises(BackendUnavailable, match=r"No C\+\+ compiler runs.*nstall.*\$CXX"):
        compile_shared_library(ADD, "add")


def test_remedy_of_no_compiler_works(
    real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert why_unavailable()
    monkeypatch.setenv("CXX", real_compiler)
    assert why_unavailable() is None
    monkeypatch.setenv("PATH", system_path)  # the compiler itself needs its assembler
    assert load_library(compile_shared_library(ADD, "add"))["add"](1, 1) == 2


def test_next_compiler_is_asked_if_one_does_not_run(
    real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "c++", "echo cannot start >&2; exit 1")
    script(tmp_path / "g++", f'exec {real_compiler} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    compiler = find_compiler()
    assert isinstance(compiler, Compiler)
    assert compiler.command == (str(tmp_path / "g++"),)


BROKEN = [
    ("no-such-compiler", "not found"),
    ("/no/such/compiler -O2", "not found"),
    ('"unbalanced', "No closing quotation"),
    ("''", "not found"),
]


@pytest.mark.parametrize(("chosen", "why"), BROKEN)
def test_compiler_in_CXX_that_does_not_run_is_refused(
    chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", chosen)
    refusal = find_compiler()
    assert isinstance(refusal, Refusal)
    assert refusal.reason == f"The compiler that $CXX names does not run ({chosen}: {why})."


def test_file_that_is_no_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c++").write_bytes(b"\x7fELF of no machine")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    refusal = find_compiler()
    assert isinstance(refusal, Refusal)
    assert "cannot be run" in refusal.reason


def test_system_without_this_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    refusal = find_compiler()
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.remedy) == ("backend-unavailable", "Use Linux or macOS.")


def test_relative_compiler_runs_in_another_folder(
    real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "mine", f'exec {real_compiler} "$@"')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./mine -DADDED=40")
    path = compile_shared_library(EXPORT + "int f() { return ADDED + 2; }", "f")
    assert load_library(path)["f"]() == 42


# --- compilers that fail ---


def test_rejected_text_raises_with_log_and_kept_source(own_cache: Path) -> None:
    with pytest.raises(CompileError) as failed:
        compile_shared_library("int f() { return undeclared_name; }", "wrong")
    assert "undeclared_name" in failed.value.log
    source = Path(failed.value.source_path)
    assert source.parent.parent == own_cache
    assert source.read_text() == "int f() { return undeclared_name; }"
    assert (source.parent / "runtime.h").exists()  # so that it can be compiled by hand
    assert "failed with exit status 1" in str(failed.value)


def test_compiler_that_says_it_succeeded_but_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "echo")
    with pytest.raises(CompileError, match=r"made no kernel\.so"):
        compile_shared_library(ADD, "add")


def test_compiler_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    hang = f'[ "$1" = --version ] && exit 0\nsleep 60 & echo $! > {pid_file}\nwait'
    monkeypatch.setenv("CXX", script(tmp_path / "slow", hang))
    started = time.monotonic()
    with pytest.raises(CompileError, match=r"did not finish within 0\.5 s"):
        compile_shared_library(ADD, "add", limit_s=0.5)
    assert time.monotonic() - started < 30
    assert is_gone(int(pid_file.read_text()))


def is_gone(process: int) -> bool:
    """True if it ended; it may not have been waited for by whoever adopted it."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def test_interrupt_ends_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    program = script(tmp_path / "slow", f"echo $$ > {pid_file}\nsleep 60")

    def interrupt(*arguments: object, **options: object) -> None:
        while not (pid_file.exists() and pid_file.read_text().strip()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_limited((program,), 50)
    assert is_gone(int(pid_file.read_text()))


def test_a_compiler_shares_the_session_whose_niceness_counts() -> None:
    """And leads a group of its own, which is ended with it."""
    told = "import os; print(os.getpid() == os.getpgrp(), os.getsid(0))"
    assert run_limited((sys.executable, "-c", told), 20).split() == ["True", str(os.getsid(0))]


def test_output_of_a_compiler_need_not_be_text(tmp_path: Path) -> None:
    program = script(tmp_path / "binary", "printf '\\377error'; exit 3")
    with pytest.raises(BuildFailed, match="exit status 3") as failed:
        run_limited((program,), 20)
    assert failed.value.log == "\ufffderror"


# --- what the key depends on ---


def test_new_version_of_the_compiler_compiles_anew(
    real_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "wrapper"
    text = f'[ "$1" = --version ] && echo mine VERSION && exit 0\nexec {real_compiler} "$@"'
    monkeypatch.setenv("CXX", script(wrapper, text.replace("VERSION", "1")))
    old = compile_shared_library(ADD, "add")
    assert explain_miss(ADD, "add") == f"{old.parent.name} is in {old.parent.parent}"
    script(wrapper, text.replace("VERSION", "2"))
    os.utime(wrapper, ns=(1, 1))  # file times may be too coarse for two writes in a row
    assert "compiler version: 'mine 1' became 'mine 2'" in explain_miss(ADD, "add")
    assert compile_shared_library(ADD, "add") != old


def test_flags_and_headers_explain_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_shared_library(ADD, "add", headers={"mine.h": "1"})
    miss = explain_miss(ADD, "add", headers={"mine.h": "2"})
    assert "in header mine.h: '1' became '2'" in miss
    flags = compile_flags()
    monkeypatch.setattr(toolchain, "compile_flags", lambda: (*flags, "-g"))
    assert "in command: " in explain_miss(ADD, "add", headers={"mine.h": "1"})


CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
cpu MHz\t\t: 2000.1
flags\t\t: fpu  avx2

processor\t: 1
vendor_id\t: GenuineIntel
flags\t\t: fpu  avx2 avx512f
"""


def test_processor_is_known_by_what_it_can_run_and_not_by_its_clock() -> None:
    assert features_of(CPUINFO) == "vendor_id : GenuineIntel\ncpu family : 6\nflags : fpu avx2"


def test_unknown_processor_is_not_shared_between_machines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: Path, **options: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", refuse)
    identity = toolchain.cpu_identity.__wrapped__()
    assert identity.endswith(f"the processor of {os.uname().nodename}")
