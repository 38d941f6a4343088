"""The cache of compiled kernels: what is loaded is what was written, by this user, whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.codegen import cache_folder
from sparsify.codegen.cache import BuildFailed, KernelCache, Recipe, is_intact
from sparsify.errors import BackendUnavailable, CompileError

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

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


# --- finding and building ---


def test_entry_is_built_once_and_found_by_the_next_process(folder: Path, no_warning: None) -> None:
    first, second = Build(), Build()
    binary = KernelCache(folder).get(recipe_of(build=first))
    assert KernelCache(folder).get(recipe_of(build=second)) == binary
    assert (len(first.runs), len(second.runs)) == (1, 0)
    assert binary.read_bytes() == b"compiled int x;\n"


def test_entry_holds_source_and_labelled_key_and_nothing_else_is_left(folder: Path) -> None:
    binary = KernelCache(folder).get(recipe_of())
    assert sorted(os.listdir(binary.parent)) == ["entry.json", "kernel.cpp", "kernel.so"]
    record = json.loads((binary.parent / "entry.json").read_text())
    assert record["parts"] == {"text": "int x;\n", "compiler version": "1"}
    assert os.listdir(folder) == [binary.parent.name]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_every_part_is_part_of_the_key(folder: Path) -> None:
    cache = KernelCache(folder)
    recipes = [recipe_of(), recipe_of("int y;\n"), recipe_of(flags="-O3"), recipe_of(flags="-O2")]
    assert len({cache.get(recipe) for recipe in recipes}) == len(recipes)


parts_of_keys = st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)


@given(parts_of_keys, parts_of_keys)
def test_keys_are_equal_only_if_all_parts_are(a: dict[str, str], b: dict[str, str]) -> None:
    entries = [Recipe("k", parts, {}, "", "", Build()).entry for parts in (a, b)]
    assert (entries[0] == entries[1]) == (a == b)


@given(st.text())
def test_any_name_gives_the_name_of_one_folder(name: str) -> None:
    entry = recipe_of(name=name).entry
    assert len(entry) <= 100
    assert all(c.isascii() and (c.isalnum() or c in "_-") for c in entry)


def test_text_that_is_no_unicode_is_written_escaped(folder: Path) -> None:
    binary = KernelCache(folder).get(recipe_of("// caf\udce9\r\n"))
    assert (binary.parent / "kernel.cpp").read_bytes() == b"// caf\\udce9\r\n"


# --- damage ---


def truncate(entry: Path) -> None:
    os.truncate(entry / "kernel.so", 3)


def flip_a_bit(entry: Path) -> None:
    content = bytearray((entry / "kernel.so").read_bytes())
    content[4] ^= 1
    (entry / "kernel.so").write_bytes(content)


def remove_binary(entry: Path) -> None:
    (entry / "kernel.so").unlink()


def link_binary(entry: Path) -> None:
    os.rename(entry / "kernel.so", entry / "elsewhere")
    (entry / "kernel.so").symlink_to("elsewhere")


def pipe_instead_of_binary(entry: Path) -> None:
    remove_binary(entry)
    os.mkfifo(entry / "kernel.so")


def truncate_record(entry: Path) -> None:
    os.truncate(entry / "entry.json", 20)


def empty_record(entry: Path) -> None:
    os.truncate(entry / "entry.json", 0)


def record_of_another_shape(entry: Path) -> None:
    (entry / "entry.json").write_text('{"sha256": "", "parts": ["text"]}')


def record_too_deep_to_read(entry: Path) -> None:
    (entry / "entry.json").write_text("[" * 100_000)


def record_of_other_parts(entry: Path) -> None:
    record = json.loads((entry / "entry.json").read_text())
    record["parts"]["text"] = "another text"
    (entry / "entry.json").write_text(json.dumps(record))


def link_entry(entry: Path) -> None:
    os.rename(entry, entry.parent / "moved")
    entry.symlink_to("moved")


def file_instead_of_entry(entry: Path) -> None:
    os.rename(entry, entry.parent / "moved")
    entry.write_text("not a folder")


DAMAGE = [
    *(truncate, flip_a_bit, remove_binary, link_binary, pipe_instead_of_binary),
    *(truncate_record, empty_record, record_of_another_shape, record_too_deep_to_read),
    *(record_of_other_parts, link_entry, file_instead_of_entry),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_entry_is_built_anew(
    folder: Path, damage: Callable[[Path], None], no_warning: None
) -> None:
    binary = KernelCache(folder).get(recipe_of())
    damage(binary.parent)
    again = Build()
    assert KernelCache(folder).get(recipe_of(build=again)) == binary
    assert len(again.runs) == 1
    assert is_intact(binary)
    assert not binary.parent.is_symlink()
    assert workspaces(folder) == []


def test_binary_of_somebody_else_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = KernelCache(folder).get(recipe_of())
    assert is_intact(binary)
    make_foreign(binary, monkeypatch)
    assert not is_intact(binary)


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


# --- builds that fail ---


def fail(folder: Path) -> None:
    raise BuildFailed("c++ failed with exit status 1.", "kernel.cpp:1: error: expected a name\n")


def test_failed_build_keeps_source_and_log(folder: Path) -> None:
    for _ in range(2):  # the second replaces what the first one left
        with pytest.raises(CompileError) as failed:
            KernelCache(folder).get(recipe_of("int;", build=fail))
    error = failed.value
    assert error.log == "kernel.cpp:1: error: expected a name\n"
    assert "exit status 1" in str(error)
    assert error.log in str(error)
    assert error.source_path in str(error)
    source = Path(error.source_path)
    assert source.read_text() == "int;"
    assert (source.parent / "log.txt").read_text() == error.log
    assert os.listdir(folder) == [source.parent.name]


def test_failed_build_is_tried_again(folder: Path) -> None:
    cache = KernelCache(folder)
    with pytest.raises(CompileError):
        cache.get(recipe_of(build=fail))
    assert is_intact(cache.get(recipe_of()))


def test_build_that_writes_nothing_fails(folder: Path, no_warning: None) -> None:
    with pytest.raises(CompileError, match=r"made no kernel\.so"):
        KernelCache(folder).get(recipe_of(build=lambda _: None))


def test_interrupted_build_leaves_nothing(folder: Path) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        KernelCache(folder).get(recipe_of(build=interrupt))
    assert os.listdir(folder) == []


def test_log_that_cannot_be_kept_is_still_raised(folder: Path) -> None:
    def fail_and_block_the_log(workspace: Path) -> None:
        (workspace / "log.txt").mkdir()
        fail(workspace)

    with pytest.raises(CompileError, match="expected a name") as failed:
        KernelCache(folder).get(recipe_of("int;", build=fail_and_block_the_log))
    assert Path(failed.value.source_path).read_text() == "int;"


# --- several at once ---


def build_when_all_are_there(meeting: Path, count: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (meeting / folder.name).touch()
        deadline = time.monotonic() + 20
        while len(os.listdir(meeting)) < count:
            assert time.monotonic() < deadline, "the others did not come"
            time.sleep(0.001)
        Build()(folder)

    return build


def test_processes_that_build_at_once_all_succeed(folder: Path, tmp_path: Path) -> None:
    count = 4
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    recipe = recipe_of(build=build_when_all_are_there(meeting, count))
    children = [in_child(lambda: is_intact(KernelCache(folder).get(recipe))) for _ in range(count)]
    assert [exit_status(child) for child in children] == [0] * count
    assert len(os.listdir(meeting)) == count  # all of them did build
    assert os.listdir(folder) == [recipe.entry]
    assert KernelCache(folder).find(recipe)


def test_threads_that_build_at_once_all_succeed(folder: Path, tmp_path: Path) -> None:
    count = 4
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    cache = KernelCache(folder)
    recipe = recipe_of(build=build_when_all_are_there(meeting, count))
    binaries: list[Path] = []
    threads = [
        threading.Thread(target=lambda: binaries.append(cache.get(recipe))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert binaries == [folder / recipe.entry / "kernel.so"] * count
    assert os.listdir(folder) == [recipe.entry]


def test_process_killed_while_building_harms_nobody(folder: Path) -> None:
    def die(workspace: Path) -> None:
        (workspace / "kernel.so").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = in_child(lambda: KernelCache(folder).get(recipe_of(build=die)).exists())
    assert exit_status(child) == -signal.SIGKILL
    (left,) = workspaces(folder)
    assert os.listdir(folder) == [left.name]  # nothing under the entry's name
    binary = KernelCache(folder).get(recipe_of())
    assert is_intact(binary)
    assert left.is_dir()  # it might still be alive
    long_ago = time.time() - 2 * cache_folder.STALE_AFTER_S
    os.utime(left, (long_ago, long_ago))
    KernelCache(folder).get(recipe_of("int y;"))
    assert workspaces(folder) == []


def test_entry_that_others_keep_breaking_is_used_from_the_workspace(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    truncate(KernelCache(folder).get(recipe).parent)
    monkeypatch.setattr(KernelCache, "_remove_entry", lambda cache, entry: None)
    binary = KernelCache(folder).get(recipe)
    assert is_intact(binary)
    assert binary.parent.name.startswith(cache_folder.WORKSPACE_PREFIX)


# --- why a kernel was not found ---


def test_miss_names_the_parts_that_differ_from_the_nearest_entry(folder: Path) -> None:
    cache = KernelCache(folder)
    assert cache.explain_miss(recipe_of()) == f"nothing named kernel was compiled into {folder}"
    cache.get(recipe_of("a\nb\nc", flags="-O2"))
    cache.get(recipe_of("a\nx\nc", flags="-O3"))
    miss = cache.explain_miss(recipe_of("a\nb\nc", flags="-O3"))
    near = recipe_of("a\nb\nc", flags="-O2").entry, recipe_of("a\nx\nc", flags="-O3").entry
    assert miss in (
        f"differs from {near[0]} in flags: '-O2' became '-O3'",
        f"differs from {near[1]} in text (line 2): 'x' became 'b'",
    )
    older_system = recipe_of("a\nb\nc", flags="-O2", system="Linux")
    assert "system: '' became 'Linux'" in cache.explain_miss(older_system)


def test_miss_of_a_damaged_entry_says_so(folder: Path) -> None:
    cache = KernelCache(folder)
    binary = cache.get(recipe_of())
    assert cache.explain_miss(recipe_of()) == f"{recipe_of().entry} is in {folder}"
    truncate(binary.parent)
    assert "its binary is not what was written" in cache.explain_miss(recipe_of())


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
