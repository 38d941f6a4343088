"""Pruning at once: which layers, by what, how far, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import sparsify
from sparsify import Pruning, PruningError
from sparsify.cli import main
from sparsify.pruning.outcome import PruningOutcome
from sparsify.pruning.prune_model import prune_model
from sparsify.pruning.request import Context
from tests.pruned_nets import Masked, Recurrent, example


class Mixed(nn.Module):
    """Layers of many kinds; ``table`` and ``own`` are matrices, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.rnn = nn.GRU(8, 16, num_layers=2)
        self.block = nn.ModuleDict({"fc": nn.Linear(16, 16), "cell": nn.LSTMCell(16, 8)})
        self.own = nn.Parameter(torch.randn(8, 8))
        self.decay = nn.Parameter(torch.rand(8))

    def forward(self, text: Tensor) -> Tensor:
        x, _ = self.rnn(self.table(text))
        h, _ = self.block["cell"](torch.relu(self.block["fc"](x[-1])))
        result: Tensor = h @ self.own
        return result


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
    assert len(kept) / (len(kept) + len(gone)) == pytest.approx(0.2, abs=1 / len(gone))
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
        assert again.compiled.pruned.density == pytest.approx(0.25, abs=1e-3)


def test_what_is_pruned_stays_pruned_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARSIFY", "0")
    fast: Any = sparsify.sparsify(Recurrent(hidden=32).eval(), example(4), prune=0.75)
    assert fast.compiled.pruned.density == pytest.approx(0.25, abs=1e-3)
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
        torch.testing.assert_close(fast(x), fast.original(x))
        assert torch.equal(model.recur.weight != 0, torch.ones(32, 32, dtype=torch.bool))
    assert "pruned to nothing: recur" in str(fast.report)
    assert fast.report["recur"].weight_density == 0
    assert fast.report["encode"].weight_density == 0.5
    assert "pruned: 10.0% of 1280 weights" in str(fast.report)
    assert str(fast.compiled.pruned).startswith("encode   50.0% of 256")
    sparsify.verify(fast.original, fast, x, events=0)


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


def masked_outside(values: float) -> nn.Module:
    layer = nn.Linear(4, 4)
    prune.custom_from_mask(layer, "weight", torch.full((4, 4), values))
    return nn.Sequential(layer)


def with_weight(value: float) -> nn.Module:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 2] = value
    return nn.Sequential(layer)


def with_mask_of_another_shape() -> nn.Module:
    model: Any = masked_outside(1.0)
    model[0].weight_mask = torch.ones(2, 2)
    pruned: nn.Module = model
    return pruned


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Masked(torch.ones(4, 4)))
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    return model


def nothing(layer: str, weight: Tensor, context: Context) -> Any:
    """A criterion that forgets to return."""


