"""Training scripts as people write them, with a sparsified module in the place of the model.

Each runs twice from the same start, once on eager, and ends with the same float64 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparsify.plan import Plan
from tests.models.training_nets import TrainingNet, net
from tests.models.zoo_training import CarriedState
from tests.serving.test_dropin import runs_kernels_of
from tests.training_harness import (
    assert_close,
    assert_same_gradients,
    assert_trained,
    gradients_of,
    parameter_gradients,
    sparsify_training,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

UPDATES = 5
ENTRY = net("learnable neuron")
Parameters = Iterator[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "fused adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "fused momentum": lambda parameters: torch.optim.SGD(
        parameters, lr=1e-3, momentum=0.9, fused=True
    ),
}


@cache
def plan() -> Plan:
    """Found once, since it takes a compilation."""
    decided: Plan = sparsify_training(ENTRY.model(), ENTRY.inputs()).plan
    return decided


def both() -> tuple[nn.Module, nn.Module]:
    """Eager and sparsified, from the same start."""
    return ENTRY.model(), sparsify_training(ENTRY.model(), ENTRY.inputs(), plan=plan())


def assert_trained_equally(fast: nn.Module, eager: nn.Module) -> None:
    """They moved away from the start, to the same place."""
    got, expected = dict(fast.named_parameters()), dict(eager.named_parameters())
    start = dict(ENTRY.model().named_parameters())
    assert all(not torch.equal(expected[name], value) for name, value in start.items())
    assert_close(got, expected)
    assert_trained(fast, ENTRY.sites)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    eager, fast = both()
    for module in (eager, fast):
        optimizer = OPTIMIZERS[name](module.parameters())
        for update in range(UPDATES):
            optimizer.zero_grad()
            weighted_sum(module(ENTRY.inputs(batch=3 + update % 2))).backward()
            optimizer.step()
    assert_trained_equally(fast, eager)


def test_clipping_and_accumulation() -> None:
    eager, fast = both()
    norms: dict[nn.Module, list[float]] = {eager: [], fast: []}
    for module in (eager, fast):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(UPDATES):
            optimizer.zero_grad()
            for batch in (2, 3):
                weighted_sum(module(ENTRY.inputs(batch=batch))).backward()
            norms[module].append(float(nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
            optimizer.step()
    assert min(norms[eager]) > 0.5  # something was clipped
    assert norms[fast] == pytest.approx(norms[eager], rel=1e-9)
    assert_trained_equally(fast, eager)


def test_parameters_are_frozen_and_thawed_in_between() -> None:
    eager, fast = both()
    for module in (eager, fast):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        for update in range(UPDATES):
            module.get_parameter("rec.weight").requires_grad_(update not in (2, 3))
            optimizer.zero_grad(set_to_none=True)
            weighted_sum(module(ENTRY.inputs())).backward()
            assert (module.get_parameter("rec.weight").grad is None) == (update in (2, 3))
            optimizer.step()
    assert_trained_equally(fast, eager)


def test_weights_written_without_a_version() -> None:
    """``.data`` writes are seen by the next forward and backward."""
    eager, fast = both()
    for module in (eager, fast):
        module.get_parameter("rec.weight").data.mul_(0.5)
    x = ENTRY.inputs()
    assert_same_gradients(gradients_of(fast, x), gradients_of(eager, x))
    assert_trained(fast, ENTRY.sites)


def test_truncated_back_propagation() -> None:
    entry = TrainingNet("carried state", CarriedState, ("rec", "read"))
    chunks = [entry.inputs(steps) for steps in (6, 6, 4)]
    eager, model = entry.model(), entry.model()
    assert isinstance(model, CarriedState) and isinstance(eager, CarriedState)
    fast = sparsify_training(model, chunks[0], model.start(chunks[0]))
    for module in (eager, fast):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        state = eager.start(chunks[0])
        for x in chunks:
            state = state[0].detach(), state[1].detach()
            optimizer.zero_grad()
            logits, state = module(x, state)
            weighted_sum(logits).backward()
            optimizer.step()
    assert_close(dict(fast.named_parameters()), dict(eager.named_parameters()))
    assert_trained(fast, entry.sites)


def test_the_state_carries_gradients_between_calls() -> None:
    """Two calls, one graph: what the second call's loss says about the first one's weights."""
    entry = TrainingNet("carried state", CarriedState, ("rec", "read"))
    first, second = entry.inputs(5), entry.inputs(4)
    eager, model = entry.model(), entry.model()
    assert isinstance(eager, CarriedState)
    start = tuple(each.requires_grad_() for each in eager.start(first))
    fast = sparsify_training(model, first, start)
    found = []
    for module in (fast, eager):
        state = tuple(each.detach().clone().requires_grad_() for each in start)
        _, between = module(first, state)
        logits, _ = module(second, between)
        module.zero_grad(set_to_none=True)
        weighted_sum(logits).backward()
        initial = {f"state {i}": each.grad for i, each in enumerate(state)}
        found.append({**parameter_gradients(module), **initial})
    assert_same_gradients(found[0], found[1])
    assert found[1]["state 0"] is not None
    assert_trained(fast, entry.sites)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    eager, fast = both()
    x = ENTRY.inputs()

    def loss(module: nn.Module) -> dict[str, Tensor | None]:
        leaf = x.clone().requires_grad_()
        module.zero_grad(set_to_none=True)
        out = checkpoint(module, leaf, use_reentrant=reentrant)
        weighted_sum(out).backward()
        return {**parameter_gradients(module), "input": leaf.grad}

    assert_same_gradients(loss(fast), loss(eager))
    assert_trained(fast, ENTRY.sites)


def test_a_call_with_hooks_leaves_others_their_kernels() -> None:
    _, fast = both()
    x = ENTRY.inputs()

    def update() -> Tensor:
        result: Tensor = fast(x)
        weighted_sum(result).backward()
        return result

    update()
    with (
        torch.autograd.graph.save_on_cpu(),
        pytest.warns(UserWarning, match="saved_tensors_hooks .* checkpoint parts of forward"),
    ):
        update()
    assert runs_kernels_of(fast, update)


def test_evaluation_in_between() -> None:
    """no_grad and inference_mode calls neither disturb training nor see old weights."""
    eager, fast = both()
    seen: dict[nn.Module, list[Tensor]] = {eager: [], fast: []}
    x = ENTRY.inputs()
    for module in (eager, fast):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, fused=True)
        for update in range(UPDATES):
            optimizer.zero_grad()
            weighted_sum(module(x)).backward()
            optimizer.step()
            with torch.no_grad() if update % 2 else torch.inference_mode():
                seen[module].append(module(x).clone())
    for got, expected in zip(seen[fast], seen[eager], strict=True):
        assert (got - expected).norm() <= 1e-9 * expected.norm()
    assert_trained_equally(fast, eager)


def test_several_forwards_before_their_backwards() -> None:
    """Two batches are in flight; each backward uses what its own forward saved."""
    eager, fast = both()
    found = []
    for module in (fast, eager):
        losses = [weighted_sum(module(ENTRY.inputs(batch=batch))) for batch in (3, 2)]
        module.zero_grad(set_to_none=True)
        losses[0].backward()
        losses[1].backward()
        found.append(parameter_gradients(module))
    assert_same_gradients(found[0], found[1])
    assert_trained(fast, ENTRY.sites)


def test_a_graph_that_is_kept_is_used_twice() -> None:
    eager, fast = both()
    found = []
    for module in (fast, eager):
        loss = weighted_sum(module(ENTRY.inputs()))
        module.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append(parameter_gradients(module))
    assert_same_gradients(found[0], found[1])
    assert_trained(fast, ENTRY.sites)


def test_gradients_by_the_functional_call() -> None:
    """``torch.autograd.grad`` of some of the parameters; ``.grad`` stays None."""
    eager, fast = both()
    names = ("decay", "rec.weight")
    found = []
    for module in (fast, eager):
        module.zero_grad(set_to_none=True)
        wanted = [module.get_parameter(name) for name in names]
        values = torch.autograd.grad(weighted_sum(module(ENTRY.inputs())), wanted)
        assert all(parameter.grad is None for parameter in module.parameters())
        found.append(dict(zip(names, values, strict=True)))
    assert_same_gradients(found[0], found[1])
    assert_trained(fast, ENTRY.sites)
