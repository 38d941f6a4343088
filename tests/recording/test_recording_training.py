"""Recordings with gradients: the graph under autograd has the model's own gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.recording.application import WRITTEN_UNSEEN, Application
from sparsify.recording.keep_state import keep_state
from sparsify.recording.record import record
from sparsify.recording.recording import Recording
from tests.models.surrogates import SURROGATES, ATan, FastSigmoid, Spike, SpikeAndReset
from tests.recorded import Of, same
from tests.recorded import recorded as recorded_without
from tests.recorded_gradients import Weighted, call, check, gradients_of, leaves_of, recorded

aten = torch.ops.aten


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator).requires_grad_()


X = inputs(3, 4)
STEPS = inputs(5, 3, 4)


def count(recording: Recording, kind: Callable[[Any], bool]) -> int:
    return sum(kind(node.target) for node in recording.graph.graph.nodes)


def is_use(target: Any) -> bool:
    return isinstance(target, Application) and target is not WRITTEN_UNSEEN


def is_detach(target: Any) -> bool:
    return target is aten.detach.default


def is_rewrite(target: Any) -> bool:
    return target is WRITTEN_UNSEEN


class LIF(nn.Module):
    """Recurrent, with a learnable decay and a detached reset."""

    def __init__(self, spike: Spike) -> None:
        super().__init__()
        self.fc, self.rec = nn.Linear(4, 6), nn.Linear(6, 6, bias=False)
        self.decay = nn.Parameter(torch.full((6,), 0.8))
        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], 6)
        out = []
        for x_t in x:
            v = self.decay * v + self.fc(x_t) + self.rec(z)
            z = self.spike(v - 0.5)
            v = v - z.detach()
            out.append(z)
        return torch.stack(out)


def test_copies_of_tensors_end_gradients_as_in_eager() -> None:
    def forward(model: Weighted, x: Tensor) -> Tensor:
        y = x @ model.weight
        return y * copy.copy(y) + copy.copy(y.detach() * 3)

    check(Weighted(forward), X)
    assert not hasattr(Tensor, "__copy__")


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name: str) -> None:
    recording = check(LIF(SURROGATES[name]), STEPS)
    uses = 0 if name == "detach alone" else 5
    assert count(recording, is_use) >= uses
    if uses:
        rolled = roll_loops(recording.graph)
        assert rolled.declined == [] and len(rolled.done) == 1


def test_a_use_says_what_and_where() -> None:
    recording = check(Weighted(lambda self, x: ATan.apply(x @ self.weight, 3.0)), X)
    [node] = [n for n in recording.graph.graph.nodes if is_use(n.target)]
    assert node.target.function is ATan
    assert node.target.arguments[1] == 3.0
    assert node.meta["function"] == "ATan" and node.meta["grad"]
    assert "ATan.apply" in node.meta["location"].code
    value, tensor = node.args
    assert value.target is aten._to_copy.default and tensor.target is aten.mm.default
    assert value.meta["function"] == "ATan" and not value.meta["grad"]


def test_recordings_without_gradients_have_no_such_nodes() -> None:
    recording = recorded_without(LIF(SURROGATES["atan"]), STEPS)
    assert count(recording, is_use) == count(recording, is_detach) == 0


# ---- autograd Functions


class Several(torch.autograd.Function):
    """Nested containers, None, a callable, a keyword; tensors inside are constants to autograd."""

    @staticmethod
    def forward(x: Tensor, parts: list[Tensor], scale: dict[str, Tensor], power: Any) -> Tensor:
        return x * parts[0] * scale["k"] if power is None else power(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1][0], inputs[2]["k"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        part, scale = ctx.saved_tensors
        return grad * part * scale, None, None, None


class Twice(torch.autograd.Function):
    """Applies another Function inside; only the outer one's gradient counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with torch.enable_grad():
            inner: Tensor = FastSigmoid.apply(x)
        return inner * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        scaled: Tensor = grad * 7 * x
        return scaled


class Unchanged(torch.autograd.Function):
    """Returns its input; scales the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


class Viewed(torch.autograd.Function):
    """Returns a view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat([grad.sum(0, keepdim=True), 3 * grad])


class Unlike(torch.autograd.Function):
    """A gradient for one argument and none for the other, whatever they need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


class Differs(nn.Module):
    """Another slope in each layer and step: no two uses are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for slope in (1, 1.0, 2.0):
            x = FastSigmoid.apply(self.fc(x), slope)
        return x


