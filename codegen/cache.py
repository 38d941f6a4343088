"""Compiled kernels on disk: one folder per entry, published whole and checked before it is loaded.

    <cache>/<name>-<key>/   entry.json  the labelled parts of the key, and the binary's sha256
                            kernel.cpp  the source and its headers, as they were compiled
                            kernel.so

An entry is built under a temporary name and renamed, so it is there completely or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import zip_longest
from pathlib import Path

from sparsify.codegen.cache_folder import (
    FAILED_PREFIX,
    WORKSPACE_PREFIX,
    CacheFolder,
    open_cache_folder,
    open_private_folder,
    read_own_file,
    remove_stale_workspaces,
)
from sparsify.errors import BackendUnavailable, CompileError

RECORD = "entry.json"
PUBLISH_ATTEMPTS = 3


class BuildFailed(Exception):
    """Raised by a build step; the cache keeps the sources and raises CompileError."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.message, self.log = message, log


@dataclass(frozen=True)
class Record:
    """What an entry says about itself."""

    sha256: str
    parts: dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """What makes an entry.

    ``parts`` are everything that the binary depends on, by label. ``files`` are written into the
    entry before ``build`` is called with its folder; ``build`` makes the file called ``binary``.
    """

    name: str
    parts: Mapping[str, str]
    files: Mapping[str, str]
    source: str
    binary: str
    build: Callable[[Path], None]

    @cached_property
    def entry(self) -> str:
        """The name of the entry's folder."""
        labelled = json.dumps(dict(self.parts), sort_keys=True).encode()
        return f"{self.readable_name}-{hashlib.sha256(labelled).hexdigest()[:32]}"

    @property
    def readable_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9_]+", "_", self.name)[:60]


