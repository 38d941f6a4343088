"""Weights that are computed are computed where something changed, and then always."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify
from sparsify.codegen.runtime import Runtime
from sparsify.compiling.keep_weights import compute_weights, keep_weights
from sparsify.compiling.kept_weights import KeptWeights
from sparsify.graphs.loops import find_regions
from tests.models.pruned_nets import PRUNED, Recurrent, assert_same, example, mask_of

MASKED = {name: make for name, make in PRUNED.items() if name != "zeroed"}
ways = pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)


@pytest.fixture(autouse=True)
def small_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsify.compiling.keep_weights.LEAST_ELEMENTS", 1)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def compiled(model: nn.Module, *args: Tensor) -> tuple[Any, list[KeptWeights]]:
    """The module, every site of which runs as a kernel, and what it keeps."""
    fast: Any = sparsify.sparsify(model.eval(), *args, backend="cpp", timing=False)
    assert not fast.compiled.compiled.runs_original
    return fast, [m for m in fast.graph.children() if isinstance(m, KeptWeights)]


def recurrent_weight(model: Recurrent) -> Tensor:
    return next(p for name, p in model.named_parameters() if "recur" in name)


@ways
@pytest.mark.usefixtures("mode")
def test_a_weight_is_computed_where_its_mask_or_itself_changed(
    make: Callable[[], Recurrent],
) -> None:
    model, x = make(), example()
    fast, [kept] = compiled(model, x)
    changes: list[Callable[[], object]] = [
        lambda: mask_of(model).numpy()[3:9].fill(0),
        lambda: mask_of(model).data[3].fill_(1),
        lambda: recurrent_weight(model).data.neg_(),
        lambda: recurrent_weight(model).detach().numpy()[0].fill(2),
        lambda: torch._foreach_neg_([recurrent_weight(model).data]),
    ]
    assert_same(fast(x), model(x))
    for change in changes:
        before, count = fast(x), kept.computed
        fast(x)
        assert kept.computed == count
        change()
        assert not torch.equal(fast(x), before)
        assert kept.computed == count + 1
        assert_same(fast(x), model(x))


@ways
@pytest.mark.usefixtures("mode")
def test_a_kernel_does_not_look_at_what_is_kept(
    make: Callable[[], Recurrent], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(), example()
    fast, _ = compiled(model, x)
    regions = list(find_regions(fast.graph).values())
    assert [region.settled for region in regions] == [True]  # the other product reads no events
    fast(x)
    looked: list[Tensor] = []
    look = Runtime.content_hash

    def content_hash(self: Runtime, tensor: Tensor) -> int:
        looked.append(tensor)
        return look(self, tensor)

    monkeypatch.setattr(Runtime, "content_hash", content_hash)
    fast(x)
    hidden = [tensor for tensor in looked if tensor.shape == (32, 32)]
    # The weight and its mask; what torch's masks leave on the module in inference mode.
    left = torch.is_inference_mode_enabled() and "weight_mask" in "".join(
        dict(model.named_buffers())
    )
    assert len(hidden) == 2 + left
    looked.clear()
    fast.freeze()
    fast(x)
    assert not [tensor for tensor in looked if tensor.shape == (32, 32)]
    mask_of(model).data.zero_()
    frozen = fast(x)
    fast.freeze(False)
    assert not torch.equal(fast(x), frozen)
    assert_same(fast(x), model(x))


@pytest.mark.usefixtures("mode")
def test_what_is_left_on_the_module_may_be_written_to() -> None:
    model: Any = MASKED["torch.nn.utils.prune"]()
    x = example()
    fast, [kept] = compiled(model, x)
    expected = fast(x)
    left = model.recur.weight
    assert torch.equal(left, model.recur.weight_orig * model.recur.weight_mask)
    left.fill_(3)
    assert torch.equal(fast(x), expected)
    assert torch.equal(model.recur.weight, model.recur.weight_orig * model.recur.weight_mask)
    assert fast(x).data_ptr() != expected.data_ptr()
    assert kept.given


@ways
def test_one_graph_serves_all_sizes(make: Callable[[], Recurrent]) -> None:
    model = make()
    with torch.no_grad():
        fast, _ = compiled(model, example(6, 3))
        for steps, batch in ((4, 5), (7, 2), (9, 4)):
            x = example(steps, batch)
            assert_same(fast(x), model(x))
        assert fast.compiled.recordings == 2
        assert [m for m in fast.graph.children() if isinstance(m, KeptWeights)]
        mask_of(model).data.zero_()
        assert_same(fast(x), model(x))
        sparsify.verify(model, fast, x, must_replace=True)


def test_kernels_that_do_not_tell_weights_by_address_look_themselves() -> None:
    model, x = MASKED["masked in forward"](), example()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x[:2], backend="cuda-emulated")
        before = fast(x[:2])
        model.kept.data.neg_()
        assert_same(fast(x[:2]), model(x[:2]))
        assert not torch.equal(fast(x[:2]), before)
    assert [m for m in fast.graph.children() if isinstance(m, KeptWeights)]


@ways
def test_keeping_can_be_taken_back(make: Callable[[], Recurrent]) -> None:
    model, x = make(), example()
    with torch.no_grad():
        fast, _ = compiled(model, x)
        operands = fast.compiled.compiled.recording.calling.operands((x,), {})
        plain = compute_weights(fast.graph)
        assert not [m for m in plain.children() if isinstance(m, KeptWeights)]
        again = keep_weights(plain, ())
        assert [m for m in again.children() if isinstance(m, KeptWeights)]
        expected = fast.graph(*operands)
        for graph in (plain, again):
            for found, wanted in zip(graph(*operands), expected, strict=True):
                assert torch.equal(found, wanted)


def test_training_computes_weights_in_every_step() -> None:
    model = MASKED["masked in forward"]().train()
    fast: Any = sparsify.sparsify(model, timing=False)
    fast(example()).sum().backward()
    assert not [m for m in fast.graph.children() if isinstance(m, KeptWeights)]
    assert not fast.compiled.compiled.runs_original


def test_copies_keep_weights_of_their_own() -> None:
    model, x = MASKED["masked in forward"](), example()
    with torch.no_grad():
        fast, _ = compiled(model, x)
        before = fast(x)
        twin = copy.deepcopy(fast)
        twin.kept.zero_()
        assert not torch.equal(twin(x), before)
        assert torch.equal(fast(x), before)


class Stateful(nn.Module):
    """What it computes of stored tensors alone, it computes of one that every call writes."""

    v: Tensor
    kept: Tensor

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.leak = nn.Parameter(torch.full((16,), 0.5))
        self.attribute = attribute
        if attribute:
            self.v = torch.ones(3, 16, dtype=torch.float64)
        else:
            self.register_buffer("v", torch.ones(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        events = torch.relu(x)
        v = self.v * self.leak.exp() + self.fc(events)
        if self.attribute:
            self.v = v
        else:
            self.v.copy_(v)
        result: Tensor = v.clone()
        return result


@pytest.mark.parametrize("attribute", [False, True])
def test_states_are_not_kept(attribute: bool) -> None:
    model = Stateful(attribute).double()
    x = torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        fast, kept = compiled(model, x)
        for _ in range(3):
            assert_same(fast(x), twin(x))
        assert all("leak" in str(each.graph.code) for each in kept)
        assert not any("v" in [n.name for n in each.graph.graph.nodes] for each in kept)


class Contiguous(nn.Module):
    """An operation that copies nothing where nothing is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(x), self.weight.contiguous())


