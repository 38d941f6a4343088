"""Zero weights are found however they came to be zero, and masks that change are followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import sparsify
from sparsify.products.find_products import find_products, layer_name
from sparsify.products.weight_facts import note_patterns
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from sparsify.weight_pattern import Pattern, find_pattern
from tests.models.pruned_nets import PRUNED, Recurrent, assert_same, example, mask_of

aten = torch.ops.aten
ways = pytest.mark.parametrize("make", PRUNED.values(), ids=PRUNED)


def noted(model: nn.Module, *args: Tensor) -> tuple[fx.Graph, dict[str, Pattern | None]]:
    """The recorded graph, and the patterns of its products by their names."""
    with torch.no_grad():
        recording = record(model, args, {})
    assert isinstance(recording, Recording)
    graph = recording.graph.graph
    note_patterns(graph, recording.calling.operands(args, {}))
    return graph, {product.name: product.pattern for product in find_products(graph)}


def density(pattern: Pattern | None) -> float:
    assert pattern is not None
    return pattern.density


@ways
def test_a_product_has_the_density_of_what_it_reads(make: Callable[[], Recurrent]) -> None:
    model = make()
    _, patterns = noted(model, example())
    assert set(patterns) == {"encode", "recur"}
    assert density(patterns["encode"]) == 1
    assert density(patterns["recur"]) == float(model.get_buffer("kept").mean()) < 0.3


@ways
def test_every_matrix_on_the_way_has_a_pattern(make: Callable[[], Recurrent]) -> None:
    graph, patterns = noted(make(), example())
    found = [node for node in graph.nodes if node.target is aten.t.default]
    assert len(found) == 2 * 6  # those of both products in every step
    densities = {density(node.meta.get("pattern")) for node in found}
    assert densities == {1.0, density(patterns["recur"])}


class Product(nn.Module):
    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


@pytest.mark.parametrize(
    ("product", "found"),
    [
        (torch.nn.functional.linear, (1, 4)),
        (lambda x, w: x @ w.t(), (1, 4)),
        (lambda x, w: x @ w.t().contiguous(), (1, 4)),
        (lambda x, w: x @ w, (2, 4)),
        (lambda x, w: torch.addmm(torch.ones(8), x, w.t()), (1, 4)),
        (lambda x, w: torch.addmm(torch.ones(8), x, w), (2, 4)),
    ],
)
def test_groups_lie_along_receivers_however_a_weight_is_read(
    product: Callable[[Tensor, Tensor], Tensor], found: tuple[int, int]
) -> None:
    weight = torch.zeros(8, 8)
    weight[::4, 1:3] = 1  # two of eight receivers, all of the same two senders
    _, patterns = noted(Product(weight, product), torch.randn(2, 8))
    [pattern] = patterns.values()
    assert pattern is not None
    assert (pattern.density, pattern.n_of_m) == (4 / 64, found)


def test_a_convolution_has_a_density() -> None:
    model = nn.Conv2d(4, 8, 3)
    with torch.no_grad():
        model.weight[:4] = 0
    _, patterns = noted(model, torch.randn(1, 4, 5, 5))
    assert density(patterns["weight"]) == 0.5


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("inside", [False, True])
def test_the_weights_of_recurrent_modules_have_patterns(
    kind: Callable[[int, int], nn.Module], inside: bool
) -> None:
    layer = kind(8, 16)
    prune.random_unstructured(layer, "weight_hh_l0", 0.75)
    model = nn.Sequential(layer) if inside else layer
    _, patterns = noted(model, torch.randn(3, 2, 8))
    name = "0." if inside else ""
    assert density(patterns[f"{name}weight_hh_l0"]) == 0.25
    assert density(patterns[f"{name}weight_ih_l0"]) == 1


class Hyper(nn.Module):
    """A weight that is computed from the input, and one that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 64)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        computed: Tensor = x @ self.fc(x[0]).view(8, 8)
        drawn: Tensor = computed @ torch.dropout(self.weight, 0.5, True)
        return drawn


def test_weights_that_are_no_facts_have_no_pattern() -> None:
    _, patterns = noted(Hyper(), torch.randn(3, 8))
    assert {name: p is not None for name, p in patterns.items()} == {"fc": True, "weight": False}


def test_the_copies_of_an_unrolled_loop_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def find(weight: Tensor) -> Pattern:
        calls.append(weight)
        return find_pattern(weight)

    monkeypatch.setattr("sparsify.products.weight_facts.find_pattern", find)
    noted(PRUNED["masked in forward"](), example())
    # Two parameters, the mask, its product with one of them, and two transposed.
    assert len(calls) == 6


def test_a_layer_is_called_the_same_with_and_without_a_mask() -> None:
    assert [layer_name(path) for path in ("a.fc.weight", "a.fc.weight_orig")] == ["a.fc"] * 2
    assert layer_name("a.fc.parametrizations.weight.original") == "a.fc"
    assert layer_name("rnn.parametrizations.weight_hh_l0.original1") == "rnn.weight_hh_l0"
    assert layer_name("rnn.weight_hh_l0_orig") == layer_name("rnn.weight_hh_l0")
    assert layer_name("weight_orig") == layer_name("weight") == "weight"


@ways
def test_masks_and_weights_that_change_are_seen(make: Callable[[], Recurrent]) -> None:
    model = make().eval()
    x = example()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x)
        assert not fast.compiled.compiled.runs_original
        changes: list[Callable[[], object]] = [
            lambda: mask_of(model).data[3:9].zero_(),
            lambda: mask_of(model).numpy()[4].fill(1),
            lambda: next(p for n, p in model.named_parameters() if "recur" in n).data.neg_(),
        ]
        before = fast(x)
        assert_same(before, model(x))
        for change in changes:
            change()
            assert_same(fast(x), model(x))
        assert not torch.equal(fast(x), before)
    assert fast.compiled.recordings == 1


def test_masks_of_torch_can_be_added_and_removed() -> None:
    model = PRUNED["zeroed"]().eval()
    x = example()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x)
        fast(x)
        for change in (
            lambda: prune.random_unstructured(model.encode, "weight", 0.5),
            lambda: prune.random_unstructured(model.encode, "weight", 0.5),
            lambda: prune.remove(model.encode, "weight"),
        ):
            change()
            assert_same(fast(x), model(x))
        assert not fast.compiled.compiled.runs_original


def test_a_hook_beside_a_mask_is_still_an_observer() -> None:
    model = PRUNED["torch.nn.utils.prune"]().eval()
    model.recur.register_forward_pre_hook(lambda module, args: None)
    with torch.no_grad(), pytest.warns(UserWarning, match="observed"):
        fast: Any = sparsify.sparsify(model, example())
        fast(example())
    assert {site.code for site in fast.report.sites} == {"observed"}


def test_what_a_mask_leaves_on_the_module_is_left_there() -> None:
    model: Any = PRUNED["torch.nn.utils.prune"]()
    fast: Any = sparsify.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        fast(example()).sum().backward()
        optimizer.step()
    assert not fast.compiled.compiled.runs_original
    masked = model.recur.weight_mask * model.recur.weight_orig
    gradient = model.recur.weight_orig.grad
    assert gradient is not None
    assert gradient[model.kept == 0].count_nonzero() == 0 < gradient.count_nonzero()
    fast(example())
    assert torch.equal(model.recur.weight, masked)
    assert model.recur.weight.requires_grad
