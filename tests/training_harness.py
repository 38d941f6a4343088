"""Gradients of a sparsified network beside those of eager, and that kernels computed them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.plan import Plan
from sparsify.regions.region import Region
from sparsify.regions.trained_region import TrainedRegion
from sparsify.scans.scan import Scan
from tests.models.zoo import tensors_of

Gradients = Mapping[str, Tensor | None]
Loss = Callable[[object], Tensor]
# Both sides compute in float64 and with the same spikes, so they differ by roundings alone, each
# 1.1e-16 of its value. A gradient sums at most a few thousand products and passes a dozen steps
# whose factors are of order one: the errors add up to below 1e-12 of the norm of what is summed.
# The rest is room for sums that cancel down to a thousandth of their terms.
MOST_RELATIVE = 1e-9


def weighted_sum(result: object) -> Tensor:
    """A loss that gives every element of every output that can have one a gradient of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(tensors_of(result)):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(index)
            weights = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            total = total + (weights * output).sum()
    return total


def sparsify_training(model: nn.Module, *example: Any, plan: Plan | None = None) -> Any:
    """Compile for training, by predictions or by the plan of another such network.

    What is predicted to gain nothing at such sizes is pinned to events.
    """
    fast: Any = sparsify(model, *example, timing=False, plan=plan)
    if plan is not None or not example:
        return fast
    weighted_sum(fast(*example)).backward()  # an example alone is one of inference in eval mode
    plan = fast.plan
    for site in fast.report.sites:
        if site.decision == "dense" or site.code == "no-gain":
            plan = plan.pin(site.name, "event")
    model.zero_grad(set_to_none=True)
    return fast if plan == fast.plan else sparsify(model, *example, timing=False, plan=plan)


def events_at(sites: Iterable[str]) -> Plan | None:
    """A plan by which these run as events in training: found without a compilation."""
    plan = Plan()
    for site in sites:
        plan = plan.pin(site, "event")
    return Plan(training=plan) if plan.sites else None


def gradients_of(module: nn.Module, x: Tensor, loss: Loss = weighted_sum) -> Gradients:
    """Of all parameters and of the input, if it is of a floating type; copies.

    Random numbers are those of one seed.
    """
    module.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(0)
    loss(module(leaf)).backward()
    return {**parameter_gradients(module), "input": leaf.grad}


def parameter_gradients(module: nn.Module) -> Gradients:
    found = {}
    for name, parameter in module.named_parameters():
        found[name] = None if parameter.grad is None else parameter.grad.clone()
    return found


def assert_same_gradients(
    got: Gradients, expected: Gradients, most_relative: float = MOST_RELATIVE
) -> None:
    """The same ones are None, and the rest agree by relative norm; eager's are not all zero."""
    assert got.keys() == expected.keys()
    assert any(value is not None and value.norm() > 0 for value in expected.values())
    missing = {name for name, value in got.items() if value is None}
    assert missing == {name for name, value in expected.items() if value is None}
    for name, wanted in expected.items():
        value = got[name]
        if value is None or wanted is None:
            continue
        assert value.dtype == wanted.dtype and value.shape == wanted.shape, name
        distance = float((value - wanted).norm())
        norm = float(wanted.norm())
        assert distance <= most_relative * norm, f"{name}: off by {distance:.3g} of {norm:.3g}"


def assert_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Parameters after steps of an optimizer."""
    assert got.keys() == expected.keys() and got
    for name, wanted in expected.items():
        distance = float((got[name] - wanted).detach().norm())
        assert distance <= MOST_RELATIVE * float(wanted.detach().norm()), f"{name}: {distance:.3g}"


def assert_trained(fast: Any, sites: Iterable[str]) -> None:
    """Kernels run these sites in forward, and every time loop of their gradients.

    The one place that knows how a compiled module says so.
    """
    compiled = [entry.compiled for entry in fast.compiled.entries if entry.required]
    assert compiled, f"nothing was compiled for training\n{fast.report}"
    decisions = {site.name: site.decision for site in compiled[-1].sites}
    wrong = [name for name in sites if decisions.get(name) not in ("event", "dense")]
    assert not wrong, f"{wrong} were not run by kernels\n{fast.report}"
    for name in sites:
        region, _ = compiled[-1].placements[name]
        trained = compiled[-1].graph.get_submodule(region)
        assert isinstance(trained, TrainedRegion), f"{name}: {region} is differentiated by torch"
        assert isinstance(trained.run, Region), f"{name}: {region} runs step by step"
        loops = [each for each in trained.backward.children() if isinstance(each, Scan)]
        assert not loops, f"{name}: the gradient of {region} runs step by step\n{fast.report}"
