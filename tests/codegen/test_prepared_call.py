"""A call like an earlier one is made again; whatever differs is found before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from sparsify.codegen.cpp import packed_weight
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.codegen.cpp.launch import PREPARED, CppLaunchable
from sparsify.codegen.runtime import Runtime
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from tests.kernels.example_kernels import gate_of_bits, lif, lif_data, schedule
from tests.natively import WAYS, call_in
from tests.threads import torch_threads

BACKEND = CppBackend()
STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 20, 40

pytestmark = pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")


@pytest.fixture(params=WAYS)
def native_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return call_in(request.param, monkeypatch)


@pytest.fixture
def launch(native_calls: list[int]) -> CppLaunchable:
    kernel = lif(INPUTS, HIDDEN)
    loaded = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "neurons-per-thread")))
    assert isinstance(loaded, CppLaunchable)
    return loaded


@pytest.fixture
def long_ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps of each call that could not be made again."""
    found: list[int] = []
    run = CppLaunchable._run

    def counted(self: CppLaunchable, tensors: object, steps: int, *rest: object) -> object:
        found.append(steps)
        return run(self, tensors, steps, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CppLaunchable, "_run", counted)
    yield found


def data(steps: int = STEPS, seed: int = 0) -> dict[str, torch.Tensor]:
    made = lif_data(lif(INPUTS, HIDDEN), steps, BATCH, seed)
    return {name: torch.from_numpy(value) for name, value in made.items()}


def with_weights_of(
    tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {**others, "w_in": tensors["w_in"], "w_rec": tensors["w_rec"]}


def spikes(
    launch: CppLaunchable, tensors: dict[str, torch.Tensor], frozen: bool = False
) -> torch.Tensor:
    return launch(tensors, steps=tensors["x"].shape[0], batch=BATCH, frozen=frozen)["spikes"]


def test_a_call_like_an_earlier_one_is_made_again(
    launch: CppLaunchable, long_ways: list[int]
) -> None:
    first = data()
    inputs = [with_weights_of(first, data(seed=seed)) for seed in range(4)]
    found = [spikes(launch, tensors) for tensors in inputs]
    assert long_ways == [STEPS]
    kernel = lif(INPUTS, HIDDEN)
    anew = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "neurons-per-thread")))
    for tensors, got in zip(inputs, found, strict=True):
        assert got.any()
        assert torch.equal(got, anew(tensors, steps=STEPS, batch=BATCH)["spikes"])
    assert launch.events["drive"][1] == 4 * STEPS * BATCH * INPUTS


def test_results_are_new_tensors_each_time(launch: CppLaunchable) -> None:
    tensors = data()
    results = [launch(tensors, steps=STEPS, batch=BATCH) for _ in range(3)]
    places = {value.data_ptr() for result in results for value in result.values()}
    assert len(places) == 3 * len(results[0])
    for value in results[2].values():
        assert value.is_contiguous()
    with torch.inference_mode():
        assert spikes(launch, tensors).is_inference()
    assert not spikes(launch, tensors).is_inference()


@pytest.mark.parametrize("name", ["x", "v0", "w_in", "w_rec"])
def test_other_layouts_go_the_long_way(
    launch: CppLaunchable, long_ways: list[int], name: str
) -> None:
    tensors = data()
    wanted = spikes(launch, tensors)
    turned = tensors[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    lazy = torch._neg_view(tensors[name].neg())
    assert torch.equal(spikes(launch, {**tensors, name: turned}), wanted)
    if name in ("x", "v0"):
        assert torch.equal(spikes(launch, {**tensors, name: lazy}), wanted)
        assert long_ways == [STEPS] * 3
    else:
        for frozen in (False, True):
            with pytest.raises(TypeError, match="negated"):
                spikes(launch, {**tensors, name: lazy}, frozen=frozen)


def test_a_frozen_call_reads_what_was_packed_last(launch: CppLaunchable) -> None:
    """Also where a call of its sizes was prepared before that."""
    tensors, longer = data(), data(STEPS + 3)
    spikes(launch, tensors)
    tensors["w_in"].numpy()[...] *= -1.0
    spikes(launch, with_weights_of(tensors, longer))
    wanted = spikes(launch, tensors, frozen=True)
    assert torch.equal(spikes(launch, tensors), wanted)


def test_a_change_of_a_weight_is_seen_at_all_sizes(launch: CppLaunchable) -> None:
    tensors, longer = data(), data(STEPS + 3)
    for value in (1.0, -1.0, float("inf"), 2.0):
        tensors["w_in"].numpy()[3, :] = value
        for given in (tensors, with_weights_of(tensors, longer)):
            kernel = lif(INPUTS, HIDDEN)
            anew = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "neurons-per-thread")))
            wanted = anew(given, steps=given["x"].shape[0], batch=BATCH)["spikes"]
            assert torch.equal(spikes(launch, given), wanted)
            assert torch.equal(spikes(launch, given), wanted)


