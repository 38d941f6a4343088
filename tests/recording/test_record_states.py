"""State that forward writes: written back by every call; put back after an explicit recording."""

from __future__ import annotations

import copy
import random
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify.recording.record import record
from sparsify.recording.recording import Recording, Unrecorded
from tests.recorded import (
    Of,
    call,
    check,
    of,
    perturbed,
    recorded,
    refused,
    same,
    sources,
    state,
    targets,
)

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class State(NamedTuple):
    v: Tensor
    z: Tensor


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.mem: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mem is None:
            self.mem = torch.zeros_like(x)
        self.mem = 0.5 * self.mem + self.fc(x)
        return (self.mem > 0).float()


def test_a_state_from_call_to_call() -> None:
    model = Leaky()
    with torch.no_grad():
        model(X)
    recording = check(model, X, calls=3)
    assert ("attribute", "mem") in sources(recording)


def test_the_first_call_differs_from_later_ones() -> None:
    model = Leaky()
    eager = copy.deepcopy(model)
    first = recorded(model, X)
    with torch.no_grad():
        assert same(first.result, eager(X))
        assert same(model.mem, eager.mem)
        assert not first.guard.matches((X,), {})
        model.mem = eager.mem = None
    for _ in range(2):
        with torch.no_grad():
            expected = eager(X)
        assert same(call(first, X), expected)
        assert same(model.mem, eager.mem)
        model.mem = eager.mem = None


def in_place_buffer(self: Any, x: Tensor) -> Any:
    self.count += 1
    self.v.mul_(0.9).add_(x)
    self.v[0] = 0
    return self.v * 2


def rebound_buffer(self: Any, x: Tensor) -> Any:
    self.v = self.v * 0.5 + x
    return self.v


def returned_state(self: Any, x: Tensor) -> Any:
    self.v.add_(x)
    return self.v


def swapped(self: Any, x: Tensor) -> Any:
    self.v, self.w = self.w, self.v
    return self.v + x


def kept_input(self: Any, x: Tensor) -> Any:
    out = x - self.v
    self.v = x
    return out


def kept_view(self: Any, x: Tensor) -> Any:
    y = x * 2
    self.v = y
    self.w = y[0]
    return y


def old_content(self: Any, x: Tensor) -> Any:
    old = torch.empty_like(self.v).copy_(self.v)
    self.v.add_(x)
    return old, self.v.clone()


def view_of_state(self: Any, x: Tensor) -> Any:
    row = self.v[1]
    self.v += x
    row.sub_(1)
    return row


def unused_write(self: Any, x: Tensor) -> Any:
    self.v.copy_(x)
    return x * 2


IN_PLACE = (
    *(in_place_buffer, rebound_buffer, returned_state, swapped, kept_input, kept_view),
    *(old_content, view_of_state, unused_write),
)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: str(f.__name__))
def test_buffers_are_written_back(function: Any) -> None:
    states = {"count": torch.zeros(()), "v": torch.ones(4, 3), "w": torch.zeros(4, 3)}
    check(Of(function, **states), X.clone(), calls=3)


def dict_entry(self: Any, x: Tensor) -> Any:
    self.state["v"] = self.state["v"] * 0.5 + x
    return self.state["v"]


def list_entry(self: Any, x: Tensor) -> Any:
    self.states[1] = self.states[1] + x
    self.states[0].add_(x)
    return self.states[0]


def whole_tuple(self: Any, x: Tensor) -> Any:
    v, z = self.pair
    self.pair = (v + x, z * 2)
    return self.pair[0]


def named_tuple(self: Any, x: Tensor) -> Any:
    self.lif = State(self.lif.v * 0.5 + x, (self.lif.v > 0).float())
    return self.lif.z


@pytest.mark.parametrize("function", [dict_entry, list_entry, whole_tuple, named_tuple])
def test_states_in_containers(function: Any) -> None:
    v, z = torch.ones(4, 3), torch.zeros(4, 3)
    containers = {
        "state": {"v": v.clone()},
        "states": [v.clone(), z.clone()],
        "pair": (v.clone(), z.clone()),
        "lif": State(v.clone(), z.clone()),
    }
    check(Of(function, **containers), X.clone(), calls=3)


