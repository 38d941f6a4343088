"""Sums over neurons in a recurrence, as products with ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.api import sparsify
from sparsify.compiling.lower_scans import lower_forward, lower_scans
from sparsify.compiling.stages import differentiate, rolled_stages
from sparsify.errors import Refusal
from sparsify.graphs.loops import find_scans
from sparsify.passes.nodes.classify_ops import has_ones
from sparsify.passes.products.write_reductions import write_reductions
from sparsify.plan import Plan
from sparsify.recording.recording import Recording
from sparsify.scans.lowered import Lowered
from tests.models.surrogates import Rect
from tests.recorded_gradients import gradients_of, recorded
from tests.run_lowered import with_regions

IN, HIDDEN, STEPS, BATCH = 6, 16, 5, 3
Step = Callable[["Net", Tensor, Tensor], Tensor]


class Net(nn.Module):
    """``step`` says what a neuron gets of the currents and of the last spikes."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inp, self.rec = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.norm, self.plain = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.rms, self.pool = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 1)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.2, 0.2)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        out = []
        for x_t in x:
            v = 0.75 * v + self.step(self, 2 * self.inp(x_t) + self.rec(z), z)
            z = Rect.apply(v - 0.25, 1.0)
            v = v - z
            out.append(v)
        return torch.stack(out)


def centred(net: Net, i: Tensor, z: Tensor) -> Tensor:
    variance, mean = torch.var_mean(i, 1, keepdim=True, correction=0)
    return (i - mean) * torch.rsqrt(variance + 1e-3)


