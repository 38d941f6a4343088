"""Pruning at once: which layers, by what, and how far."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsify
from sparsify import Pruning
from sparsify.command_line.main import main
from sparsify.products.pruning_outcome import PruningOutcome
from sparsify.pruning.prune_model import prune_model
from sparsify.pruning.request import Context
from tests.models.pruned_nets import Mixed, Recurrent, assert_same, example

GRU = [f"rnn.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")]
LAYERS = [*GRU, "block.fc", "block.cell.weight_ih", "block.cell.weight_hh"]


def layers_of(outcome: PruningOutcome) -> list[str]:
    return [layer.name for layer in outcome.layers]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, LAYERS),
        ({"only": "block.*"}, LAYERS[4:]),
        ({"only": ("rnn.weight_hh_*", "own")}, ["own", GRU[1], GRU[3]]),
        ({"except_": ("rnn", "block.fc")}, LAYERS[5:]),
        ({"only": "*"}, LAYERS),
        ({"only": ("*", "table.weight")}, ["table", *LAYERS]),
        ({"fraction": {"block.fc": 0.25, "rnn.*": 0.5}}, LAYERS[:5]),
    ],
)
def test_layers_are_chosen_by_glob(asked: dict[str, Any], expected: list[str]) -> None:
    _, outcome = prune_model(Mixed(), Pruning(**{"fraction": 0.5, **asked}))
    assert layers_of(outcome) == expected
    if "block.fc" in asked.get("fraction", ()):
        assert outcome["block.fc"].density == 0.75
        assert sum(outcome[name].density * outcome[name].weights for name in GRU) == sum(
            outcome[name].weights / 2 for name in GRU
        )
    else:
        assert outcome.density == 0.5


def test_the_smallest_weights_of_the_whole_model_go() -> None:
    model = Mixed()
    pruned, outcome = prune_model(model, 0.8)
    with torch.no_grad():
        before = dict(model.named_parameters())
        after = pruned.state_dict()
        paths = [name if "rnn" in name or "cell" in name else f"{name}.weight" for name in LAYERS]
        kept = torch.cat([before[path][after[path] != 0].abs() for path in paths])
        gone = torch.cat([before[path][after[path] == 0].abs() for path in paths])
    assert kept.min() > gone.max()
    assert len(gone) == round(0.8 * (len(kept) + len(gone)))
    assert outcome.density == len(kept) / (len(kept) + len(gone))
    assert outcome["block.fc"].density == float((after["block.fc.weight"] != 0).float().mean())


def test_the_dense_model_is_changed_only_where_it_is_asked_for() -> None:
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    pruned, _ = prune_model(model, 0.5)
    assert pruned is not model
    assert not list(model.buffers())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    same, _ = prune_model(model, Pruning(0.5, in_place=True))
    assert same is model
    assert prune.is_pruned(model)


def test_copies_and_pickles_know_what_was_pruned() -> None:
    fast: Any = sparsify.sparsify(Recurrent(hidden=32).eval(), prune=0.75)
    said = "pruned: 25.0% of "
    for again in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert said in str(again.report)
        assert again.compiled.pruned.density == 0.25


def test_what_is_pruned_stays_pruned_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSIFY", "0")
    fast: Any = sparsify.sparsify(Recurrent(hidden=32).eval(), example(4), prune=0.75)
    assert fast.compiled.pruned.density == 0.25
    assert "SPARSIFY=0 is set: everything runs as the original" in str(fast.report)
    assert torch.equal(fast(example(4)), fast.original(example(4)))


def test_recurrent_modules_run_with_their_masks() -> None:
    model = nn.LSTM(8, 16)
    pruned, _ = prune_model(model, Pruning(0.9, only="*weight_hh*"))
    x = torch.randn(5, 2, 8)
    dense = copy.deepcopy(model)
    dense.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert int(torch.count_nonzero(dense.state_dict()["weight_hh_l0"])) == 1024 - round(
            0.9 * 1024
        )
        assert torch.equal(pruned(x)[0], dense(x)[0])
        assert not torch.equal(pruned(x)[0], model(x)[0])


@pytest.mark.parametrize(
    ("pattern", "along", "n_of_m"),
    [("2:4", "receivers", (2, 4)), ("1:4", "receivers", (1, 4)), ("2:4", "senders", None)],
)
def test_patterns_of_n_of_m(pattern: str, along: Any, n_of_m: tuple[int, int] | None) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    pruned, outcome = prune_model(model, Pruning(pattern=pattern, along=along))
    n, m = map(int, pattern.split(":"))
    assert outcome.density == n / m
    if n_of_m:
        assert outcome["0"].pattern.n_of_m == n_of_m
    else:
        kept = pruned.state_dict()["0.weight"] != 0
        assert set(kept.view(32, 8, 4).sum(2).flatten().tolist()) == {2}


def test_blocks() -> None:
    _, outcome = prune_model(nn.Sequential(nn.Linear(32, 64)), Pruning(0.75, pattern="16x1"))
    assert outcome["0"].pattern.run_density[16] == outcome.density == 0.25


def test_a_sender_that_is_silent_matters_little() -> None:
    model = Recurrent()
    x = example()
    x[..., :4] = 0
    pruned, outcome = prune_model(model, Pruning(0.5, only="encode", criterion="event-weighted"), x)
    weight = pruned.state_dict()["encode.weight"]
    assert not weight[:, :4].any()
    assert weight[:, 4:].all()
    assert outcome.density == 0.5


def test_activity_is_that_of_recurrent_states() -> None:
    seen: dict[str, Tensor | None] = {}

    def criterion(layer: str, weight: Tensor, context: Context) -> Tensor:
        seen[layer] = context.activity
        assert context.kept.all()
        assert context.gradient is None
        return weight.abs()

    prune_model(Mixed(), Pruning(0.5, criterion=criterion), torch.randint(12, (5, 3)))
    assert list(seen) == LAYERS
    shares = {layer: activity for layer, activity in seen.items() if activity is not None}
    assert list(shares) == LAYERS
    assert shares["rnn.weight_hh_l0"].shape == (16,)
    assert shares["block.fc"].tolist() == [1.0] * 16  # a GRU's states are never zero
    assert 0 < float(shares["block.cell.weight_ih"].mean()) < 1  # behind a ReLU
    assert shares["block.cell.weight_hh"].shape == (8,)


def test_gradients_of_a_loss_rank_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    weight: Any = model[0].weight
    with torch.no_grad():
        weight.fill_(1.0)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    pruning = Pruning(0.5, criterion="gradient", loss=lambda: model(x).sum(), in_place=True)
    pruned, _ = prune_model(model, pruning)
    assert (pruned.state_dict()["0.weight"] != 0).tolist() == [[False, False, True, True]] * 4
    assert weight.grad is None


def accuracy_of(least: float) -> Callable[[nn.Module], float]:
    """1 while at least this share of weights is there, then 0.5."""

    def evaluate(model: nn.Module) -> float:
        weight = model.state_dict()["0.weight"]
        return 1.0 if float((weight != 0).float().mean()) >= least else 0.5

    return evaluate


def test_a_limit_of_accuracy_stops_with_what_was_reached() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    pruning = Pruning(0.95, evaluate=accuracy_of(0.3), most_loss=0.1)
    with pytest.warns(
        UserWarning, match=r"pruning stopped at 3\d\.\d% .* it was 0\.5.*sparsify\.Pruner"
    ):
        pruned, outcome = prune_model(model, pruning)
    assert 0.3 <= outcome.density < 0.4
    assert (outcome.accuracy_before, outcome.accuracy) == (1.0, 1.0)
    assert outcome.stopped in outcome.notes
    weight = pruned.state_dict()["0.weight"]
    assert torch.equal(weight[weight != 0], model.state_dict()["0.weight"][weight != 0])


def test_accuracy_within_the_limit_prunes_all() -> None:
    pruning = Pruning(0.5, evaluate=accuracy_of(0.5), most_loss=0.1)
    _, outcome = prune_model(nn.Sequential(nn.Linear(64, 64)), pruning)
    assert (outcome.density, outcome.stopped) == (0.5, "")
    _, outcome = prune_model(
        nn.Sequential(nn.Linear(64, 64)), Pruning(0.9, evaluate=accuracy_of(0.5))
    )
    assert (outcome.accuracy_before, outcome.accuracy) == (1.0, 0.5)


def test_a_layer_pruned_to_nothing_works_and_is_told() -> None:
    model = Recurrent().eval()
    pruning = Pruning({"recur": 1.0, "encode": 0.5})
    x = example()
    with torch.no_grad():
        fast: Any = sparsify.sparsify(model, x, prune=pruning, timing=False)
        assert_same(fast(x), fast.original(x))
        assert torch.equal(model.recur.weight != 0, torch.ones(32, 32, dtype=torch.bool))
    assert "pruned to nothing: recur" in str(fast.report)
    assert fast.report["recur"].weight_density == 0
    assert fast.report["encode"].weight_density == 0.5
    assert "pruned: 10.0% of 1280 weights" in str(fast.report)
    assert str(fast.compiled.pruned).startswith("encode   50.0% of 256")
    sparsify.verify(fast.original, fast, x, events=0, must_replace=True)


def test_states_have_the_names_of_the_dense_model_and_load_both_ways() -> None:
    model = Recurrent()
    fast: Any = sparsify.sparsify(model, prune=0.75)
    state = fast.state_dict()
    assert set(state) == set(model.state_dict())
    assert int(state["recur.weight"].count_nonzero()) < 1024
    dense = Recurrent()
    dense.load_state_dict(state)
    x = example()
    with torch.no_grad():
        assert torch.equal(dense(x), fast.original(x))
        # A dense state is cut by the mask that is there.
        kept = state["recur.weight"] != 0
        fast.load_state_dict(model.state_dict())
        assert torch.equal(fast.state_dict()["recur.weight"], model.recur.weight * kept)
        # A sparser one brings its own.
        other, _ = prune_model(model, Pruning(0.9, criterion=lambda _n, w, _c: torch.rand_like(w)))
        fast.load_state_dict(other.state_dict())
        found = fast.state_dict()
        assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
        assert torch.equal(fast(x), fast.original(x))
    torn = dict(state)
    del torn["recur.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*recur\.weight"):
        fast.load_state_dict(torn)


def test_copies_of_a_model_that_was_trained_with_masks() -> None:
    pruned, _ = prune_model(Recurrent(), 0.5)
    pruned(example()).sum().backward()
    again, outcome = prune_model(pruned, 0.75)
    assert outcome.density == 0.25
    before, after = pruned.state_dict(), again.state_dict()
    assert not (after["recur.weight"] != 0)[before["recur.weight"] == 0].any()


PRUNED_FILE = """
import sparsify
from sparsify.pruning.prune_model import prune_model
from tests.models.pruned_nets import Recurrent, example


def make():
    model, _ = prune_model(Recurrent(hidden=64).eval(), 0.9)
    return model, example(4)
"""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["explain"], "recur"),
        (["verify", "--events", "0"], "threshold decisions equal"),
        (["show", "--stage", "install"], "recur_weight_mask"),
    ],
)
def test_commands_take_pruned_models(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pruned.py"
    path.write_text(PRUNED_FILE, encoding="utf-8")
    status = main([command[0], f"{path}:make", *command[1:]])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert said in printed.out
