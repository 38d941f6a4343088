from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.errors import NothingCompiled, SparsifyError
from tests.models.small_nets import RecurrentNet, spikes

X = spikes()


def test_a_sparsified_module_is_one_of_its_class() -> None:
    model = RecurrentNet()
    fast = sparsify(model)
    assert isinstance(fast, RecurrentNet)
    assert type(fast).__name__ == "RecurrentNet"
    assert type(fast).__module__ == type(model).__module__
    assert repr(fast).startswith("Sparsified[RecurrentNet](")
    assert fast is not model
    assert type(model) is RecurrentNet


def test_models_of_one_class_stay_of_one_class() -> None:
    """As ``torch.func`` asks of an ensemble; a model that has attributes of our names is apart."""
    models = [RecurrentNet() for _ in range(2)]
    ensemble = [sparsify(model) for model in models]
    assert type(ensemble[0]) is type(ensemble[1])
    stacked, _ = torch.func.stack_module_state(ensemble)
    assert stacked.keys() == dict(models[0].named_parameters()).keys()
    reporting = RecurrentNet()
    reporting.report = "mine"  # type: ignore[assignment]
    other: Any = sparsify(reporting)
    assert type(other) is not type(ensemble[0])
    assert other.report == "mine" and other.compiled.report is not None


@pytest.mark.parametrize("name", ["graph", "code", "kernels", "stages"])
def test_what_a_call_makes_is_absent_before_it(name: str) -> None:
    """Others ask with ``hasattr``, as ``torch.jit.trace`` does; users are told what to do."""
    fast: Any = sparsify(RecurrentNet().eval(), timing=False)
    assert not hasattr(fast, name) and not hasattr(fast.compiled, name)
    for holder in (fast, fast.compiled):
        with pytest.raises(NothingCompiled, match="call the module once, or give sparsify an ex"):
            getattr(holder, name)
    with pytest.raises(AttributeError, match="object has no attribute 'codes'"):
        _ = fast.codes
    with torch.no_grad():
        fast(X)
    assert hasattr(fast, name) and getattr(fast, name) is not None


def test_importing_sparsify_gives_every_module_the_method() -> None:
    fast = RecurrentNet().sparsify()  # type: ignore[operator]
    assert isinstance(fast, RecurrentNet)


def test_attributes_are_shared_in_both_directions() -> None:
    model = RecurrentNet()
    fast: Any = sparsify(model)
    fast.beta = 0.25
    fast.note = "new"
    model.register_buffer("scale", torch.ones(3))
    assert model.beta == 0.25
    assert vars(model)["note"] == "new"
    assert fast.scale is model.scale
    del fast.note
    assert not hasattr(model, "note")


def test_sparsifying_twice_starts_from_the_original() -> None:
    model = RecurrentNet()
    fast = sparsify(sparsify(model))
    assert fast.original is model


def test_a_forward_on_the_instance_is_refused() -> None:
    model = RecurrentNet()
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(SparsifyError, match=r"forward is replaced on the instance .*call sparsify"):
        sparsify(model)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("around", [lambda fast: fast, lambda fast: nn.Sequential(fast, nn.ReLU())])
def test_a_script_of_it_is_refused_with_a_way_out(around: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fast: Any = sparsify(model, X, timing=False)
    before = dict(vars(model))
    with pytest.raises(SparsifyError, match=r"a sparsified Sequential: .*script its \.original"):
        torch.jit.script(around(fast))
    assert vars(model) == before
    assert torch.equal(torch.jit.script(fast.original)(X), model(X))
    assert torch.equal(fast(X), model(X))


class WithOwnNames(nn.Module):
    """Uses the names of our shortcuts for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()
        self.plan = "mine"

    def report(self) -> str:
        return "my report"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def test_a_models_own_names_win() -> None:
    fast: Any = sparsify(WithOwnNames().eval(), X, timing=False)
    assert fast.plan == "mine"
    assert fast.report() == "my report"
    assert fast.compiled.plan.sites
    assert fast.graph is fast.compiled.graph


def test_shortcuts_lead_to_the_engine() -> None:
    fast: Any = sparsify(RecurrentNet().eval(), X, timing=False)
    assert fast.report.sites == fast.compiled.report.sites
    assert fast.plan is fast.compiled.plan
    assert fast.stages[0].name == "record"
    assert "def forward(self" in fast.code
    for name, kernel in fast.kernels.items():
        assert name in fast.code
        assert kernel.kernel.gathers
        assert kernel.schedule.strategy in kernel.source


def test_what_there_is_before_the_first_call() -> None:
    fast: Any = sparsify(RecurrentNet())
    assert str(fast.report).strip() == "nothing is recorded yet: the first call will be"
    assert str(fast.plan) == "nothing is decided yet"
    with pytest.raises(RuntimeError, match="call the module once, or give sparsify an example"):
        _ = fast.graph


def test_a_copy_of_a_model_that_was_never_called_is_independent() -> None:
    fast = sparsify(RecurrentNet())
    clone = copy.deepcopy(fast)
    own, other = dict(fast.named_parameters()), dict(clone.named_parameters())
    assert own.keys() == other.keys()
    assert all(own[name] is not other[name] for name in own)


def test_a_part_of_a_model_can_be_sparsified() -> None:
    model = WithOwnNames().eval()
    with torch.no_grad():
        expected = model(X)
        model.net = sparsify(model.net, X, timing=False)  # type: ignore[assignment]
        assert torch.equal(model(X), expected)
    whole: Any = sparsify(model, X, timing=False)
    with torch.no_grad():
        assert torch.equal(whole(X), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "gpu"}, "unknown backend 'gpu'; known: 'cpp'")],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(RecurrentNet(), **options)
