"""The folder of the cache: one that others can write is replaced by a private one."""

from __future__ import annotations

import errno
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparsify.codegen import cache_folder
from sparsify.codegen.cache import KernelCache, is_intact
from sparsify.errors import BackendUnavailable, CompileError
from tests.cached_builds import (
    SOMEBODY_ELSE,
    fail,
    make_foreign,
    recipe_of,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def own_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


# --- folders that must not be used ---


def link(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")
    return path


def dangling_link(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.symlink_to("nowhere")
    return path


def file(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_text("not a folder")
    return path


def below_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_text("not a folder")
    return path / "below"


def foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.mkdir(mode=0o700)
    make_foreign(path, monkeypatch)
    return path


def readable_by_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.mkdir()
    path.chmod(0o755)
    return path


def in_a_folder_of_everybody(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.mkdir()
    path.chmod(0o777)
    return path / "mine"


def not_executable(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    true_answer = os.fstatvfs

    def answer(descriptor: int) -> os.statvfs_result:
        values = list(true_answer(descriptor))
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            values[8] |= os.ST_NOEXEC
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "fstatvfs", answer)
    return path


def unwritable_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return Path("/proc/sparsify")  # where nobody can make a folder, the superuser included


def name_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return path / ("x" * 300)


UNFIT = [
    (link, "it is a link"),
    (dangling_link, "it is a link"),
    (file, "File exists"),
    (below_a_file, "Not a directory|File exists"),
    (foreign, "it belongs to user"),
    (readable_by_others, "others may use it .mode 0755.; run: chmod 700"),
    (in_a_folder_of_everybody, "everybody may replace it"),
    (not_executable, "noexec"),
    (unwritable_file_system, "/proc/sparsify"),
    (name_too_long, "File name too long"),
]


@pytest.mark.parametrize(("spoil", "reason"), UNFIT, ids=lambda p: getattr(p, "__name__", None))
def test_unfit_folder_is_replaced_by_a_private_one_with_a_warning(
    folder: Path,
    own_place_for_temporary_files: Path,
    spoil: Callable[[Path, pytest.MonkeyPatch], Path],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = spoil(folder, monkeypatch)
    cache = KernelCache(path)
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        binary = cache.get(recipe_of())
    assert f"the kernel cache {path} is not used" in str(caught[0].message)
    assert "$SPARSIFY_CACHE" in str(caught[0].message)
    assert binary.is_relative_to(own_place_for_temporary_files)
    assert cache.path.stat().st_mode & 0o777 == 0o700
    assert is_intact(binary)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        cache.get(recipe_of("int y;"))


def test_owner_is_asked_of_the_open_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY_ELSE)
    reason = cache_folder.why_unfit(folder)
    assert reason == f"it belongs to user {folder.stat().st_uid}, not to user {SOMEBODY_ELSE}"


def test_folder_that_became_unfit_is_no_longer_used(folder: Path) -> None:
    cache = KernelCache(folder)
    cache.get(recipe_of())
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="others may use it"):
        binary = cache.get(recipe_of("int y;"))
    assert not binary.is_relative_to(folder)


def test_folder_removed_in_between_is_made_again(folder: Path, no_warning: None) -> None:
    cache = KernelCache(folder)
    for _ in range(2):
        binary = cache.get(recipe_of())
        assert is_intact(binary)
        os.rename(folder, folder.parent / f"removed-{time.monotonic_ns()}")


def refuse_workspaces(folder: Path, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system refuse new folders in ``folder``; the superuser may write anywhere."""
    make = tempfile.mkdtemp

    def refuse(suffix: str | None = None, prefix: str | None = None, dir: object = None) -> str:
        if dir == folder:
            raise OSError(error, os.strerror(error), str(folder))
        return make(suffix, prefix, None if dir is None else str(dir))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_folder_that_cannot_be_written_is_replaced(
    folder: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_workspaces(folder, error, monkeypatch)
    with pytest.warns(RuntimeWarning, match=f"it cannot be written .*{os.strerror(error)}"):
        binary = KernelCache(folder).get(recipe_of())
    assert is_intact(binary)
    assert not binary.is_relative_to(folder)


def test_folder_that_cannot_be_written_still_gives_what_it_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch, no_warning: None
) -> None:
    binary = KernelCache(folder).get(recipe_of())
    refuse_workspaces(folder, errno.EROFS, monkeypatch)
    assert KernelCache(folder).get(recipe_of()) == binary


@pytest.mark.filterwarnings("ignore:the kernel cache:RuntimeWarning")
def test_no_folder_at_all_is_unavailable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(suffix: str | None = None, prefix: str | None = None, dir: object = None) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(BackendUnavailable, match=r"cannot be stored.*SPARSIFY_CACHE"):
        KernelCache(folder).get(recipe_of())


def test_private_folder_avoids_places_without_execution(
    own_place_for_temporary_files: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_place_for_temporary_files).chmod(0o777)  # unfit: everybody may replace what is in it
    with pytest.warns(RuntimeWarning, match="because"):
        private = cache_folder.open_private_folder(folder, "because")
    assert not private.path.is_relative_to(own_place_for_temporary_files)
    assert os.listdir(own_place_for_temporary_files) == []
    private.path.rmdir()


def test_private_folder_is_removed_but_for_failed_sources(folder: Path) -> None:
    link(folder, pytest.MonkeyPatch())
    cache = KernelCache(folder)
    with pytest.warns(RuntimeWarning):
        cache.get(recipe_of())
    with pytest.raises(CompileError) as failed:
        cache.get(recipe_of("int;", build=fail))
    cache_folder._remove_private_folder(cache.path, os.getpid() + 1)  # a forked child's exit
    assert len(os.listdir(cache.path)) == 2
    cache_folder._remove_private_folder(cache.path, os.getpid())
    assert Path(failed.value.source_path).read_text() == "int;"
    assert len(os.listdir(cache.path)) == 1


# --- where it lies ---

HOME = "/home/somebody"
PLACES = [
    ({}, f"{HOME}/.cache/sparsify"),
    ({"XDG_CACHE_HOME": ""}, f"{HOME}/.cache/sparsify"),
    ({"XDG_CACHE_HOME": "relative"}, f"{HOME}/.cache/sparsify"),
    ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/sparsify"),
    ({"XDG_CACHE_HOME": "/xdg", "SPARSIFY_CACHE": ""}, "/xdg/sparsify"),
    ({"XDG_CACHE_HOME": "/xdg", "SPARSIFY_CACHE": "/mine"}, "/mine"),
    ({"SPARSIFY_CACHE": "~/mine"}, f"{HOME}/mine"),
    ({"SPARSIFY_CACHE": "mine"}, f"{os.getcwd()}/mine"),
]


@pytest.mark.parametrize(("variables", "expected"), PLACES)
def test_place_of_the_cache(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPARSIFY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": HOME, **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder.cache_path()) == expected


def test_user_without_a_home_has_a_place_of_his_own(
    own_place_for_temporary_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SPARSIFY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "relative")
    path = cache_folder.cache_path()
    assert path == own_place_for_temporary_files / f"sparsify-{os.geteuid()}"
