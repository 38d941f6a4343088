"""The sparsified module in the model's place: weights, modes, hooks, copies, threads."""

from __future__ import annotations

import copy
import operator
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sparsify.api import sparsify
from sparsify.serving.engine import Engine
from tests.models.small_nets import HIDDEN, RecurrentNet, StatefulNet, spikes
from tests.unrolled import dyadic

X = spikes()


def make(model: nn.Module | None = None) -> tuple[nn.Module, nn.Module]:
    model = (model or RecurrentNet()).eval()
    return model, sparsify(model, X, timing=False)


def engine_of(fast: nn.Module) -> Engine:
    engine = fast.compiled
    assert isinstance(engine, Engine)
    return engine


def run(module: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        result = module(x)
    assert isinstance(result, Tensor)
    return result


def runs_kernels(fast: nn.Module, x: Tensor = X) -> bool:
    """Whether a call of ``fast`` makes its kernels count."""
    return runs_kernels_of(fast, lambda: run(fast, x))


def runs_kernels_of(fast: nn.Module, call: Callable[[], Tensor]) -> bool:
    """Whether ``call`` makes the kernels of ``fast`` count."""
    regions = [r for e in engine_of(fast).entries for r in e.compiled.regions.values()]
    for region in regions:
        region.launchable.reset_events()
    call()
    return any(total for r in regions for _, total in r.launchable.events.values())


def fused_adam(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.25, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in model.parameters():  # Adam's steps are no dyadic numbers
        parameter.data.mul_(16).round_().div_(16)


def write_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(dyadic(*parameter.shape, scale=0.5, seed=77))


def write_numpy(model: nn.Module) -> None:
    for parameter in model.parameters():
        array = parameter.detach().numpy()
        array[...] = dyadic(*parameter.shape, scale=0.5, seed=78).numpy()


def write_vector(model: nn.Module) -> None:
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(dyadic(vector.numel(), scale=0.5, seed=79), model.parameters())


def replace_parameters(model: nn.Module) -> None:
    for seed, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        module.weight = nn.Parameter(dyadic(*module.weight.shape, scale=0.5, seed=80 + seed))


def replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = dyadic(*parameter.shape, scale=0.5, seed=81)


def load_state(model: nn.Module) -> None:
    state = {name: dyadic(*t.shape, scale=0.5, seed=82) for name, t in model.state_dict().items()}
    model.load_state_dict(state)


def write_under_inference(model: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(dyadic(*parameter.shape, scale=0.5, seed=83))


def change_one_row(model: nn.Module) -> None:
    assert isinstance(model, RecurrentNet)
    model.rec.weight.data[3] += 8.0


def replace_module(model: nn.Module) -> None:
    assert isinstance(model, RecurrentNet)
    model.rec = nn.Linear(HIDDEN, HIDDEN, bias=False)
    model.rec.weight.data = dyadic(HIDDEN, HIDDEN, scale=0.5, seed=84)


CHANGES = (
    fused_adam,
    write_data,
    write_numpy,
    write_vector,
    replace_parameters,
    replace_data,
    load_state,
    write_under_inference,
    change_one_row,
    replace_module,
)


@pytest.mark.parametrize("through", ["model", "fast"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_the_next_call_sees_a_changed_weight(
    change: Callable[[nn.Module], None], through: str
) -> None:
    model, fast = make()
    before = run(fast)
    change(model if through == "model" else fast)
    after = run(model)
    assert not torch.equal(before, after)
    assert torch.equal(run(fast), after)
    assert runs_kernels(fast)


def test_freeze_promises_that_weights_stay() -> None:
    model, fast = make()
    freezing: Any = fast
    assert freezing.freeze() is fast
    before = run(fast)
    change_one_row(model)
    assert torch.equal(run(fast), before)
    freezing.freeze(False)
    assert torch.equal(run(fast), run(model))
    assert not torch.equal(run(fast), before)


def test_state_dict_and_parameters_are_the_models() -> None:
    model, fast = make()
    assert fast.state_dict().keys() == model.state_dict().keys()
    ours, theirs = list(fast.named_parameters()), list(model.named_parameters())
    assert [n for n, _ in ours] == [n for n, _ in theirs]
    assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert fast.original is model


def test_training_mode_is_shared() -> None:
    model, fast = make()
    fast.train()
    assert model.training
    assert torch.equal(run(fast), run(model))
    fast.eval()
    assert not model.training
    assert runs_kernels(fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_another_dtype_is_another_recording(dtype: torch.dtype) -> None:
    model, fast = make()
    assert fast.to(dtype) is fast
    x = X.to(dtype)
    result = run(fast, x)
    assert result.dtype == dtype
    assert torch.equal(result, run(model, x))
    assert runs_kernels(fast, x)


def test_a_deep_copy_is_independent() -> None:
    model, fast = make()
    clone = copy.deepcopy(fast)
    assert isinstance(clone, type(model))
    assert torch.equal(run(clone), run(model))
    assert runs_kernels(clone)
    assert engine_of(clone).plan.sites == engine_of(fast).plan.sites
    write_data(clone)
    assert not torch.equal(run(clone), run(model))
    assert torch.equal(run(fast), run(model))


def test_a_pickle_comes_back_and_compiles() -> None:
    model, fast = make()
    back = pickle.loads(pickle.dumps(fast))
    assert isinstance(back, RecurrentNet)
    assert torch.equal(run(back), run(model))
    assert runs_kernels(back)
    assert engine_of(back).plan.sites == engine_of(fast).plan.sites


def test_threads_get_their_own_results() -> None:
    model = RecurrentNet().eval()
    fast = sparsify(model, timing=False)
    inputs = [spikes(6, 2 + n) for n in range(6)]
    expected = [run(model, x) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(5):
            if not torch.equal(run(fast, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine_of(fast).recordings <= 3


def test_a_changed_attribute_is_seen() -> None:
    model, fast = make()
    before = run(fast)
    setattr(fast, "beta", 0.25)  # noqa: B010
    assert isinstance(model, RecurrentNet)
    assert model.beta == 0.25
    after = run(model)
    assert not torch.equal(before, after)
    assert torch.equal(run(fast), after)
    assert "beta was 0.5 and is now 0.25" in str(engine_of(fast).report)


class Scaled(nn.Module):
    """The changing number is outside of the kernels, which are compiled once."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.net = RecurrentNet()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out * self.scale


def test_an_attribute_that_never_rests_is_not_compiled_for_ever() -> None:
    model, fast = make(Scaled())
    assert isinstance(model, Scaled)
    kernels = len(engine_of(fast).binaries)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in range(14):
            model.scale = 0.5 + n / 64
            assert torch.equal(run(fast), run(model))
    assert engine_of(fast).recordings < 14
    assert len(engine_of(fast).binaries) == kernels
    assert len([w for w in caught if "8 recordings did not settle it" in str(w.message)]) == 1


def test_a_hook_on_a_submodule_keeps_firing() -> None:
    model, fast = make()
    assert isinstance(model, RecurrentNet)
    seen: list[Tensor] = []
    handle = model.rec.register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.warns(UserWarning, match=r"\[observed\] A forward hook on 'rec'"):
        assert torch.equal(run(fast), run(model))
    assert len(seen) == 2 * len(X)
    assert {site.code for site in engine_of(fast).report.sites} == {"observed"}
    handle.remove()
    assert runs_kernels(fast)
    assert {site.decision for site in engine_of(fast).report.sites} == {"event", "kept"}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_norms_that_are_hooks_compute_weights_that_kernels_read() -> None:
    net, x = RecurrentNet().double().eval(), X.double()
    torch.nn.utils.weight_norm(net.rec)
    torch.nn.utils.spectral_norm(net.inp)
    fast = sparsify(net, x, timing=False)
    run(fast, x)
    assert "event" in {site.decision for site in engine_of(fast).report.sites}
    with torch.no_grad():
        net.rec.get_parameter("weight_g").mul_(0.5)
    # In float64 what a sum rounds is far from every threshold: spikes are equal, and so are counts.
    # The readout adds dyadic weights of spikes, which is exact.
    assert torch.equal(run(fast, x), run(net, x))
    assert runs_kernels(fast, x)


def test_hooks_on_the_whole_model_fire_once_a_call() -> None:
    _, fast = make()
    calls: list[str] = []
    fast.register_forward_pre_hook(lambda m, args: calls.append("before"))
    fast.register_forward_hook(lambda m, args, out: calls.append("after"))
    run(fast)
    run(fast, spikes(7, 2))
    assert calls == ["before", "after"] * 2
    assert runs_kernels(fast)


def test_with_gradients_kernels_run_forward_and_backward() -> None:
    model, fast = make()
    for _ in range(2):
        fast(X).sum().backward()
    report = engine_of(fast).report
    assert report.gradients
    assert {site.decision for site in report.sites} & {"event"}
    got = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient is not None for gradient in got.values())
    assert runs_kernels(fast)  # calls without gradients have kernels of their own


def test_an_input_that_needs_gradients_gets_them() -> None:
    model, fast = make()
    model.requires_grad_(False)
    gradients = []
    for net in (fast, fast, model):
        x = X.clone().requires_grad_()
        net(x).sum().backward()
        gradients.append(x.grad)
    assert gradients[1] is not None and gradients[2] is not None
    # Dyadic weights would be needed for equal sums; spikes are equal, so only rounding is left.
    scale = float(gradients[2].abs().max())
    assert float((gradients[1] - gradients[2]).abs().max()) <= 1e-5 * scale
    assert torch.equal(fast(X), model(X))  # nothing needs gradients here


def test_the_environment_turns_everything_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = make()
    monkeypatch.setenv("SPARSIFY", "0")
    assert not runs_kernels(fast)
    assert torch.equal(run(fast), run(model))
    off = sparsify(model, X)
    assert torch.equal(run(off), run(model))
    assert not engine_of(off).is_compiled
    monkeypatch.delenv("SPARSIFY")
    assert runs_kernels(fast)


def test_state_in_buffers_goes_on_from_call_to_call() -> None:
    ours, reference = StatefulNet(), StatefulNet()
    fast = sparsify(ours.eval(), X, timing=False)
    assert ours.v.count_nonzero() == 0  # an explicit recording leaves no trace
    for _ in range(4):
        assert torch.equal(run(fast), run(reference))
        assert torch.equal(ours.v, reference.v)


class ListedStates(RecurrentNet):
    """Keeps its states in a list, in whose place each call puts another one."""

    def __init__(self) -> None:
        super().__init__()
        self.states = [torch.zeros(3, HIDDEN), torch.zeros(3, HIDDEN)]

    def forward(self, x: Tensor) -> Tensor:
        v, z = self.states
        for x_t in x:
            v = self.beta * v + self.inp(x_t) + self.rec(z)
            z = (v > 1.0).to(v.dtype)
            v = v - z
        self.states = [v, z]
        return v


def test_an_example_leaves_no_trace_in_a_list_that_is_replaced() -> None:
    model = ListedStates().eval()
    held, states = model.states, [*model.states]
    fast = sparsify(model, X, timing=False)
    assert engine_of(fast).is_compiled
    assert model.states is held and all(map(operator.is_, held, states))
    assert not any(state.any() for state in states)


class RecordedStates(RecurrentNet):
    """Rockpool: what a call saw is written into a dict, in whose place it puts an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        self.seen["spikes"] = x.new_zeros(x.shape[0], x.shape[1], HIDDEN)
        for t, x_t in enumerate(x):
            v = self.beta * v + self.inp(x_t) + self.rec(z)
            z = (v > 1.0).to(v.dtype)
            v = v - z
            self.seen["spikes"][t] = z
        seen, self.seen = self.seen, {}
        return copy.copy(v), seen


def test_a_dict_that_forward_fills_and_gives_away_is_one_of_each_call() -> None:
    torch.manual_seed(0)
    model = RecordedStates().eval()
    fast = sparsify(model, timing=False)
    with torch.no_grad():
        for _ in range(3):
            (v, seen), (wanted, wanted_seen) = fast(X), copy.deepcopy(model)(X)
            assert torch.equal(v, wanted) and torch.equal(seen["spikes"], wanted_seen["spikes"])
            assert seen["spikes"].any() and not model.seen
    assert engine_of(fast).recordings == 1


def test_the_first_call_records_when_there_is_no_example() -> None:
    ours, reference = StatefulNet(), StatefulNet()
    fast = sparsify(ours.eval(), timing=False)
    assert not engine_of(fast).is_compiled
    for _ in range(4):
        assert torch.equal(run(fast), run(reference))
        assert torch.equal(ours.v, reference.v)
    assert engine_of(fast).recordings == 1


def test_wrong_inputs_raise_what_eager_raises() -> None:
    model, fast = make()
    for wrong in (X[..., :-1], X.double(), X[0, 0], X.to("meta"), "text"):
        with pytest.raises((RuntimeError, TypeError, IndexError, AttributeError)) as expected:
            run(model, wrong)  # type: ignore[arg-type]
        with pytest.raises(expected.type) as got:
            run(fast, wrong)  # type: ignore[arg-type]
        assert str(got.value) == str(expected.value)
    assert runs_kernels(fast)


def test_inputs_in_another_order_of_memory_are_right() -> None:
    model, fast = make()
    transposed = X.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.stack([X, X], -1)[..., 0]
    expanded = X[:, :1].expand(-1, 3, -1)
    for x in (transposed, sliced, expanded):
        assert not x.is_contiguous()
        assert torch.equal(run(fast, x), run(model, x))


def test_inference_mode_works() -> None:
    model, fast = make()
    with torch.inference_mode():
        result = fast(X)
        assert result.is_inference()
    assert torch.equal(result, run(model))


def test_not_a_number_and_infinity_go_through_as_in_eager() -> None:
    model, fast = make()
    for value in (float("nan"), float("inf"), -float("inf")):
        x = X.clone()
        x[1, 1, 2] = value
        assert torch.equal(run(fast, x).nan_to_num(7.0), run(model, x).nan_to_num(7.0))


def test_weights_that_are_not_finite_run_as_in_eager() -> None:
    model, fast = make()
    assert isinstance(model, RecurrentNet)
    model.rec.weight.data[2, 3] = float("inf")
    assert torch.equal(run(fast).nan_to_num(7.0), run(model).nan_to_num(7.0))