def test_a_value_that_is_the_parameter_itself_is_copied() -> None:
    model, x = Contiguous().double(), torch.randn(3, 8, dtype=torch.float64)
    with torch.no_grad():
        fast, _ = compiled(model, x)
        for _ in range(2):
            assert_same(fast(x), model(x))
            model.weight.data.neg_()


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8))
        self.fc = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        events = torch.relu(x)
        drawn = torch.dropout(self.weight, 0.5, True)
        result: Tensor = self.fc(events) + F.linear(events, drawn)
        return result


def test_drawn_weights_are_not_kept() -> None:
    with torch.no_grad():
        fast, kept = compiled(Drawn(), torch.randn(3, 8))
        assert not kept
        assert not torch.equal(fast(torch.ones(3, 8)), fast(torch.ones(3, 8)))


def test_tensors_elsewhere_are_computed_unless_frozen() -> None:
    graph = torch.fx.symbolic_trace(_Doubled())
    kept = KeptWeights(graph)
    weight = torch.ones(3, device="meta")
    kept(weight)
    [first] = kept(weight)
    assert kept.computed == 2
    kept.frozen = True
    [frozen] = kept(weight)
    assert frozen is first
    assert kept.computed == 2
    kept(torch.ones(4, device="meta"))
    assert kept.computed == 3


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> tuple[Tensor]:
        return (weight * 2,)
