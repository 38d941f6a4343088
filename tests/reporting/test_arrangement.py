"""Results that are dataclasses and dicts of other classes are made again by each call."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.arrangement import take_apart, take_apart_named
from sparsify.verification.model import verify
from tests.models.foreign_models import IN, layer, spike
from tests.training_harness import assert_same_gradients, events_at, parameter_gradients


@dataclass
class Output:
    spikes: Tensor
    membrane: Tensor
    note: str = "two steps"
    calls: InitVar[int] = 1
    doubled: int = field(init=False)

    def __post_init__(self, calls: int) -> None:
        self.doubled = 2 * calls
        self.extra = [self.membrane]  # no field


@dataclass(frozen=True, slots=True)
class Frozen:
    spikes: Tensor
    inner: Any


class ModelOutput(OrderedDict[str, Any]):
    """Items that are attributes as well, as in HF's."""

    spikes: Tensor

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def as_model_output(spikes: Tensor, membrane: Tensor) -> ModelOutput:
    made = ModelOutput()
    made["spikes"], made["membrane"] = spikes, membrane
    return made


RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Output,
    "frozen, in a tuple": lambda z, v: (Frozen(z, [v]), 3),
    "dict of a class": as_model_output,
    "namespace": lambda z, v: SimpleNamespace(spikes=z, membrane=v),
}


class Net(nn.Module):
    def __init__(self, result: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.rec = layer(IN, 8), layer(8, 8, bias=False)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        v = z = x.new_zeros(x.shape[1], 8)
        out = []
        for x_t in x:
            v = 0.9 * v + self.fc(x_t) + self.rec(z)
            z = spike(v - 1)
            out.append(z)
        return self.result(torch.stack(out), v)


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_classes_are_made_again(name: str) -> None:
    torch.manual_seed(0)
    model = Net(RESULTS[name]).double()
    eager = copy.deepcopy(model)
    fast: Any = sparsify(model, timing=False, plan=events_at(("rec",)))
    x = (torch.rand(6, 3, IN) < 0.3).double()
    for _ in range(2):
        results = []
        for module in (fast, eager):
            module.zero_grad(set_to_none=True)
            leaves, arrangement = take_apart_named(module(x))
            sum(t.sum() for _, t in leaves if isinstance(t, Tensor)).backward()  # type: ignore[union-attr]
            results.append((leaves, arrangement, parameter_gradients(module)))
        (leaves, arrangement, gradients), (wanted, wanted_arrangement, wanted_gradients) = results
        assert arrangement == wanted_arrangement
        for (path, got), (wanted_path, expected) in zip(leaves, wanted, strict=True):
            assert path == wanted_path
            if isinstance(expected, Tensor):
                # float64, and far from thresholds: the rounding of a few additions
                assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
            else:
                assert got == expected
        assert_same_gradients(gradients, wanted_gradients)
    assert "event" in {site.decision for site in fast.report.sites}, fast.report
    assert verify(model, fast, x, gradients=True).events == 1


def test_each_call_returns_another_object() -> None:
    model = Net(as_model_output).eval()
    x = torch.rand(6, 3, IN)
    with torch.no_grad():
        fast: Any = sparsify(model, x, timing=False)
        first, second = fast(x), fast(x)
    assert type(first) is ModelOutput and first is not second
    assert first.spikes is first["spikes"] and first.spikes is not second.spikes
    first["spikes"] = None
    assert second["spikes"] is not None


def test_an_object_that_the_model_keeps_is_refused() -> None:
    class Keeps(Net):
        kept = Output(torch.zeros(1), torch.zeros(1))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.kept

    model = Keeps(lambda z, v: z).eval()
    x = torch.rand(6, 3, IN)
    with torch.no_grad(), pytest.warns(UserWarning, match="Return a copy"):
        fast: Any = sparsify(model, timing=False)
        assert fast(x)[1] is Keeps.kept
    assert "Return a copy" in str(fast.report)


def test_names_of_leaves() -> None:
    z, v = torch.zeros(1), torch.ones(1)
    named, arrangement = take_apart_named({"a": Output(z, v)}, "result")
    assert [name for name, _ in named] == [
        *("result['a'].spikes", "result['a'].membrane", "result['a'].note"),
        *("result['a'].doubled", "result['a'].extra[0]"),
    ]
    again = arrangement.put_together([leaf for _, leaf in named])["a"]
    assert again.spikes is z and again.extra[0] is v and again.doubled == 2
    assert take_apart({"a": again})[1] == arrangement