def test_another_number_of_threads_goes_the_long_way(
    launch: CppLaunchable, long_ways: list[int]
) -> None:
    tensors = data()
    found = []
    for threads in (1, 2, 2, 1, 1):
        with torch_threads(threads):
            found.append(spikes(launch, tensors))
    assert long_ways == [STEPS] * 3
    assert all(torch.equal(found[0], other) for other in found)


def test_weights_that_were_packed_before_are_not_kept(launch: CppLaunchable) -> None:
    tensors, longer = data(), data(STEPS + 3)
    spikes(launch, tensors)
    [slot, _] = launch._variants[frozenset()].weights
    current = slot.packed.current
    assert current is not None
    packed = weakref.ref(current.packed.tiles)
    del current
    tensors["w_in"].numpy()[...] = 0.0
    spikes(launch, with_weights_of(tensors, longer))
    gc.collect()
    assert packed() is None


def test_few_calls_are_remembered(launch: CppLaunchable) -> None:
    tensors = data(2 * PREPARED)
    for steps in range(1, 2 * PREPARED):
        spikes(launch, {**tensors, "x": tensors["x"][:steps]})
    assert len(launch._prepared) <= PREPARED


def test_a_weight_that_is_packed_twice_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its receivers for a product of events, by its senders for a restricted one."""
    kernel = gate_of_bits(HIDDEN)
    launch = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "neurons-per-thread")))
    bits = torch.full((STEPS, BATCH, HIDDEN // 8), 7, dtype=torch.uint8)
    values = torch.ones(STEPS, BATCH, HIDDEN)
    tensors = {"near": bits, "fired": bits, "g": values, "w": torch.ones(HIDDEN, HIDDEN)}
    read: list[torch.Tensor] = []
    hashed = Runtime.content_hash

    def content_hash(self: Runtime, tensor: torch.Tensor) -> int:
        read.append(tensor)
        return hashed(self, tensor)

    monkeypatch.setattr(Runtime, "content_hash", content_hash)
    # Beside threads that might write, it is read once more; other tests may have left some.
    monkeypatch.setattr(packed_weight, "_has_other_writers", lambda _: False)
    for calls, change in enumerate((0.0, 0.0, 1.0), start=1):
        tensors["w"] += change
        out = launch(tensors, steps=STEPS, batch=BATCH)["out"]
        assert len(read) == calls
        anew = BACKEND.load(BACKEND.compile(kernel, schedule(kernel, "neurons-per-thread")))
        assert torch.equal(out, anew(tensors, steps=STEPS, batch=BATCH)["out"])
        read.pop()


def test_outputs_that_nobody_reads_are_not_made_anew(launch: CppLaunchable) -> None:
    tensors = data()
    wanted = launch(tensors, steps=STEPS, batch=BATCH)
    kernel = launch.kernel
    given = [tensors[name] for name in [o.name for o in kernel.operands] + ["w_in", "w_rec"]]
    assert [weight.name for weight in kernel.weights] == ["w_in", "w_rec"]
    names = [output.name for output in kernel.outputs]
    unread = frozenset(i for i, output in enumerate(kernel.outputs) if "T" not in output.axes)
    assert unread and len(unread) < len(names)
    found = [launch.repeat(given, STEPS, BATCH, False, unread) for _ in range(2)]
    for i, name in enumerate(names):
        first, second = (outputs[i] for outputs in found if outputs is not None)
        assert (first is second) is (i in unread)
        assert torch.equal(first, wanted[name]) and torch.equal(second, wanted[name])
    whole = launch.repeat(given, STEPS, BATCH, False)
    assert whole is not None
    spares = {id(outputs[i]) for outputs in found if outputs is not None for i in unread}
    assert all(id(whole[i]) not in spares for i in unread)