@pytest.mark.parametrize(
    ("make", "pruning", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6)), "2:4", r"^0 has 6 receivers.* except_='0'"),
        (
            lambda: nn.Sequential(nn.Linear(6, 4)),
            Pruning(pattern="2:4", along="senders"),
            "^0 has 6 senders, which is no multiple of the 4",
        ),
        (
            lambda: nn.Sequential(nn.GRU(8, 6)),
            "2:4",
            r"^0\.weight_ih_l0 has 6 receivers",  # of a gate: 18 would be wrong, too, but 24 not
        ),
        (lambda: with_weight(torch.nan), 0.5, "^0 has weights that are NaN.* except_='0'"),
        (lambda: with_weight(torch.inf), 0.5, "^0 has weights that are infinite"),
        (lambda: masked_outside(0.5), 0.5, "^0 has a mask with values beside 0 and 1.*remove"),
        (with_mask_of_another_shape, 0.5, r"^0 has a mask of \[2, 2\] for weights of \[4, 4\]"),
        (parametrized, 0.5, "^0 is computed by a parametrization.* except_='0'"),
        (tied, 0.5, r"^a and b share one weight.*except_=\('a', 'b'\)"),
        (
            Mixed,
            Pruning(0.5, only="block.cell", criterion=lambda n, w, c: w[0]),
            r"^block\.cell\.weight_ih: the criterion '<lambda>' returned \[16\] for weights of",
        ),
        (
            Mixed,
            Pruning(0.5, only="own", criterion=lambda n, w, c: w * torch.nan),
            "^own: the criterion '<lambda>' returned NaN.*-inf",
        ),
        (Mixed, Pruning(0.5, only="own", criterion=nothing), "^own: .*NoneType"),
        (Mixed, Pruning(0.5, criterion="event-weighted"), "need an example"),
        (Mixed, Pruning(0.5, criterion="gradient"), "has no gradient yet.*loss="),
        (Mixed, Pruning(0.5, criterion="movement"), "has no gradient yet.*Pruner.step"),
        (Mixed, Pruning(0.5, only="nowhere"), "only='nowhere'.*its matrices are own, table.weight"),
        (Mixed, {"rnn": 0.5, "nowhere": 0.1}, "fraction: 'nowhere' fits no weight"),
        (Mixed, Pruning(0.5, except_="nowhere"), "except_: 'nowhere' fits no weight; its matri"),
        (Mixed, Pruning(0.5, only=("rnn", "nowhere")), "only: 'nowhere' fits no weight"),
        (lambda: nn.ReLU(), 0.5, "fits no weight of ReLU; it has no matrices"),
        (lambda: nn.Conv2d(1, 4, 3), 0.5, "kernels of convolutions are not pruned"),
        (lambda: nn.Embedding(4, 3), 0.5, "of your own modules have to be named: only='weight'"),
        (Mixed, Pruning(0.5, evaluate=lambda model: None), "evaluate returned None"),  # type: ignore[arg-type, return-value]
        (
            Mixed,
            Pruning(0.5, criterion="gradient", loss=lambda: None),  # type: ignore[arg-type, return-value]
            "loss returned None; return the loss itself",
        ),
    ],
)
def test_what_cannot_be_pruned_is_named(
    make: Callable[[], nn.Module], pruning: Any, said: str
) -> None:
    with pytest.raises(PruningError, match=said):
        prune_model(make(), pruning)


def test_a_loss_of_another_model_ranks_nothing() -> None:
    model = Recurrent(hidden=32)

    def loss() -> Tensor:
        result: Tensor = model(example(4)).square().mean()
        return result

    with pytest.raises(PruningError, match=r"it calls another model.*unless in_place=True"):
        prune_model(model, Pruning(0.5, criterion="gradient", loss=loss))
    same, outcome = prune_model(model, Pruning(0.5, criterion="gradient", loss=loss, in_place=True))
    assert same is model
    assert outcome.density == pytest.approx(0.5, abs=1e-3)


def test_senders_that_no_module_shows() -> None:
    pruning = Pruning(0.5, only="own", criterion="event-weighted")
    with pytest.raises(PruningError, match="own did not run as a module on the example"):
        prune_model(Mixed(), pruning, torch.randint(12, (5, 3)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fraction": 1.5}, "from 0 to 1"),
        ({"fraction": {"a": -0.5}}, "from 0 to 1"),
        ({"fraction": True}, "a fraction of True: give a number"),
        ({"fraction": "2:4"}, "a fraction of '2:4': give a number"),
        ({"fraction": [0.5]}, r"a fraction of \[0.5\]: give a number"),
        ({"fraction": {"a": "0.5"}}, "a fraction of '0.5': give a number"),
        ({}, "say which fraction"),
        ({"fraction": 0.5, "pattern": "2:4"}, "leave fraction out"),
        ({"pattern": "4:4"}, "N must be smaller"),
        ({"fraction": 0.5, "pattern": "rows"}, "unknown pattern 'rows'; known: 'unstructured'"),
        ({"fraction": 0.5, "criterion": "size"}, "unknown criterion 'size'; known: 'magnitude'"),
        ({"fraction": 0.5, "along": "rows"}, "give 'receivers' or 'senders'"),
        ({"fraction": 0.5, "every": 0}, "every 0"),
        ({"fraction": 0.5, "begin": -1}, "from -1"),
        ({"fraction": 0.5, "begin": 9, "end": 4}, "from 9 to 4.* end is not before it"),
        ({"fraction": 0.5, "regrow": 0.3}, "give loss="),
        ({"fraction": 0.5, "regrow": 0.3, "pattern": "8x1"}, "single weights"),
        ({"fraction": 0.5, "most_loss": 0.1}, "needs evaluate="),
    ],
)
def test_requests_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pruning(**given)


PRUNED_FILE = """
import sparsify
from sparsify.pruning.prune_model import prune_model
from tests.pruned_nets import Recurrent, example


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