class Cell:
    def __init__(self) -> None:
        self.v = torch.zeros(4, 3)
        self.sub = {"z": [torch.ones(3)]}


def in_objects(self: Any, x: Tensor) -> Any:
    self.cell.v = self.cell.v * 0.5 + x
    self.cell.sub["z"][0] = self.cell.sub["z"][0] + 1
    return self.cell.v * self.cell.sub["z"][0]


def replaced_dict(self: Any, x: Tensor) -> Any:
    self.state = {"v": self.state["v"] * 0.5 + x}
    return self.state["v"] * 1


def reset_at_the_end(self: Any, x: Tensor) -> Any:
    v = x if self.last is None else self.last
    self.last = v * 2
    y = self.last + x
    self.last = None
    return y


@pytest.mark.parametrize("function", [in_objects, replaced_dict, reset_at_the_end])
def test_states_in_objects_and_replaced_containers(function: Any) -> None:
    model = Of(function, cell=Cell(), state={"v": torch.ones(4, 3)}, last=None)
    recording = check(model, X.clone(), calls=1)
    eager = copy.deepcopy(model)
    for _ in range(3):
        with torch.no_grad():
            expected = eager(X)
        assert same(call(recording, X), expected)
    assert same(model.cell.v, eager.cell.v)  # type: ignore[union-attr]


GAIN = torch.full((3,), 2.0)


def test_rebound_globals() -> None:
    def forward(x: Tensor) -> Tensor:
        global GAIN
        GAIN = GAIN * 0.5 + x[0]
        return x * GAIN

    global GAIN
    recording = recorded(of(forward), X)
    before = GAIN
    got = call(recording, X)
    after, GAIN = GAIN, before
    assert same(got, forward(X))
    assert same(after, GAIN)


def test_hooks_are_part_of_the_run() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    check(model, X)
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        found = record(model, (X,), {})
    assert isinstance(found, Unrecorded)
    assert "kept" in str(found.error)


def test_inputs_written_in_place() -> None:
    check(of(lambda x, y: x.add_(y)), X.clone(), X.clone())
    check(of(lambda x: (x[0].zero_(), x * 2)[1]), X.clone())


def test_batch_norm_in_training() -> None:
    recording = check(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).train(), X.clone(), calls=3)
    assert targets(recording).count("_native_batch_norm_legit_functional") == 1
    check(nn.BatchNorm1d(3).eval(), X.clone())


def appends(self: Any, x: Tensor) -> Any:
    self.states.append(x * 2)
    return x + 1


def counts(self: Any, x: Tensor) -> Any:
    self.calls += 1
    return x * self.calls


def changes_argument(self: Any, x: Tensor) -> Any:
    self.calls = {"x": object(), "v": x * 2}
    return x + 1


def python_random(self: Any, x: Tensor) -> Any:
    return x * random.random()


def shared_memory(self: Any, x: Tensor) -> Any:
    self.v.add_(x)
    return self.row + 1


def resized(self: Any, x: Tensor) -> Any:
    self.w.unsqueeze_(0)
    return x + self.w


@pytest.mark.parametrize(
    "function",
    [appends, counts, changes_argument, python_random, shared_memory, resized],
    ids=lambda f: str(f.__name__),
)
def test_side_effects_are_refused(function: Any) -> None:
    v = torch.ones(4, 3)
    model = Of(function, states=[], calls=1, v=v, row=v[0], w=torch.zeros(4, 3))
    with torch.no_grad():
        found = record(model, (X.clone(),), {})
    assert isinstance(found, Unrecorded)


def test_changed_argument_containers_are_refused() -> None:
    def forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
        state["v"] = state["v"] + x
        return x * 2

    assert "argument" in str(refused(of(forward), {"v": X.clone()}, X.clone()))


