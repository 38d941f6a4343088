"""Hooks on returned spikes: they see the gradients that they see in eager, and change them so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify.errors import RefusedError
from sparsify.passes.results.part_results import RESULT
from tests.models.surrogates import ATan, Rect
from tests.regions.test_linked_loops import Layers, compiled, example, made
from tests.training_harness import assert_same_gradients, parameter_gradients, weighted_sum


class Whole(Layers):
    """The readout reads the sequence that is returned: hooks on it see the readout's gradients."""

    def forward(self, x: Tensor) -> Any:
        spikes = self.spikes(x)
        return self.read(spikes), spikes


class Steps(Layers):
    """The readout reads the spikes of every step; their sequence is made for the result alone."""

    def forward(self, x: Tensor) -> Any:
        steps = self.steps(x)
        return self.read(steps), torch.stack(steps)


class BatchFirst(Layers):
    def forward(self, x: Tensor) -> Any:
        spikes = self.spikes(x).transpose(0, 1)
        return self.read(spikes.transpose(0, 1)), spikes


KINDS = [Whole, Steps, BatchFirst]


def with_hook(result: Any) -> dict[str, Tensor | None]:
    result[1].register_hook(lambda d: 0.5 * d + 1)
    weighted_sum(result).backward()
    return {}


def with_hook_on_unused(result: Any) -> dict[str, Tensor | None]:
    """The loss does not read the spikes themselves."""
    result[1].register_hook(lambda d: 3 * d)
    weighted_sum(result[0]).backward()
    return {}


def with_retained(result: Any) -> dict[str, Tensor | None]:
    result[1].retain_grad()
    weighted_sum(result).backward()
    return {"spikes": result[1].grad}


def with_asked(result: Any) -> dict[str, Tensor | None]:
    """None where the loss is not made of the sequence."""
    loss = weighted_sum(result[0])
    [found] = torch.autograd.grad(loss, [result[1]], retain_graph=True, allow_unused=True)
    loss.backward()
    return {"spikes": found}


USES: list[Callable[[Any], dict[str, Tensor | None]]] = [
    with_hook,
    with_hook_on_unused,
    with_retained,
    with_asked,
]


@pytest.mark.parametrize("surrogate", [Rect, ATan])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_returned_spikes(kind: type[Layers], surrogate: Any) -> None:
    model, x = made(kind, surrogate), example()
    fast, (writer, _) = compiled(model, x)
    assert not writer.links.packed
    for use in USES:
        pairs = []
        for module in (fast, model):
            model.zero_grad(set_to_none=True)
            found = use(module(x))
            pairs.append({**parameter_gradients(model), **found})
        assert_same_gradients(pairs[0], pairs[1])


class EveryStep(Layers):
    """Spikes of single steps, which the readout and later steps read, and readings of steps."""

    def forward(self, x: Tensor) -> Any:
        steps = self.steps(x)
        return [self.read([step]) for step in steps], steps


class EveryStepTurned(EveryStep):
    """What is returned is a view of the spikes of a step, which the readout reads."""

    def forward(self, x: Tensor) -> Any:
        turned = [spikes.permute(1, 0) for spikes in self.steps(x)]
        return [self.read([each.permute(1, 0)]) for each in turned], turned


def keep(spikes: Tensor) -> None:
    spikes.retain_grad()


def watch(spikes: Tensor) -> None:
    spikes.register_hook(lambda d: None)


@pytest.mark.parametrize("kind", [EveryStep, EveryStepTurned])
@pytest.mark.parametrize("ask", [keep, watch])
def test_a_hook_on_the_spikes_of_a_step_is_an_error(
    ask: Callable[[Tensor], None], kind: type[Layers]
) -> None:
    """It would see a part of the gradient: later steps are in the kernel, with what they read."""
    model, x = made(kind), example()
    fast, _ = compiled(model, x)
    for _ in range(3):  # also where calls are repeated
        readings, spikes = fast(x)
        ask(spikes[1])
        with pytest.raises(RefusedError, match="a single step sees gradients from outside") as told:
            weighted_sum(readings).backward()
        refusal = told.value.refusal
        assert refusal.code == "observed" and refusal.location is not None
        assert "spike" in refusal.location.code


def test_hooks_on_readings_of_single_steps_see_all() -> None:
    """Nothing in the model reads them."""
    model, x = made(EveryStep), example()
    fast, _ = compiled(model, x)
    pairs = []
    for module in (fast, model):
        model.zero_grad(set_to_none=True)
        readings, spikes = module(x)
        readings[1].retain_grad()
        readings[2].register_hook(lambda d: 2 * d)
        weighted_sum((readings, spikes)).backward()
        pairs.append({**parameter_gradients(model), "reading": readings[1].grad})
    assert_same_gradients(pairs[0], pairs[1])


def test_a_result_that_nothing_else_reads_is_the_loops() -> None:
    fast, _ = compiled(made(Layers), example())
    [entry] = [entry for entry in fast.compiled.entries if entry.required]
    assert not any(RESULT in node.meta for node in entry.compiled.graph.graph.nodes)
