"""The folder that compiled kernels lie in: only one that nobody else can write is ever used."""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WORKSPACE_PREFIX = ".making-"
STALE_AFTER_S = 3600.0  # far more than a compiler is given


@dataclass(frozen=True)
class CacheFolder:
    """A folder that was checked. ``private`` ones are temporary and die with the process."""

    path: Path
    private: bool


def cache_path() -> Path:
    """$SPARSIFY_CACHE, else ``sparsify`` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("SPARSIFY_CACHE"):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "sparsify"


@cache
def open_cache_folder(path: Path) -> CacheFolder:
    """The folder at ``path``, made if missing; if unfit a private one, with a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        return open_private_folder(path, "it is a link" if path.is_symlink() else str(error))
    try:
        reason = why_unfit(path, descriptor)
    finally:
        os.close(descriptor)
    if reason:
        return open_private_folder(path, reason)
    _remove_stale_workspaces(path)
    return CacheFolder(path, private=False)


def open_private_folder(instead_of: Path, reason: str) -> CacheFolder:
    """A temporary folder of this process, and a warning that says why it is needed."""
    warnings.warn(
        f"the kernel cache {instead_of} is not used: {reason}. Kernels are compiled anew by this"
        " process. Repair the folder or name another one in $SPARSIFY_CACHE.",
        RuntimeWarning,
        stacklevel=2,
    )
    path = Path(tempfile.mkdtemp(prefix="sparsify-"))
    atexit.register(_remove_private_folder, path, os.getpid())
    return CacheFolder(path, private=True)


def why_unfit(path: Path, descriptor: int) -> str | None:
    """Why code in the folder that is open as ``descriptor`` must not be run, or cannot be."""
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to user {os.geteuid()}"
    if mode := stat.S_IMODE(status.st_mode) & 0o077:
        return f"others may use it (mode {mode | 0o700:04o}); run: chmod 700 {path}"
    if os.fstatvfs(descriptor).f_flag & getattr(os, "ST_NOEXEC", 0):
        return "it lies on a file system that is mounted noexec"
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"everybody may replace it: {parent} can be written by all (no sticky bit)"
    return None


def read_own_file(path: Path) -> bytes | None:
    """The content of a regular file of this user; None if it is anything else.

    Neither the file nor the folder it lies in may be a link.
    """
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            file = os.open(path.name, flags, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError:
        return None
    with open(file, "rb") as stream:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        return stream.read()


def _remove_stale_workspaces(path: Path) -> None:
    """Remove what killed processes left; a living one finishes long before it is stale."""
    for workspace in path.glob(f"{WORKSPACE_PREFIX}*"):
        try:
            age_s = time.time() - workspace.lstat().st_mtime
        except FileNotFoundError:
            continue
        if age_s > STALE_AFTER_S:
            shutil.rmtree(workspace, ignore_errors=True)


def _remove_private_folder(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs this too when it exits
        shutil.rmtree(path, ignore_errors=True)