def test_an_explicit_recording_changes_nothing() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.v.add_(x)
        self.v[0].view(-1)[1] = 5
        self.w = self.w * 2
        self.new = x * 3
        self.state["v"] = x
        self.made += 1
        random.random()
        np.random.rand()
        return torch.nn.functional.dropout(x, 0.5, True) + torch.rand(3)

    model = Of(forward, v=torch.ones(4, 3), w=torch.ones(4, 3), state={"v": X * 1}, made=1)
    model.weight = nn.Parameter(torch.ones(3))
    before = copy.deepcopy(state(model))
    x = X.clone()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state(legacy=True)[1].copy()  # type: ignore[index]
    record(model, (x,), {}, restore=True)
    assert same(state(model), before)
    assert not hasattr(model, "new")
    assert model.made == 1
    assert torch.equal(x, X)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert (numpy_state == np.random.get_state(legacy=True)[1]).all()  # type: ignore[index]


def test_states_are_put_back_when_forward_raises() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        self.v.add_(x)
        raise KeyError("mine")

    model = Of(forward, v=torch.ones(4, 3))
    with pytest.raises(KeyError, match="mine"):
        record(model, (X,), {}, restore=True)
    assert torch.equal(model.v, torch.ones(4, 3))  # type: ignore[arg-type]


def test_writes_after_an_escape_are_put_back() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        if x.sum() > -1e9:
            self.v.add_(x)
            self.v[0].zero_()
        return x * 1

    model = Of(forward, v=torch.ones(4, 3))
    assert isinstance(record(model, (X,), {}, restore=True), Unrecorded)
    assert torch.equal(model.v, torch.ones(4, 3))  # type: ignore[arg-type]


def test_random_operations_draw_again() -> None:
    model = of(
        lambda x: torch.nn.functional.dropout(x, 0.5, True) + torch.rand(3) * x.bernoulli(0.5)
    )
    recording = recorded(model, X)
    torch.manual_seed(1)
    with torch.no_grad():
        expected = model(X)
    torch.manual_seed(1)
    assert same(call(recording, X), expected)
    assert not same(call(recording, X), expected)


def test_in_place_random_operations() -> None:
    def forward(x: Tensor) -> Tensor:
        y = torch.empty(4, 3).normal_(1, 2) + torch.empty(3).uniform_(-1, 1)
        y[0].bernoulli_(0.3)
        y[1].exponential_()
        return x + y + torch.randn_like(x)

    recording = recorded(of(forward), X)
    torch.manual_seed(1)
    expected = forward(X)
    torch.manual_seed(1)
    assert same(call(recording, X), expected)


def test_shared_parameters_and_same_inputs_are_one_operand_and_guarded() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x)) + y
            return out

    model = Tied()
    recording = recorded(model, X, X)
    assert sources(recording) == [("input", "x"), ("parameter", "a.weight")]
    with torch.no_grad():
        assert recording.guard.matches((X, X), {})
        assert not recording.guard.matches((X, X.clone()), {})
        assert "one object" in recording.guard.explain((X, X.clone()), {})
        model.b.weight = nn.Parameter(torch.ones(3, 3))
        assert not recording.guard.matches((X, X), {})


def test_a_written_input_that_shares_memory_misses() -> None:
    recording = recorded(of(lambda x, y: x.add_(1) + y), X.clone(), X.clone())
    with torch.no_grad():
        x = X.clone()
        assert recording.guard.matches((x, X.clone()), {})
        assert not recording.guard.matches((x, x.view(-1).view(4, 3)), {})


def test_every_change_of_a_weight_is_seen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            assert isinstance(out, Tensor)
            return out

    model = Net()
    recording = recorded(model, X)
    layer = model.inner[0]
    assert isinstance(layer, nn.Linear)

    def graph_equals_eager() -> bool:
        with torch.no_grad():
            values = recording.graph(*recording.calling.operands((X,), {}))
            return same(recording.calling.deliver(values, (X,), {}), model(X))

    with torch.no_grad():
        layer.weight.mul_(2)
        assert graph_equals_eager()
        layer.weight.data = torch.ones(3, 3)
        assert graph_equals_eager()
        layer.weight = nn.Parameter(torch.randn(3, 3))
        assert graph_equals_eager()
        model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()})
        assert graph_equals_eager()
        model.inner[0] = nn.Linear(3, 3)
        assert graph_equals_eager()
        model.inner = nn.Sequential(nn.Linear(3, 3))
        assert graph_equals_eager()
        del model.inner[0].bias
        with pytest.raises(AttributeError, match=r"inner\.0\.bias"):
            recording.calling.operands((X,), {})


