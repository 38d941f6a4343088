"""Pruning in training: masks hold, follow a schedule, and are seen by compiled modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsify
from sparsify import Pruner, Pruning, PruningError
from tests.models.pruned_nets import Recurrent, assert_same, example

Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, 0.1),
    "fused Adam": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
}


def train(module: Any, optimizer: torch.optim.Optimizer, steps: int, pruner: Pruner | None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        module(example(4) + step).square().mean().backward()
        if pruner is not None:
            pruner.step()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_hold_whatever_the_optimizer_does(make: Optimizer) -> None:
    model = Recurrent()
    optimizer = make(model.parameters())  # before there are masks: the parameters stay the same
    train(model, optimizer, 3, None)  # momentum of weights that are pruned later
    pruner = Pruner(model, 0.75)
    pruner.prune()
    kept = pruner.masks()
    before = model.state_dict()["recur.weight"]
    train(model, optimizer, 4, None)
    after = model.state_dict()["recur.weight"]
    assert torch.equal(after != 0, kept["recur"])
    assert (after != before)[kept["recur"]].all()
    assert pruner.outcome.density == 0.25


def test_the_fraction_grows_by_a_cubic_schedule() -> None:
    model = nn.Sequential(nn.Linear(40, 50))
    pruner = Pruner(model, Pruning(0.8, begin=2, end=12, every=5))
    densities, changed = [], []
    for _ in range(15):
        changed.append(pruner.step())
        densities.append(pruner.outcome.density)
    assert [step for step, did in enumerate(changed) if did] == [2, 7, 12]
    expected = [1.0] * 2 + [1.0] * 5 + [1 - 0.8 * (1 - 0.5**3)] * 5 + [0.2] * 3
    # Each is the share of a whole number of 2000 weights.
    assert densities == pytest.approx(expected, rel=0, abs=0.5 / 2000)


def test_groups_lose_their_weights_one_by_one() -> None:
    pruner = Pruner(nn.Sequential(nn.Linear(8, 8)), Pruning(pattern="1:4", end=20, every=5))
    densities = set()
    for _ in range(21):
        pruner.step()
        densities.add(pruner.outcome.density)
    assert densities == {1.0, 0.5, 0.25}


def test_a_compiled_module_follows_masks_without_another_recording() -> None:
    model = Recurrent()
    pruner = Pruner(model, Pruning(0.9, end=6, every=2))
    fast: Any = sparsify.sparsify(model, timing=False)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    twin = Recurrent()
    twin_pruner = Pruner(twin, pruner.pruning)
    train(twin, torch.optim.Adam(twin.parameters(), 0.01), 8, twin_pruner)
    train(fast, optimizer, 8, pruner)
    assert not fast.compiled.compiled.runs_original
    assert fast.compiled.recordings == 1
    with torch.no_grad():
        x = example()
        evaluated = fast(x)
        pruner.prune()
        assert_same(evaluated, model(x))
    assert fast.compiled.recordings == 2
    assert pruner.outcome.density == 0.1
    found, expected = fast.state_dict(), twin.state_dict()
    for name in ("recur.weight", "encode.weight"):
        assert torch.equal(found[name] != 0, expected[name] != 0)


def test_movement_keeps_what_moves_away_from_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    weight: Any = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.1, 5.0, 0.1, 5.0]]))
    pruner = Pruner(model, Pruning(0.5, criterion="movement", begin=3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        (-model(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).sum()).backward()
        pruner.step()
        optimizer.step()
    assert (model.state_dict()["0.weight"] != 0).tolist() == [[True, False, True, False]]


def test_pruned_weights_with_large_gradients_grow_again() -> None:
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    weight: Any = model[0].weight
    with torch.no_grad():
        weight.copy_(torch.arange(1.0, 9.0)[None])
    x = torch.tensor([[0.0, 0.0, 9.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    calls: list[Tensor] = []

    def loss() -> Tensor:
        found: Tensor = model(x).sum()
        calls.append(found)
        return found

    pruner = Pruner(model, Pruning(0.5, end=10, every=5, regrow=0.5, loss=loss))
    kept = pruner.masks()["0"]
    assert kept.all()
    pruner.prune()  # the four smallest
    pruner.step()
    after = model[0].get_buffer("weight_mask")[0].tolist()
    # Half of the kept four go, the smallest; as many come, those with the largest gradients.
    assert after[2] == 1
    assert after[6:] == [1, 1]
    assert sum(after) == 4
    assert weight[0, 2] == 0  # and begins at zero
    assert weight.grad is None
    # The loss is that of the pruned model, though gradients are those of all weights.
    assert calls[0].item() == 5 + 6 + 7 + 8
    assert pruner.outcome.density == 0.5


def limited(accuracies: list[float], **asked: Any) -> tuple[nn.Module, Pruner]:
    """A pruner that evaluates to ``accuracies``, one after another."""
    values = iter(accuracies)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    pruning = Pruning(0.8, evaluate=lambda _: next(values), most_loss=0.1, **asked)
    return model, Pruner(model, pruning)


def test_pruning_goes_back_to_the_last_state_within_the_limit() -> None:
    model, pruner = limited([0.9, 0.88, 0.7], end=12, every=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    changed, states = [], []
    for _ in range(13):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        changed.append(pruner.step())
        if pruner.outcome.stopped:
            break
        optimizer.step()
    assert [step for step, did in enumerate(changed) if did] == [0, 3, 6]
    # What was evaluated at step 3, before it was pruned further: weights, masks, statistics.
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in states[3].items())
    assert not torch.equal(after["0.weight"], states[6]["0.weight"])
    layer: Any = model.get_submodule("0")
    assert torch.equal(layer.weight, after["0.weight"])
    outcome = pruner.outcome
    assert (outcome.density, outcome.accuracy_before, outcome.accuracy) == (1.0, 0.9, 0.88)
    assert "stopped at 100.0% of the weights with an accuracy of 0.88: at" in outcome.stopped
    assert "it was 0.7, more than most_loss=0.1 below the 0.9" in str(outcome)
    assert [pruner.step() for _ in range(9)] == [False] * 9


@pytest.mark.parametrize(("last", "density"), [(0.85, 0.2), (0.5, 1.0)])
def test_what_came_of_the_last_update_is_looked_at_on_request(last: float, density: float) -> None:
    _, pruner = limited([0.9, last])
    assert pruner.step()
    assert pruner.outcome.density == pytest.approx(0.2, rel=0, abs=0.5 / 256)
    assert pruner.check() == (density == 1.0)
    assert pruner.outcome.density == pytest.approx(density, rel=0, abs=0.5 / 256)
    assert pruner.outcome.accuracy == (last if density < 1 else 0.9)


def test_zeros_can_be_made_permanent() -> None:
    model = Recurrent()
    pruner = Pruner(model, 0.5)
    pruner.prune()
    state = model.state_dict()
    pruner.remove()
    assert set(dict(model.named_buffers())) == {"kept"}
    assert torch.equal(model.recur.weight, state["recur.weight"])
    assert model.state_dict().keys() == state.keys()


def test_masks_go_on_where_torch_goes_on_pruning() -> None:
    model: Any = Recurrent()
    pruner = Pruner(model, Pruning(0.5, only="recur"))
    pruner.prune()
    assert model.recur.weight_mask.dtype is torch.bool
    prune.l1_unstructured(model.recur, "weight", 0.5)
    assert float(model.recur.weight_mask.mean()) == 0.25
    model(example()).sum().backward()
    gradient = model.recur.weight_orig.grad
    assert int(gradient.count_nonzero()) <= 256
    assert Pruner(model, Pruning(0.0, only="recur")).outcome.density == 0.25


RESUMED: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "movement": {"criterion": "movement"},
    "regrown": {"regrow": 0.5},
}


@pytest.mark.parametrize("asked", RESUMED.values(), ids=RESUMED)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    def make() -> tuple[Recurrent, Pruner, torch.optim.Optimizer]:
        model = Recurrent()

        def loss() -> Tensor:
            found: Tensor = model(example(4)).square().mean()
            return found

        pruning = Pruning(0.9, end=12, every=2, begin=2, loss=loss, **asked)
        pruner = Pruner(model, pruning)
        return model, pruner, torch.optim.SGD(model.parameters(), 1e-4)

    straight, pruner, optimizer = make()
    train(straight, optimizer, 7, pruner)
    parts = {"model": straight.state_dict(), "pruner": pruner.state_dict()}
    torch.save(parts, tmp_path / "checkpoint.pt")
    train(straight, optimizer, 7, pruner)

    resumed, again, optimizer = make()
    loaded = torch.load(tmp_path / "checkpoint.pt")  # no code runs: tensors and numbers
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["pruner"])
    assert again.steps == 7
    assert torch.equal(again.masks()["recur"], loaded["pruner"]["masks"]["recur"])
    train(resumed, optimizer, 7, again)
    assert again.outcome == pruner.outcome
    assert again.outcome.density == 0.1
    states = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_a_checkpoint_has_what_to_go_back_to() -> None:
    model, pruner = limited([0.9, 0.88], end=12, every=3)
    for _ in range(5):
        pruner.step()
    states = model.state_dict(), pruner.state_dict()
    other, again = limited([0.5], end=12, every=3)
    layer: Any = model.get_submodule("0")
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    assert [again.step() for _ in range(2)] == [False, True]
    assert (again.outcome.density, again.outcome.accuracy) == (1.0, 0.88)
    assert torch.equal(other.state_dict()["0.weight"], layer.weight_orig)
    third = Pruner(model, 0.5)
    third.load_state_dict(again.state_dict())
    assert third.outcome.stopped == again.outcome.stopped != ""


def test_a_checkpoint_of_other_layers_is_refused() -> None:
    state = Pruner(nn.Sequential(nn.Linear(8, 4)), 0.5).state_dict()
    pruner = Pruner(nn.Sequential(nn.Linear(8, 6)), 0.5)
    with pytest.raises(PruningError, match=r"of 0 \[4, 8\], this one prunes 0 \[6, 8\]; make it"):
        pruner.load_state_dict(state)


def test_gradients_of_a_loss_are_computed_once_for_what_is_pruned_and_once_for_what_grows() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        found: Tensor = model(torch.ones(1, 8)).square().sum()
        return found

    for criterion, expected in (("magnitude", 1), ("gradient", 2)):
        calls.clear()
        Pruner(model, Pruning(0.5, criterion=criterion, end=10, regrow=0.5, loss=loss)).step()
        assert len(calls) == expected


def test_weights_that_were_masked_by_hand_keep_the_names_of_torch() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    names = set(model.state_dict())
    Pruner(model, 0.75).prune()
    assert set(model.state_dict()) == names == set(sparsify.sparsify(model).state_dict())
    assert {"0.weight_orig", "0.weight_mask", "1.weight"} < names


def test_a_pruner_of_a_sparsified_module_prunes_its_model() -> None:
    model = Recurrent()
    fast = sparsify.sparsify(model)
    pruner = Pruner(fast, 0.5)
    assert pruner.model is model
