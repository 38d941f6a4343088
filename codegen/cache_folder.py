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
from pathlib import Path

WORKSPACE_PREFIX = ".making-"
FAILED_PREFIX = "failed-"
STALE_AFTER_S = 3600.0  # far more than a compiler is given
# None is the folder for temporary files of this process; the others may allow execution.
PRIVATE_PLACES = (None, "/var/tmp", "/dev/shm")


@dataclass(frozen=True)
class CacheFolder:
    """A folder that was checked. ``private`` ones are temporary and die with the process."""

    path: Path
    private: bool


def cache_path() -> Path:
    """$SPARSIFY_CACHE, else ``sparsify`` in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("SPARSIFY_CACHE"):
        return Path(os.path.expanduser(chosen)).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification says that a relative path is to be ignored
        return Path(base) / "sparsify"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "sparsify"
    # A user without a home. Others may know this name, but what they put there is not used.
    return Path(tempfile.gettempdir()).absolute() / f"sparsify-{os.geteuid()}"


def open_cache_folder(path: Path) -> CacheFolder:
    """The folder at ``path``, made if missing; if unfit a private one, with a warning.

    Raises OSError if there is no place for a private one either.
    """
    reason = "it is a link" if os.path.islink(path) else make_or_object(path)
    if reason:
        return open_private_folder(path, reason)
    return CacheFolder(path, private=False)


def make_or_object(path: Path) -> str | None:
    """Make the folder if it is missing; why it must not be used, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        return why_unfit(path)
    except OSError as error:
        return str(error)


def open_private_folder(instead_of: Path, reason: str) -> CacheFolder:
    """A temporary folder of this process, and a warning that says why it is needed."""
    warnings.warn(
        f"the kernel cache {instead_of} is not used: {reason}. Kernels are compiled anew by this"
        " process. Repair the folder or name another one in $SPARSIFY_CACHE.",
        RuntimeWarning,
        stacklevel=2,
    )
    objections = []
    for place in PRIVATE_PLACES:
        try:
            path = Path(tempfile.mkdtemp(prefix="sparsify-", dir=place)).absolute()
        except OSError as error:
            objections.append(str(error))
            continue
        if objection := why_unfit(path):
            objections.append(f"{path.parent}: {objection}")
            path.rmdir()
            continue
        atexit.register(_remove_private_folder, path, os.getpid())
        return CacheFolder(path, private=True)
    raise OSError(f"no folder is fit for compiled kernels ({'; '.join(objections)})")


def why_unfit(path: Path) -> str | None:
    """Why code in the folder ``path`` must not be run, or cannot be. Raises OSError for a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status, system = os.fstat(descriptor), os.fstatvfs(descriptor)
    finally:
        os.close(descriptor)
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to user {os.geteuid()}"
    if mode := stat.S_IMODE(status.st_mode) & 0o077:
        return f"others may use it (mode {mode | 0o700:04o}); run: chmod 700 {path}"
    if system.f_flag & getattr(os, "ST_NOEXEC", 0):
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


def remove_stale_workspaces(path: Path) -> None:
    """Remove what killed processes left; a living one finishes long before it is stale."""
    for workspace in path.glob(f"{WORKSPACE_PREFIX}*"):
        try:
            age_s = time.time() - workspace.lstat().st_mtime
        except FileNotFoundError:
            continue
        if age_s > STALE_AFTER_S:
            shutil.rmtree(workspace, ignore_errors=True)


def _remove_private_folder(path: Path, owner: int) -> None:
    """Remove all but the sources of failed builds, whose path the user was told."""
    if os.getpid() != owner or not path.is_dir():  # a forked child runs this too when it exits
        return
    for entry in path.iterdir():
        if not entry.name.startswith(FAILED_PREFIX):
            shutil.rmtree(entry, ignore_errors=True)
    if not any(path.iterdir()):
        path.rmdir()
