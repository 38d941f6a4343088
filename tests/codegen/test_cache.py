"""The cache of compiled kernels: what is loaded is what was written, by this user, whole."""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.codegen import cache_folder
from sparsify.codegen.cache import KernelCache, Recipe, is_intact
from sparsify.errors import CompileError
from tests.cached_builds import (
    Build,
    exit_status,
    fail,
    in_child,
    make_foreign,
    recipe_of,
    workspaces,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


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


# --- builds that fail ---


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