def captured(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    apply = function.apply
    return lambda *args: apply(*args)


def outputs(self: Any, v: Tensor) -> Any:
    spikes, after, number = SpikeAndReset.apply(v @ self.weight, self.decay)
    return spikes * 2, after, number, spikes.sum()


def only_one_output(self: Any, v: Tensor) -> Any:
    return SpikeAndReset.apply(v @ self.weight, self.decay)[1]


def no_gradient_used(self: Any, v: Tensor) -> Any:
    return SpikeAndReset.apply(v @ self.weight, self.decay)[2][:, None] * v


def nested_arguments(self: Any, x: Tensor) -> Any:
    return Several.apply(x, [self.weight[0]], {"k": self.decay}, power=None) @ self.weight


def under_no_grad(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        spikes = ATan.apply(x @ self.weight, 2.0)
    return spikes * self.decay + ATan.apply(x * self.decay, 2.0)


FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "captured apply": (lambda self, x: self.spike(x @ self.weight, 2.0), 1),
    "one of several outputs": (only_one_output, 1),
    "an output without gradient": (no_gradient_used, 1),
    "nested arguments": (nested_arguments, 1),
    "nested Functions": (lambda self, x: Twice.apply(x @ self.weight), 1),
    "input returned": (lambda self, x: Unchanged.apply(x @ self.weight, 3.0) * 2, 1),
    "argument returned": (lambda self, x: Unchanged.apply(x, 3.0) @ self.weight, 1),
    "parameter returned": (lambda self, x: x @ Unchanged.apply(self.weight, 0.5), 1),
    "view returned": (lambda self, x: Viewed.apply(x @ self.weight) * self.decay, 1),
    "no gradient for a weight": (lambda self, x: Unlike.apply(x, self.weight), 1),
    "under no_grad": (under_no_grad, 1),
    "of what needs none": (lambda self, x: ATan.apply(x.detach(), 2.0) @ self.weight, 1),
    "twice the same": (lambda self, x: SpikeAndReset.apply(x, x)[1] @ self.weight, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    function, uses = FUNCTIONS[name]
    recording = check(Weighted(function, spike=captured(ATan)), X)
    assert count(recording, is_use) == uses


def test_several_outputs() -> None:
    """Each has a backward of its own in the graph, so sums are rounded in another order."""
    model, x = Weighted(outputs).double(), X.detach().double().requires_grad_()
    eager = copy.deepcopy(model)
    recording = recorded(model, x)
    assert count(recording, is_use) == 3
    got = gradients_of(call(recording, x), leaves_of(model, (x,)))
    wanted = gradients_of(eager(x), leaves_of(eager, (x,)))
    for one, other in zip(got, wanted, strict=True):
        assert one is not None and other is not None
        # Sums of fewer than 100 terms: 100 half ulps of 1.1e-16 of the sum of their sizes, which
        # is below 1000 times the largest gradient here.
        assert float((one - other).abs().max()) <= 100 * 2.0**-53 * 1000 * float(other.abs().max())


def test_other_arguments_are_other_uses() -> None:
    recording = check(Differs(), X)
    uses = [n.target for n in recording.graph.graph.nodes if is_use(n.target)]
    assert len(uses) == 3 and len(set(uses)) == 3


# ---- detach, no_grad, writes


def data_of(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    return h * h.data + h


def detached_in_place(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    g = h * 2
    g.detach_()
    return g * self.decay + h


def no_grad_block(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    with torch.no_grad():
        scale = h.abs().mean(0) + self.decay
        half = scale[:2]
    return h / scale + half.sum()


def nothing_but_constants(self: Any, x: Tensor) -> Any:
    with torch.no_grad():
        mask = torch.zeros(3, 4)
        mask[1] = 2.0
    return x @ self.weight * mask


def clamped_parameter(self: Any, x: Tensor) -> Any:
    """EvNN clamps thresholds in place in forward; the gradient is the parameter's own."""
    self.decay.data.clamp_(0, 0.5)
    return x @ self.weight * self.decay


def written_under_no_grad(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    first = h[0]
    with torch.no_grad():
        h.clamp_(-0.5, 0.5)
        h[:, 1] = 0
    return h * self.decay + first


def written_through_detached(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    h.detach().mul_(2)
    return h * self.decay


def written_detached(self: Any, x: Tensor) -> Any:
    """What is written in sight of autograd gives a detached tensor a history again."""
    h = (x * 2).detach()
    h += x @ self.weight
    h[:, 0] = self.decay[0]
    return h


def written_slices(self: Any, x: Tensor) -> Any:
    out = torch.zeros(2, 3, 4)
    for t in range(2):
        out[t] = x @ self.weight * self.decay**t
    out[1, :, 2].mul_(3)
    return out


def recorded_unseen(self: Any, x: Tensor) -> Any:
    seen = torch.zeros(3, 4)
    h = x @ self.weight
    with torch.no_grad():
        seen += h
    return seen * self.decay + h


def masked(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    h[h > 0] = 0.5
    return h.masked_fill(x < 0, 2.0) * self.decay


def view_under_no_grad(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    with torch.no_grad():
        column = h[:, 0]
    return h * column[:, None].sin()


def set_grad_disabled(self: Any, x: Tensor) -> Any:
    torch.set_grad_enabled(False)
    h = x @ self.weight
    torch.set_grad_enabled(True)
    return h * self.decay


def requires_grad_in_the_middle(self: Any, x: Tensor) -> Any:
    """Norse lets a new state require gradients, which nobody asks for."""
    v = torch.zeros(3, 4)
    v.requires_grad = True
    h = (x * 3).detach().requires_grad_()
    return (v + h) * self.decay + x @ self.weight


def filled_over(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    g = h * 2
    g.zero_()
    h = h + g.add_(x * self.decay)
    k = h * 2
    k.copy_(torch.ones(3, 4))
    return h * k


def parameter_of_a_result(self: Any, x: Tensor) -> Any:
    h = x @ self.weight
    leaf = nn.Parameter(h)
    return h * self.decay + leaf * self.weight[0]


def saved_results(self: Any, x: Tensor) -> Any:
    """Autograd detaches results that it saves, which is no detach of the user's."""
    h = torch.sigmoid(x @ self.weight)
    return torch.tanh(h).exp() / (1 + h.sqrt())


CONSTRUCTS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "detach": (lambda self, x: (x @ self.weight).detach() * self.decay, 1, 0),
    "detach twice": (lambda self, x: x.detach() * self.decay + x.detach() * self.weight[0], 2, 0),
    ".data": (data_of, 1, 0),
    "detach_": (detached_in_place, 1, 0),
    "no_grad": (no_grad_block, 2, 0),
    "no_grad, constants": (nothing_but_constants, 1, 0),
    "parameter clamped": (clamped_parameter, 2, 1),
    "written under no_grad": (written_under_no_grad, 2, 2),
    "written through detached": (written_through_detached, 2, 1),
    "written detached": (written_detached, 1, 0),
    "written slices": (written_slices, 0, 0),
    "written unseen": (recorded_unseen, 1, 0),
    "masked": (masked, 0, 0),
    "view under no_grad": (view_under_no_grad, 1, 0),
    "set_grad_enabled": (set_grad_disabled, 1, 0),
    "requires_grad in the middle": (requires_grad_in_the_middle, 1, 0),
    "saved results": (saved_results, 0, 0),
    "filled over": (filled_over, 0, 0),
    "a parameter of a result": (parameter_of_a_result, 1, 0),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_constructs(name: str) -> None:
    function, detached, rewritten = CONSTRUCTS[name]
    recording = check(Weighted(function), X)
    assert (count(recording, is_detach), count(recording, is_rewrite)) == (detached, rewritten)


def test_a_result_without_history_has_none() -> None:
    recording = check(Weighted(lambda self, x: (x @ self.weight, (x + self.decay).detach())), X)
    first, second = call(recording, X)
    assert first.requires_grad and not second.requires_grad


def test_no_grad_in_a_loop_is_rolled() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        v = seen = torch.zeros(3, 4)
        for x_t in x:
            with torch.no_grad():
                seen = 0.5 * seen + v.abs()
            v = self.decay * v + x_t @ self.weight - seen
        return v

    recording = check(Weighted(forward), STEPS)
    rolled = roll_loops(recording.graph)
    assert rolled.declined == [] and len(rolled.done) == 1


def test_layers_of_torch() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.GELU()
    )
    check(model, inputs(7, 4))
    check(nn.LSTM(4, 5, batch_first=True), inputs(2, 6, 4))
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(-1))
    check(conv, inputs(2, 2, 8, 8))


# ---- what the recording holds for


def test_frozen_parameters_are_seen() -> None:
    model = LIF(SURROGATES["atan"])
    recording = check(model, STEPS)
    model.decay.requires_grad_(False)
    assert not recording.guard.matches((STEPS,), {})
    told = recording.guard.explain((STEPS,), {})
    assert told == "decay required gradients and does not any more"
    check(model, STEPS)
    model.decay.requires_grad_()
    assert recording.guard.matches((STEPS,), {})
    model.fc.weight = nn.Parameter(model.fc.weight.detach().clone(), requires_grad=False)
    assert not recording.guard.matches((STEPS,), {})


def test_inputs_and_modes_are_seen() -> None:
    recording = recorded(LIF(SURROGATES["atan"]), STEPS)
    assert recording.guard.matches((STEPS,), {})
    assert not recording.guard.matches((STEPS.detach(),), {})
    with torch.no_grad():
        assert not recording.guard.matches((STEPS,), {})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert "saved-tensor hooks" in recording.guard.explain((STEPS,), {})


SLOPE = 2.0
OFFSETS = {"left": 0.5}


def slope_at(x: Tensor) -> Tensor:
    return SLOPE * x + OFFSETS["left"]


class ReadsLater(torch.autograd.Function):
    """Its backward reads what forward never names, through another function."""

    factor = 3.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * slope_at(ctx.saved_tensors[0]) * ReadsLater.factor


def test_what_a_backward_reads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = check(Weighted(lambda self, x: ReadsLater.apply(x @ self.weight)), X)
    changes: list[tuple[Any, str, Any]] = [
        (globals(), "SLOPE", 4.0),
        (OFFSETS, "left", 0.25),
    ]
    for table, key, value in changes:
        with monkeypatch.context() as patch:
            patch.setitem(table, key, value)
            assert not recording.guard.matches((X,), {}), key
    with monkeypatch.context() as patch:
        patch.setattr(ReadsLater, "factor", 1.0)
        assert not recording.guard.matches((X,), {})
    assert recording.guard.matches((X,), {})


# ---- states


class Carried(nn.Module):
    """A state that outlives the call, with its history."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.how = how
        self.mem: Tensor
        if how == "attribute":
            self.mem = torch.zeros(3, 4)
        else:
            self.register_buffer("mem", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        new: Tensor = 0.5 * self.mem + self.fc(x)
        if self.how == "in place":
            self.mem.copy_(new)
        else:
            self.mem = new
        return new * 2


@pytest.mark.parametrize("how", ["attribute", "buffer", "in place"])
def test_a_state_keeps_its_history(how: str) -> None:
    """Two calls of the graph, then one backward through both, as eager does."""
    model, eager = Carried(how), Carried(how)
    eager.load_state_dict(model.state_dict())
    first = recorded(model, X)
    assert gradients_of(first.result, leaves_of(model, (X,)), retain=True)
    model.mem = torch.zeros(3, 4)
    call(first, X)
    assert model.mem.requires_grad
    assert not first.guard.matches((X,), {})  # now the state requires gradients
    expected = (eager(X), eager(X))[1]
    state = model.mem
    second = recorded(model, X)
    got = gradients_of(second.result, leaves_of(model, (X,)), retain=True)
    wanted = gradients_of(expected, leaves_of(eager, (X,)), retain=True)
    assert same(got, wanted)
    if how != "in place":
        model.mem = state
        replayed = call(second, X)
        again = gradients_of(replayed, leaves_of(model, (X,)))
        assert same(again, wanted)


def test_backward_through_a_freed_state_raises_as_eager_does() -> None:
    model = Carried("attribute")
    first = recorded(model, X)
    first.result.sum().backward()
    mem = model.mem
    second = recorded(model, X)
    total = second.result.sum()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
    model.mem = mem
    total = call(second, X).sum()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_a_silent_write_is_silent_again() -> None:
    """``.data`` writes do not tell what was saved before, and neither does a call of the graph."""

    def forward(self: Any, x: Tensor) -> Any:
        h = x * self.decay
        self.decay.data.mul_(0.5)
        return h * self.decay

    check(Weighted(forward), X)


def test_a_loud_write_raises_as_eager_does() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        h = x * self.decay
        with torch.no_grad():
            self.decay.mul_(0.5)
        return h

    model = Weighted(forward)
    recording = recorded(model, X)
    for result in (model(X), recording.result, call(recording, X)):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_checks_leave_no_trace_in_what_backwards_have_saved() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    result = model(X)
    with keep_state(model):
        model(X)
    result.sum().backward()


def test_truncated() -> None:
    """A state detached between calls: the first recording serves all chunks."""
    model, eager = Carried("attribute"), Carried("attribute")
    eager.load_state_dict(model.state_dict())
    recording = recorded(model, X)
    model.mem = torch.zeros(3, 4)
    for seed in range(3):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        got = gradients_of(call(recording, x), leaves_of(model, (x,)))
        wanted = gradients_of(eager(x), leaves_of(eager, (x,)))
        assert same(got, wanted)
        model.mem, eager.mem = model.mem.detach(), eager.mem.detach()


def test_a_recording_that_restores_leaves_no_history() -> None:

    model = Carried("in place")
    found = record(model, (X,), {}, restore=True)
    assert isinstance(found, Recording)
    assert not model.mem.requires_grad and not model.mem.any()


def test_nothing_that_requires_gradients() -> None:
    model = Of(lambda self, x: (x > 0).float() * self.scale, scale=2.0)
    recording = recorded(model, X.detach())
    assert count(recording, is_detach) == 0