def scaled(net: Net, i: Tensor, z: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(i, -1)
    return (i - mean.unsqueeze(1)) / (0.1 + deviation[:, None])


WRITTEN: dict[str, Step] = {
    "layer norm": lambda net, i, z: net.norm(i),
    "layer norm without scale": lambda net, i, z: net.plain(i) + 0.1,
    "one group": lambda net, i, z: F.group_norm(i, 1, net.norm.weight, net.norm.bias),
    "RMS norm": lambda net, i, z: net.rms(i),
    "sum": lambda net, i, z: i - 0.125 * z.sum(1, keepdim=True),
    "mean of the last dim": lambda net, i, z: i - z.mean(-1, True),
    "sum without a dim": lambda net, i, z: i - 0.125 * z.sum(-1).unsqueeze(-1),
    "sum of bools": lambda net, i, z: i - 0.125 * (z > 0).sum(1, keepdim=True),
    "sum of reals": lambda net, i, z: i / (1 + F.relu(i).sum(1, keepdim=True)),
    "sum of a slice": lambda net, i, z: i - 0.25 * z[:, 2:9].sum(1, keepdim=True),
    "mean of a chunk": lambda net, i, z: i - z.chunk(2, 1)[1].mean(1, keepdim=True),
    "variance and mean": centred,
    "deviation and mean": scaled,
    "variance": lambda net, i, z: i * torch.rsqrt(0.1 + i.var(1, keepdim=True)),
    "norm": lambda net, i, z: 2 * F.normalize(i, dim=1),
    "norm of zeros": lambda net, i, z: i - 0.5 * z.norm(dim=1, keepdim=True),
    "norm of magnitudes": lambda net, i, z: 8 * F.normalize(i, 1.0, dim=1),
    "deviation of zeros": lambda net, i, z: i - z.std(1, keepdim=True),
    "one neuron": lambda net, i, z: i - F.relu(net.pool(z)),
    "sum in its own precision": lambda net, i, z: i - 0.125 * z.sum(1, True, dtype=z.dtype),
    "a choice of all": lambda net, i, z: torch.where(z.sum(1, keepdim=True) < 4, i, 0.5 * i),
}


def inputs(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(steps, BATCH, IN, generator=generator, dtype=dtype)


def run(recording: Recording, graph: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = recording.calling.deliver(
        graph(*recording.calling.operands((x,), {})), (x,), {}
    )
    return result


def assert_near(result: Tensor, expected: Tensor, equal_nan: bool = False) -> None:
    """Spikes are those of eager; 16 terms a sum and 5 steps round some hundred times, each by
    1e-16, and no value here is further than 1e3 from what it is a difference of.
    """
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11, equal_nan=equal_nan)


def check_kernels(step: Step, x: Tensor) -> None:
    model = Net(step).double()
    x.requires_grad_(True)
    found = recorded(model, x)
    stages = rolled_stages(found.graph, True, None)
    graph = stages[-1].graph
    leaves = [x, *model.parameters()]
    expected, result = model(x), run(found, graph, x)
    assert_near(result, expected)
    for ours, eager in zip(
        gradients_of(result, leaves), gradients_of(expected, leaves), strict=True
    ):
        assert (ours is None) == (eager is None)
        if ours is not None and eager is not None:
            assert_near(ours, eager)
    stage, refused = differentiate(graph, found.calling.operands((x,), {}))
    assert not refused
    lowered = lower_scans(find_scans(stage.graph))
    assert any(".backward." in name for name in lowered)
    assert all(isinstance(each, Lowered) for each in lowered.values()), lowered
    with_regions(graph)
    with torch.no_grad():
        assert_near(run(found, graph, x), expected)


@pytest.mark.parametrize("step", WRITTEN.values(), ids=WRITTEN)
def test_a_loop_that_adds_up_neurons_becomes_kernels(step: Step) -> None:
    check_kernels(step, inputs())


@pytest.mark.parametrize("name", ["layer norm", "norm", "one neuron"])
def test_of_one_row_the_gradient_is_a_kernel_too(name: str) -> None:
    """Autograd turns products of one row with one element around."""
    check_kernels(WRITTEN[name], inputs()[:, :1])


def test_sums_are_none_of_the_models_products() -> None:
    with torch.no_grad():
        found = recorded(Net(WRITTEN["layer norm"]).double(), inputs())
    graph = rolled_stages(found.graph, False, None)[-1].graph
    [lowered] = [
        each
        for each in lower_scans(find_scans(graph)).values()
        if isinstance(each, Lowered) and each.kernel.states
    ]
    told = {site.gather: site.weight for site in lowered.sites}
    assert told == {
        "rec_product": "rec.weight",
        **{"total": "", "spread": "", "total_2": "", "spread_2": ""},
    }
    assert [weight.note for weight in lowered.kernel.weights].count("ones") == 4


def is_loop(lowered: Lowered | Refusal) -> bool:
    return isinstance(lowered, Lowered) and bool(lowered.kernel.states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_added_up_in_single_precision(dtype: torch.dtype) -> None:
    model, x = Net(WRITTEN["layer norm"]).to(dtype), inputs(2, dtype)
    with torch.no_grad():
        found = recorded(model, x)
        graph = rolled_stages(found.graph, False, None)[-1].graph
        expected = model(x)
        # Both round the same value to a half, once for each operation: they may differ by one in
        # the last of its digits, and what follows by a few.
        digit = torch.finfo(dtype).eps
        torch.testing.assert_close(run(found, graph, x), expected, rtol=4 * digit, atol=4 * digit)
        with_regions(graph)
        torch.testing.assert_close(run(found, graph, x), expected, rtol=4 * digit, atol=4 * digit)


def test_infinities_and_nan_are_those_of_eager() -> None:
    model, x = Net(WRITTEN["sum of reals"]).double(), inputs()
    x[1, 0], x[2, 1] = float("inf"), float("nan")
    with torch.no_grad():
        found, expected = recorded(model, inputs()), model(x)
        graph = rolled_stages(found.graph, False, None)[-1].graph
        with_regions(graph)
        assert expected.isnan().any()
        assert_near(run(found, graph, x), expected, equal_nan=True)


REFUSED: dict[str, tuple[Step, str]] = {
    "of the batch": (lambda net, i, z: i - z.sum(0), "sum works on rows of the batch together"),
    "of all": (lambda net, i, z: i - z.mean(), "mean works on rows of the batch together"),
    "softmax": (lambda net, i, z: i - torch.softmax(i, 1), "softmax normalises over neurons"),
    "largest": (lambda net, i, z: i - i.amax(1, keepdim=True), "amax compares neurons"),
    "groups": (lambda net, i, z: F.group_norm(i, 4), "group_norm normalises over neurons"),
    "part of reals": (lambda net, i, z: i - i[:, :4].sum(1, True), "slice picks or joins neurons"),
    "beside another": (
        lambda net, i, z: i.cumsum(1) - z.sum(1, keepdim=True),
        "cumsum adds up neurons",
    ),
}


@pytest.mark.parametrize(("step", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_stays_says_why(step: Step, reason: str) -> None:
    with torch.no_grad():
        found = recorded(Net(step).double(), inputs())
        graph = rolled_stages(found.graph, False, None)[-1].graph
        expected = Net(step).double()(inputs())
        # The product of the input is one of all steps, which may add up in another order.
        assert_near(run(found, graph, inputs()), expected)
    refusals = [
        refusal
        for name, scan in find_scans(graph).items()
        if isinstance(refusal := lower_forward(scan, name), Refusal)
    ]
    [refusal] = [each for each in refusals if reason in each.reason]
    assert refusal.code == "unsupported-op"
    assert "test_write_reductions.py" in str(refusal.location)


def single(net: Net, i: Tensor, z: Tensor) -> Tensor:
    total = (i.float() / 3).sum(1, True, dtype=torch.float64)
    return i - 0.125 * total


def check_loop(model: nn.Module, x: Tensor) -> None:
    """Without gradients, which are NaN where something is divided by zero."""
    with torch.no_grad():
        found, expected = recorded(model, x), model(x)
        graph = rolled_stages(found.graph, False, None)[-1].graph
        assert any(map(is_loop, lower_scans(find_scans(graph)).values()))
        with_regions(graph)
        assert_near(run(found, graph, x), expected)


FORWARD: dict[str, Step] = {
    "sum in double precision": single,
    "divisor that is -0": lambda net, i, z: (i / -z.sum(1, keepdim=True)).clamp(-1, 1),
    "multiple of -0": lambda net, i, z: (1 / (i * (-z.mean(1, True)).expand_as(z))).clamp(-1, 1),
    "quotient of -0": lambda net, i, z: (i / (-z.mean(1, True) / (1 + i.exp()))).clamp(-1, 1),
}


@pytest.mark.parametrize("step", FORWARD.values(), ids=FORWARD)
def test_kernels_compute_what_eager_does(step: Step) -> None:
    x = inputs()
    x[3] = 0  # at least once, nobody fires at the step before
    check_loop(Net(step).double(), x)


class Clock(Net):
    """Neurons keep when they fired last, by a clock that single precision does not tell apart."""

    def forward(self, x: Tensor) -> Tensor:
        v = z = x.new_zeros(x.shape[1], HIDDEN)
        now = torch.full((x.shape[1], 1), 2**24, dtype=torch.int64)
        last = now.expand(-1, HIDDEN)
        out = []
        for x_t in x:
            now = now + 1
            v = 0.75 * v + 2 * self.inp(x_t) + self.rec(z) - z.mean(1, keepdim=True)
            v = v + 0.01 * (now - last)
            z = Rect.apply(v - 0.25, 1.0)
            v, last = v - z, torch.where(z > 0, now, last)
            out.append(v)
        return torch.stack(out)


def test_large_integers_are_read_by_all_neurons_without_rounding() -> None:
    check_loop(Clock(WRITTEN["sum"]).double(), inputs())


class Unbatched(Net):
    """Inhibited by a pool that starts as ``pool``, of spikes [N]."""

    def __init__(self, pool: Tensor) -> None:
        super().__init__(WRITTEN["sum"])
        self.start = nn.Buffer(pool)

    def forward(self, x: Tensor) -> Tensor:
        v, z, pool = x.new_zeros(HIDDEN), x.new_zeros(HIDDEN), self.start
        out = []
        for x_t in x[:, 0]:
            v = 0.75 * v + 2 * self.inp(x_t) + self.rec(z) - pool
            z = Rect.apply(v - 0.25, 1.0)
            pool = 0.5 * pool + 0.125 * z.sum(-1, keepdim=pool.ndim > 0)
            v = v - z
            out.append(v)
        return torch.stack(out)


def test_numbers_without_dims_are_told_to_keep_one() -> None:
    with torch.no_grad():
        found = [
            recorded(Unbatched(torch.zeros(dims)), inputs(dtype=torch.float32))
            for dims in ((), (1,))
        ]
    graphs = [rolled_stages(each.graph, False, None)[-1].graph for each in found]
    refused, written = (list(lower_scans(find_scans(graph)).values()) for graph in graphs)
    assert any(map(is_loop, written)) and not any(map(is_loop, refused))
    [refusal] = [each for each in refused if isinstance(each, Refusal)]
    assert "is a number without dims, which is no neuron" in refusal.reason
    assert "sum(-1, keepdim=True), and start such states as zeros(1)" in refusal.remedy


def test_sums_that_are_put_back_keep_the_reason_of_their_loop() -> None:
    model = Net(WRITTEN["sum"])
    with torch.no_grad():
        fast: Any = sparsify(model, inputs(dtype=torch.float32), plan=Plan({"rec": "off"}))
    [site] = [site for site in fast.report.sites if site.name == "rec"]
    assert site.code == "pinned"
    assert "The plan leaves rec to the original operations" in site.reason
    [loop] = find_scans(fast.compiled.graph).values()
    assert not any(map(has_ones, loop.body.graph.nodes))


def told(done: Sequence[str]) -> list[str]:
    return [text.rsplit(": ", 1)[1] for text in done]


def test_what_was_written_is_told_and_stays_so() -> None:
    with torch.no_grad():
        found = recorded(Net(WRITTEN["sum"]), inputs(dtype=torch.float32))
    stages = rolled_stages(found.graph, False, None)
    [stage] = [stage for stage in stages if stage.name == "write_reductions"]
    assert told(stage.done) == ["sum is a product with ones", "sub reads one neuron through ones"]
    assert not stage.declined
    assert write_reductions(stage.graph).graph is stage.graph


def test_a_norm_that_no_later_step_reads_is_of_all_steps() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.norm(super().forward(x)))

    with torch.no_grad():
        found = recorded(Late(lambda net, i, z: i), inputs(dtype=torch.float32))
    stages = rolled_stages(found.graph, False, None)
    assert not any(stage.done for stage in stages if stage.name == "write_reductions")


def test_a_cell_of_one_step_is_a_kernel() -> None:
    class Cell(Net):
        def forward(self, x: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            v = 0.75 * v + self.step(self, self.inp(x) + self.rec(z), z)
            z = (v > 0.25).to(v.dtype)
            return v - z, z

    states = [torch.rand(BATCH, HIDDEN), (torch.rand(BATCH, HIDDEN) < 0.3).float()]
    with torch.no_grad():
        found = recorded(Cell(WRITTEN["layer norm"]), inputs(dtype=torch.float32)[0], *states)
    graph = rolled_stages(found.graph, False, None)[-1].graph
    assert any(map(is_loop, lower_scans(find_scans(graph)).values()))