class KernelCache:
    """The entries of one folder. Any number of threads and processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self._asked = path
        self._folder: CacheFolder | None = None
        self._known: dict[str, Path] = {}

    @property
    def path(self) -> Path:
        """The folder in use: the one asked for, or a private one if that must not be used."""
        return self._folder.path if self._folder else self._asked

    def get(self, recipe: Recipe) -> Path:
        """The binary of ``recipe``: remembered, found or built.

        Raises CompileError if its build step fails, BackendUnavailable if no folder can be used.
        """
        known = self._known.get(recipe.entry)
        if known and known.exists():
            return known
        try:
            self._open()
            binary = self.find(recipe) or self._make(recipe)
        except OSError as error:
            remedy = "Name a folder of your own in $SPARSIFY_CACHE."
            raise BackendUnavailable(f"Kernels cannot be stored: {error}. {remedy}") from error
        self._known[recipe.entry] = binary
        return binary

    def find(self, recipe: Recipe) -> Path | None:
        """The binary of ``recipe`` if it is here and its content is what was written."""
        binary = self.path / recipe.entry / recipe.binary
        record = read_record(binary.parent)
        if record is None or record.parts != dict(recipe.parts) or not is_intact(binary):
            return None
        return binary

    def explain_miss(self, recipe: Recipe) -> str:
        """Which parts of the key differ from the most similar entry of the same name."""
        if self.find(recipe):
            return f"{recipe.entry} is in {self.path}"
        nearest: tuple[str, list[str]] | None = None
        for folder in sorted(self.path.glob(f"{recipe.readable_name}-*")):
            record = read_record(folder)
            if record is None:
                continue
            changes = describe_changes(record.parts, recipe.parts)
            if nearest is None or len(changes) < len(nearest[1]):
                nearest = folder.name, changes
        if nearest is None:
            return f"nothing named {recipe.readable_name} was compiled into {self.path}"
        if not nearest[1]:
            return f"{nearest[0]} is in {self.path}, but its binary is not what was written"
        return f"differs from {nearest[0]} in {'; '.join(nearest[1])}"

    def _open(self) -> None:
        """Check the folder anew: it may have been changed or removed since the last kernel."""
        if self._folder is None or not self._folder.private:
            self._folder = open_cache_folder(self._asked)
        elif not self.path.is_dir():
            self._folder = open_private_folder(self.path, "it was removed")

    def _make(self, recipe: Recipe) -> Path:
        try:
            return self._build(recipe)
        except OSError as error:
            if self._folder and self._folder.private:
                raise
            self._folder = open_private_folder(self.path, f"it cannot be written ({error})")
            return self._build(recipe)

    def _build(self, recipe: Recipe) -> Path:
        remove_stale_workspaces(self.path)
        workspace = Path(tempfile.mkdtemp(prefix=WORKSPACE_PREFIX, dir=self.path))
        try:
            for file, text in recipe.files.items():
                write_text(workspace / file, text)
            recipe.build(workspace)
            content = read_own_file(workspace / recipe.binary)
            if content is None:
                raise BuildFailed(f"The build of {recipe.name} made no {recipe.binary}.", "")
            record = {"sha256": hashlib.sha256(content).hexdigest(), "parts": dict(recipe.parts)}
            write_text(workspace / RECORD, json.dumps(record, indent=1))
            return self._publish(recipe, workspace)
        except BuildFailed as failure:
            source = self._keep_failed(recipe, workspace, failure.log) / recipe.source
            raise CompileError(failure.message, failure.log, str(source)) from None
        except BaseException:  # also an interrupt: nothing half-made stays
            shutil.rmtree(workspace, ignore_errors=True)
            raise

    def _publish(self, recipe: Recipe, workspace: Path) -> Path:
        """Give the finished workspace its name, unless another process was first."""
        entry = self.path / recipe.entry
        for _ in range(PUBLISH_ATTEMPTS):
            try:
                workspace.rename(entry)
                return entry / recipe.binary
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if found := self.find(recipe):
                shutil.rmtree(workspace, ignore_errors=True)
                return found
            self._remove_entry(entry)
        return workspace / recipe.binary  # others keep changing the entry; ours is as good

    def _remove_entry(self, entry: Path) -> None:
        """Remove a broken entry, or whatever else lies under its name."""
        aside = Path(tempfile.mkdtemp(prefix=WORKSPACE_PREFIX, dir=self.path))
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            entry.rename(aside / "broken")
        shutil.rmtree(aside, ignore_errors=True)

    def _keep_failed(self, recipe: Recipe, workspace: Path, log: str) -> Path:
        """Keep the sources and the log of a build that failed; only the last of each entry."""
        kept = self.path / f"{FAILED_PREFIX}{recipe.entry}"
        try:
            write_text(workspace / "log.txt", log)
            self._remove_entry(kept)
            return workspace.rename(kept)
        except OSError:  # a full disk, or another process failed with the same sources just now
            return workspace


@cache
def open_cache(path: Path) -> KernelCache:
    """The cache in the folder ``path``; one per process, which remembers what it found."""
    return KernelCache(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. File names and comments of a model may hold what UTF-8 cannot: escaped."""
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def read_record(entry: Path) -> Record | None:
    """What ``entry`` says about itself, or None if that is missing or damaged."""
    content = read_own_file(entry / RECORD)
    try:
        record = json.loads(content or b"null")
        return Record(str(record["sha256"]), {str(k): str(v) for k, v in record["parts"].items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def is_intact(binary: Path) -> bool:
    """True if ``binary`` is a file of this user with the content that its entry recorded."""
    record, content = read_record(binary.parent), read_own_file(binary)
    if record is None or content is None:
        return False
    return hashlib.sha256(content).hexdigest() == record.sha256


def describe_changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One sentence per part that differs, labelled, with its first different line."""
    changes = []
    for label in sorted({*old, *new}):
        before, after = old.get(label, "").splitlines(), new.get(label, "").splitlines()
        for number, (a, b) in enumerate(zip_longest(before, after, fillvalue=""), start=1):
            if a != b:
                where = f" (line {number})" if max(len(before), len(after)) > 1 else ""
                changes.append(f"{label}{where}: {a!r} became {b!r}")
                break
    return changes
