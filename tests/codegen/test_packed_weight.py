"""A packed weight notices every change of the weight, however it was made."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from sparsify.codegen.cpp.packed_weight import PackedWeight
from sparsify.codegen.runtime import Packed, Runtime, load_runtime
from tests.kernels.packing import pack_slowly, random_tensor
from tests.threads import run_at_once, torch_threads


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return load_runtime()


@pytest.fixture
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


Change = Callable[[torch.nn.Linear], object]


def step_of_fused_adam(layer: torch.nn.Linear) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, layer.in_features)).sum().backward()
    optimizer.step()


def load_other_state(layer: torch.nn.Linear) -> None:
    layer.load_state_dict(torch.nn.Linear(layer.in_features, layer.out_features).state_dict())


def write_vector(layer: torch.nn.Linear) -> None:
    parameters = list(layer.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(vector + 1, parameters)


@torch.no_grad()
def write_in_place(layer: torch.nn.Linear) -> None:
    layer.weight[3, 5] = 7.0


@torch.inference_mode()
def write_in_inference_mode(layer: torch.nn.Linear) -> None:
    layer.weight.data.mul_(0.5)


def write_through_data(layer: torch.nn.Linear) -> None:
    layer.weight.data[0, 0] += 1


def replace_data(layer: torch.nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def write_through_numpy(layer: torch.nn.Linear) -> None:
    layer.weight.detach().numpy()[2, 2] = 9.0


def replace_parameter(layer: torch.nn.Linear) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 1)


def transpose_parameter(layer: torch.nn.Linear) -> None:
    """The same memory read in another order."""
    layer.weight = torch.nn.Parameter(layer.weight.detach().t())


def change_only_a_sign_of_zero(layer: torch.nn.Linear) -> None:
    layer.weight.data[1, 1] = -layer.weight.data[1, 1]


CHANGED_WEIGHTS: list[Change] = [
    *(step_of_fused_adam, load_other_state, write_vector, write_in_place),
    *(write_in_inference_mode, write_through_data, replace_data, write_through_numpy),
    *(replace_parameter, transpose_parameter, change_only_a_sign_of_zero),
    lambda layer: layer.to(torch.float64),
]


@pytest.mark.parametrize("change", CHANGED_WEIGHTS)
@pytest.mark.parametrize("inference", [False, True])
def test_every_way_of_changing_a_weight_is_noticed(
    runtime: Runtime, change: Change, inference: bool
) -> None:
    layer = torch.nn.Linear(12, 12)
    layer.weight.data[1, 1] = 0.0
    cached = PackedWeight(runtime, 8)
    with torch.inference_mode(inference):
        before = cached.get(layer.weight).packed
    change(layer)
    with torch.inference_mode(inference):
        after = cached.get(layer.weight).packed
    assert not bits_equal(before.tiles, after.tiles)
    assert bits_equal(after.tiles, pack_slowly(layer.weight.detach(), 8).contiguous())


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_version_counters_would_not_have_sufficed(runtime: Runtime) -> None:
    """Why the content is compared; if this fails, torch has changed and hashing may be dropped."""
    layer = torch.nn.Linear(12, 12)
    version = layer.weight._version
    write_through_numpy(layer)
    write_through_data(layer)
    assert layer.weight._version == version


def test_unchanged_weight_is_packed_once(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    packed = cached.get(weight).packed

    def refuse(*arguments: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(Runtime, "pack", refuse)
    assert cached.get(weight).packed is packed
    assert cached.get(weight.clone()).packed is packed  # a new address with the same content
    assert cached.get(weight.clone().detach()).packed is packed


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_write_beside_packing_that_is_taken_back_leaves_nothing(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, is_shared: bool
) -> None:
    """By another thread, or by another process where the memory is shared."""
    weight, pack, done = random_tensor((6, 6)), Runtime.pack, threading.Event()
    if is_shared:
        weight.share_memory_()  # type: ignore[no-untyped-call]

    def pack_beside_writes(self: Runtime, given: torch.Tensor, tile: int) -> Packed:
        weight.neg_()
        return pack(self, given, tile)

    cached = PackedWeight(runtime, 8)
    writer = threading.Thread(target=done.wait)
    if not is_shared:
        writer.start()
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "pack", pack_beside_writes)
        cached.get(weight)
    done.set()
    weight.neg_()
    assert torch.equal(cached.get(weight).packed.tiles, pack_slowly(weight, 8))


def test_frozen_weight_is_not_read(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    packed = cached.get(weight, frozen=True).packed

    def refuse(*arguments: object) -> None:
        raise AssertionError("the weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "content_hash", refuse)
        assert cached.get(weight, frozen=True).packed is packed
    weight += 1  # the promise is broken
    assert cached.get(weight, frozen=True).packed is packed
    assert not torch.equal(cached.get(weight).packed.tiles, packed.tiles)


def test_replaced_weight_is_noticed_even_if_frozen(runtime: Runtime) -> None:
    cached = PackedWeight(runtime, 8)
    for _ in range(20):
        weight = random_tensor((6, 6))
        assert torch.equal(cached.get(weight, frozen=True).packed.tiles, pack_slowly(weight, 8))


def test_memory_of_a_weight_is_held_until_there_is_another(runtime: Runtime) -> None:
    """Else a new weight might be given the same memory, and pass for the frozen one."""
    array = np.zeros((6, 6), dtype=np.float32)
    memory = weakref.ref(array)
    cached = PackedWeight(runtime, 8)
    cached.get(torch.from_numpy(array))
    del array
    assert memory() is not None
    cached.get(random_tensor((6, 6)))
    assert memory() is None


def test_weight_that_became_infinite_is_noticed(runtime: Runtime) -> None:
    weight = random_tensor((5, 5))
    cached = PackedWeight(runtime, 8)
    assert cached.get(weight).packed.all_finite
    weight.numpy()[4, 4] = np.inf
    assert not cached.get(weight).packed.all_finite


@pytest.mark.usefixtures("two_threads")
def test_threads_that_share_a_packed_weight_each_get_their_own(runtime: Runtime) -> None:
    cached = PackedWeight(runtime, 16)
    weights = [random_tensor((200, 300)) for _ in range(2)]
    expected = [pack_slowly(weight, 16) for weight in weights]
    wrong: list[int] = []

    def work(me: int) -> None:
        for _ in range(30):
            if not torch.equal(cached.get(weights[me]).packed.tiles, expected[me]):
                wrong.append(me)

    run_at_once([lambda: work(0), lambda: work(1)])
    assert wrong == []
