"""What cannot be pruned, and requests that make no sense: each is named, with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsify import Pruning, PruningError
from sparsify.pruning.prune_model import prune_model
from sparsify.pruning.request import Context
from tests.models.pruned_nets import Masked, Mixed, Recurrent, example


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
        (Mixed, Pruning(0.5, end=9, every=3), r"^end, every: of gradual .*sparsify\.Pruner"),
        (Mixed, Pruning(0.5, begin=2), "^begin: of gradual pruning.*leave out"),
        (Mixed, Pruning(0.5, regrow=0.1, loss=lambda: torch.ones(1)), "^regrow: of gradual"),
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
    assert outcome.density == 0.5


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
