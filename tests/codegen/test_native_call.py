"""The extension that makes calls again: what it takes, what it leaves to Python, and without it."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.launch import CppLaunchable
from sparsify.codegen.cpp.prepared_call import Prepared
from sparsify.codegen.native_call import Loading, load_native_call
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from tests.codegen.test_runtime import status_of_child
from tests.kernels.example_kernels import lif, lif_data, schedule
from tests.natively import call_in

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 20, 40

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return call_in("native", monkeypatch)


@pytest.fixture
def launch() -> CppLaunchable:
    kernel, backend = lif(INPUTS, HIDDEN), CppBackend()
    loaded = backend.load(backend.compile(kernel, schedule(kernel, "neurons-per-thread")))
    assert isinstance(loaded, CppLaunchable)
    return loaded


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    made = lif_data(lif(INPUTS, HIDDEN), STEPS, BATCH, 0)
    return {name: torch.from_numpy(value) for name, value in made.items()}


def spikes(launch: CppLaunchable, tensors: dict[str, Tensor], frozen: bool = False) -> Tensor:
    return launch(tensors, steps=STEPS, batch=BATCH, frozen=frozen)["spikes"]


@pytest.mark.parametrize("frozen", [False, True])
def test_calls_are_made_natively_from_the_third_on(
    launch: CppLaunchable,
    tensors: dict[str, Tensor],
    native: list[int],
    frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = spikes(launch, tensors, frozen)
    spikes(launch, tensors, frozen)
    monkeypatch.delattr(Prepared, "_call")
    for calls in range(1, 4):
        assert torch.equal(spikes(launch, tensors, frozen), wanted)
        assert native == [0] * calls  # small weights are read, nothing is asked


def as_parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: nn.Parameter(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [as_parameters, lambda t: {n: v.detach() for n, v in t.items()}])
def test_other_tensors_in_the_same_places_are_taken(
    launch: CppLaunchable,
    tensors: dict[str, Tensor],
    native: list[int],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    wanted = spikes(launch, tensors)
    spikes(launch, tensors)
    with torch.no_grad():
        assert torch.equal(spikes(launch, change(tensors)), wanted)
    assert native == [0]


class Own(Tensor):
    """A class that may do anything."""


def test_what_it_cannot_read_is_left_to_python(
    launch: CppLaunchable, tensors: dict[str, Tensor], native: list[int]
) -> None:
    wanted = spikes(launch, tensors)
    spikes(launch, tensors)
    for x in (
        tensors["x"].as_subclass(Own),
        torch._neg_view(tensors["x"].neg()),
        tensors["x"].clone().requires_grad_(),
    ):
        assert torch.equal(spikes(launch, {**tensors, "x": x}).as_subclass(Tensor), wanted)
    assert native == []
    with pytest.raises(ValueError, match="sparse_coo"):
        spikes(launch, {**tensors, "w_in": tensors["w_in"].to_sparse()})


def test_a_weight_that_is_copied_to_be_read_is_left_to_python(
    launch: CppLaunchable, tensors: dict[str, Tensor], native: list[int]
) -> None:
    """And it is copied for that once."""
    apart = torch.zeros(2 * HIDDEN, 3 * INPUTS)[::2, ::3]
    apart.copy_(tensors["w_in"])
    wanted = spikes(launch, tensors)
    for _ in range(3):
        assert torch.equal(spikes(launch, {**tensors, "w_in": apart}), wanted)
    assert native == []
    prepared = launch._prepared[STEPS, BATCH]
    assert prepared._repeaters == {frozenset(): None} and not prepared._may_be_native


def test_an_operand_that_is_copied_for_its_call_is_left_to_python(
    launch: CppLaunchable, tensors: dict[str, Tensor], native: list[int]
) -> None:
    """What was prepared for others of its size reads neurons that lie side by side."""
    places = [(0, place) for place in range(len(launch._names))]
    for _ in range(2):
        wanted = spikes(launch, tensors)
    for name in ("x", "v0"):
        unlike = {**tensors, name: tensors[name].mT.contiguous().mT}
        assert torch.equal(spikes(launch, unlike), wanted)
        for given, is_taken in ((tensors, True), (unlike, False)):
            in_order = [given[each] for each in (*launch._operands, *launch._weights)]
            found = launch.repeater(in_order, STEPS, BATCH, places, [0], frozenset())
            assert (found is not None) == is_taken


def test_layouts_are_equal_where_all_of_them_is() -> None:
    native = load_native_call() or load_native_call.__wrapped__()
    assert native is not None
    x = torch.zeros(2, 3)
    alike = [torch.ones(2, 3), nn.Parameter(x), x.requires_grad_()]
    assert all(native.layouts_of([x]) == native.layouts_of([other]) for other in alike)
    unlike = [
        x.t(),
        x.double(),
        x[:1],
        x.unsqueeze(0),
        torch.zeros(3, 2).t(),
        x.int(),
        x.to("meta"),
    ]
    assert all(native.layouts_of([x]) != native.layouts_of([other]) for other in unlike)
    assert native.layouts_of([x, x]) != native.layouts_of([x])
    unknown = [x.to_sparse(), x.as_subclass(Own)]
    assert all(native.layouts_of([other]) is None for other in unknown)
    assert native.layouts_of([x] * 10_000) is None


def test_it_is_loaded_beside_what_runs() -> None:
    loading = Loading()
    assert loading.now() is None
    loading.begin()
    begun = loading._begun
    loading.begin()
    assert begun is not None and loading._begun is begun
    assert begun.result() is loading.now()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_loads_it_if_its_parent_had_not_done_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load() -> None:
        if os.getpid() == parent:
            is_over.wait(30)
        else:
            loaded.set()

    parent, is_over, loaded = os.getpid(), threading.Event(), threading.Event()
    monkeypatch.setattr("sparsify.codegen.native_call.load_native_call", load)
    loading = Loading()
    loading.begin()

    def loads() -> bool:
        loading.begin()
        return loaded.wait(3)

    try:
        assert status_of_child(loads, limit_s=5) == 0
    finally:
        is_over.set()


def test_without_pythons_headers_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert load_native_call.__wrapped__() is None


def test_what_does_not_compile_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "Python.h").write_text("#error not these\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "broken"))
    assert load_native_call.__wrapped__() is None


def test_repeaters_end_with_what_they_hold(
    launch: CppLaunchable, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    extension = load_native_call() or load_native_call.__wrapped__()
    monkeypatch.setattr("sparsify.codegen.cpp.prepared_call.native_call", lambda: extension)
    contents = launch._contents["w_in"]
    counts = [sys.getrefcount(contents)]
    for _ in range(3):
        spikes(launch, tensors)
        counts.append(sys.getrefcount(contents))
    first, once, *repeated = counts
    assert (
        once == first + 1 and repeated == [once + 1] * 2
    )  # in Python's call, and in the native one
    launch._prepared.clear()
    count = sys.getrefcount(contents)
    assert count == first