def test_keyword_and_nested_arguments_are_named() -> None:
    def forward(x: Tensor, states: Any, scale: Any = None) -> Any:
        return x * scale["a"] + states[0][1], states

    model = of(forward)
    model.forward = forward
    states, scale = ((X, X + 1), 3), {"a": X * 2}
    recording = recorded(model, X * 3, states, scale=scale)
    names = [name for kind, name in sources(recording) if kind == "input"]
    assert set(names) >= {"x", "states[0][1]", "scale['a']"}
    given = perturbed(((X, states), scale), 3)
    got = call(recording, *given[0], scale=given[1])
    assert same(got, forward(given[0][0], given[0][1], given[1]))
    assert got[1][0][1] is given[0][1][0][1]


def waits(self: Any, x: Tensor) -> Tensor:
    self.waiting.append(x * 2)
    return x


def boxes(self: Any, x: Tensor) -> Tensor:
    self.box = SimpleBox(x * 2)
    return x


class SimpleBox:
    def __init__(self, value: Tensor) -> None:
        self.value = value


@pytest.mark.parametrize(
    "forward, told",
    [
        (waits, "to a deque that outlives it. Return it, or bind a new deque in forward"),
        (boxes, "forward binds box to an object with tensors in it. Bind a tuple"),
        (lambda self, x: SimpleBox(x * 2), "forward returns an object of SimpleBox"),
    ],
)
def test_the_line_of_a_tensor_that_a_call_cannot_leave_where_forward_does(
    forward: Any, told: str
) -> None:
    with torch.no_grad():
        found = record(Of(forward, waiting=deque()), (X,), {})
    assert isinstance(found, Unrecorded)
    assert told in str(found.error)
    assert found.error.location is not None and "x * 2" in found.error.location.code


@dataclass(slots=True)
class SlottedState:
    v: Tensor
    steps: int = 0


def test_a_state_that_is_a_dataclass() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        self.state = SlottedState(0.5 * self.state.v + x)
        return torch.relu(self.state.v)

    model: Any = Of(forward, state=SlottedState(X.clone()))
    with torch.no_grad():
        recording = recorded(model, X)
        model.state, v = SlottedState(X.clone()), X
        for step in range(3):
            x = X + step
            got = call(recording, x)
            v = 0.5 * v + x
            assert same(got, torch.relu(v)) and same(model.state.v, v)


def test_results_that_cannot_be_made_again_are_refused() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    with torch.no_grad():
        found = record(of(lambda x: Box(x * 2)), (X,), {})
    assert isinstance(found, Unrecorded)
    assert "Box" in str(found.error)
    assert "register_pytree_node" in str(found.error)


def test_outputs_do_not_share_memory_that_eager_does_not_share() -> None:
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.empty(4, 3)
        y.copy_(x)
        z = torch.empty(4, 3)
        z.copy_(y)
        return y, z, x.detach()

    recording = check(of(forward), X.clone())
    x = X.clone()
    y, z, same_memory = call(recording, x)
    y.fill_(1)
    assert same(x, X)
    assert same(z, X)
    assert same_memory is not x
    assert same_memory.data_ptr() == x.data_ptr()


def test_autocast_casts_the_present_weight() -> None:
    model = nn.Linear(3, 3)
    with torch.autocast("cpu"), torch.no_grad():
        model(X)
        recording = record(model, (X,), {})
        assert isinstance(recording, Recording)
        model.weight.mul_(3)
        torch.clear_autocast_cache()
        values = recording.graph(*recording.calling.operands((X,), {}))
        assert same(values[0], model(X))
    assert [kind for kind, _ in sources(recording)] == ["input", "parameter", "parameter"]
