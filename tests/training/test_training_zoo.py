"""Every training network: gradients as eager's, from kernels that really ran.

All of it is float64, where a flip of a spike by rounding is as good as impossible.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.verification.model import verify
from tests.models.training_nets import (
    ELSEWHERE,
    IN_FLOAT32,
    NETS,
    ROUNDED,
    WITHOUT_GRADIENTS,
    ZOO_NETS,
    TrainingNet,
    from_zoo,
    net,
)
from tests.models.zoo import ENTRIES, tensors_of
from tests.training_harness import (
    assert_same_gradients,
    assert_trained,
    events_at,
    gradients_of,
    sparsify_training,
)

SIZES = ((4, 2), (17, 5))  # steps and batch of later calls


# In float32 a rounding is 2 ** -24: what adds up to below 1e-12 in float64 is below 1e-3 here.
MOST_RELATIVE_FLOAT32 = 1e-3


def named(nets: tuple[TrainingNet, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("entry", nets, ids=lambda entry: entry.name)


@named((*NETS, *ZOO_NETS))
def test_gradients_are_those_of_eager(entry: TrainingNet) -> None:
    model, x = entry.model(), entry.inputs()
    example = x.clone().requires_grad_(x.is_floating_point())
    fast = sparsify_training(model, example, plan=events_at(entry.sites))
    assert_same_gradients(gradients_of(fast, x), gradients_of(entry.model(), x))
    if entry.code is None:
        assert_trained(fast, entry.sites)
        return
    assert fast.report.sites
    for site in fast.report.sites:
        assert (site.decision, site.code) == ("kept", entry.code), f"\n{fast.report}"
        assert site.reason


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_networks_without_gradients_have_none(name: str) -> None:
    """And equal results, with gradients enabled."""
    entry = from_zoo(next(each for each in ENTRIES if each.name == name))
    fast = sparsify_training(entry.model())
    model, x = entry.model(), entry.inputs()
    for _ in range(2):
        got, expected = fast(x), model(x)
        assert not expected.requires_grad and not got.requires_grad
        assert torch.equal(got, expected)


def test_every_network_of_the_zoo_is_here() -> None:
    tested = {*ELSEWHERE, *(each.name for each in ZOO_NETS)}
    assert {each.name for each in ENTRIES} <= tested


@named(tuple(net(name) for name in ("step by step", "recurrent", "EGRU language model")))
def test_other_sizes_are_served(entry: TrainingNet) -> None:
    model, x = entry.model(), entry.inputs()
    fast = sparsify_training(model, x.clone().requires_grad_(x.is_floating_point()))
    for steps, batch in SIZES:
        other = entry.inputs(steps, batch)
        assert_same_gradients(gradients_of(fast, other), gradients_of(entry.model(), other))
    assert_trained(fast, entry.sites)


def test_compiled_at_the_first_call() -> None:
    entry = net("recurrent")
    model, x = entry.model(), entry.inputs()
    fast = sparsify_training(model)
    for _ in range(2):
        assert_same_gradients(gradients_of(fast, x), gradients_of(entry.model(), x))
    assert_trained(fast, entry.sites)


@pytest.mark.parametrize("frozen", ["inp.weight", "inp.bias", "rec.weight"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    entry = net("recurrent")
    model, x = entry.model(), entry.inputs()
    eager = entry.model()
    for either in (model, eager):
        either.get_parameter(frozen).requires_grad_(False)
    fast = sparsify_training(model, x.clone().requires_grad_())
    got = gradients_of(fast, x)
    assert got[frozen] is None
    assert_same_gradients(got, gradients_of(eager, x))
    assert_trained(fast, entry.sites)


def last_step(result: object) -> Tensor:
    return next(tensors_of(result))[-1].sum()


def one_neuron(result: object) -> Tensor:
    return next(tensors_of(result))[..., 3].square().sum()


def second_output(result: object) -> Tensor:
    return list(tensors_of(result))[1].sum()


@pytest.mark.parametrize("loss", [last_step, one_neuron, second_output])
def test_any_part_of_the_outputs_in_the_loss(loss: object) -> None:
    assert callable(loss)
    entry = net("second order")
    model, x = entry.model(), entry.inputs()
    fast = sparsify_training(model, x.clone().requires_grad_())
    expected = gradients_of(entry.model(), x, loss)
    assert_same_gradients(gradients_of(fast, x, loss), expected)
    assert_trained(fast, entry.sites)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_networks_of_snntorch(name: str) -> None:
    """They compute in float32 whatever they are given."""
    entry = from_zoo(next(each for each in ENTRIES if each.name == name))
    x = entry.inputs(dtype=torch.float32)
    fast = sparsify_training(entry.model(torch.float32), x.clone().requires_grad_())
    got, expected = gradients_of(fast, x), gradients_of(entry.model(torch.float32), x)
    assert_same_gradients(got, expected, most_relative=MOST_RELATIVE_FLOAT32)
    assert_trained(fast, entry.sites)


def test_gradients_of_snntorch_are_verified() -> None:
    entry = from_zoo(next(each for each in ENTRIES if each.name == "snnTorch, RLeaky"))
    model, x = entry.model(torch.float32), entry.inputs(dtype=torch.float32)
    found = verify(model, sparsify_training(model, x), x, gradients=True)
    assert any(figures.norm > 0 for figures in found.gradients)


@named((*NETS, *(each for each in ZOO_NETS if each.name != ROUNDED)))
def test_no_network_is_silent_or_without_gradients(entry: TrainingNet) -> None:
    """The zoo tests something: outputs vary, and every parameter has a gradient."""
    model, x = entry.model(), entry.inputs()
    assert any(len(output.unique()) > 1 for output in tensors_of(model(x)))
    zero = {
        name
        for name, value in gradients_of(model, x).items()
        if value is not None and not value.norm() > 0
    }
    assert not zero
