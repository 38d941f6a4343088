"""Builds without a compiler for tests of the cache, and processes that use it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparsify.codegen import cache_folder
from sparsify.codegen.cache import BuildFailed, Recipe

SOMEBODY_ELSE = 12345


@dataclass
class Build:
    """A build step that counts how often it ran and copies the source to the binary."""

    runs: list[Path] = field(default_factory=list)

    def __call__(self, folder: Path) -> None:
        self.runs.append(folder)
        (folder / "kernel.so").write_bytes(b"compiled " + (folder / "kernel.cpp").read_bytes())


def recipe_of(
    text: str = "int x;\n",
    *,
    name: str = "kernel",
    build: Callable[[Path], None] | None = None,
    **parts: str,
) -> Recipe:
    labelled = {"text": text, "compiler version": "1", **parts}
    files = {"kernel.cpp": text}
    return Recipe(name, labelled, files, "kernel.cpp", "kernel.so", build or Build())


def workspaces(folder: Path) -> list[Path]:
    return list(folder.glob(f"{cache_folder.WORKSPACE_PREFIX}*"))


def in_child(function: Callable[[], bool]) -> int:
    """Fork; the child exits with 0 if ``function`` is true there. Its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if function() else 2
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fail(folder: Path) -> None:
    raise BuildFailed("c++ failed with exit status 1.", "kernel.cpp:1: error: expected a name\n")


def make_foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give ``path`` to somebody else, or, where that is not allowed, let the system say so."""
    try:
        os.chown(path, SOMEBODY_ELSE, -1)
        return
    except PermissionError:
        true_answer, given_away = os.fstat, path.stat()

    def answer(descriptor: int) -> os.stat_result:
        status = true_answer(descriptor)
        if not os.path.samestat(status, given_away):
            return status
        return os.stat_result([*status[:4], SOMEBODY_ELSE, *status[5:]])

    monkeypatch.setattr(os, "fstat", answer)
