from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify.comparing.values import find_outside
from sparsify.passes.lowering.lower_ops import EXPANSIONS
from sparsify.rounding.bounded import EXACT
from sparsify.rounding.error_bounds import Bounded, Bounds, bound_errors
from sparsify.rounding.rows import ROWS
from sparsify.scalars.scalar_ops import SCALAR_OPS

aten = torch.ops.aten


def traced(function: Callable[..., Any], *operands: Tensor) -> fx.GraphModule:
    graph: fx.GraphModule = make_fx(function)(*operands)
    return graph


def bounds_of(function: Callable[..., Any], *operands: Tensor) -> Bounds:
    return bound_errors(traced(function, *operands), operands)


def is_within(computed: Tensor, bounded: Bounded) -> bool:
    return not bool(find_outside(computed, bounded).any())


def lif(v: Tensor, s: Tensor, x: Tensor, w: Tensor, r: Tensor, theta: Tensor) -> tuple[Tensor, ...]:
    v = 0.9 * v + F.linear(x, w) + F.linear(s, r)
    z = (v > theta).to(v.dtype)
    return v - z * theta, z


def lif_operands(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, inputs, neurons = 64, 80, 200

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    spikes = (torch.rand(batch, neurons, generator=generator) < 0.1).to(dtype)
    weights = [normal(neurons, inputs) * 0.3, normal(neurons, neurons) * 0.1]
    return [normal(batch, neurons), spikes, normal(batch, inputs), *weights, normal(1) * 0.01 + 1]


def reordered_lif(operands: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Another legal evaluation in the same precision: senders added one by one, in any order."""
    v, s, x, w, r, theta = operands
    total = torch.zeros_like(v)
    senders = torch.cat([x, s], 1)
    weights = torch.cat([w, r], 1)
    generator = torch.Generator().manual_seed(seed)
    for sender in torch.randperm(senders.shape[1], generator=generator).tolist():
        total = total + senders[:, sender, None] * weights[:, sender]
    v = total + v * 0.9
    z = (v > theta).to(v.dtype)
    return v - z * theta, z


@pytest.mark.parametrize("seed", range(4))
def test_other_summation_orders_stay_inside(seed: int) -> None:
    operands = lif_operands(seed)
    bounds = bounds_of(lif, *operands)
    v, z = reordered_lif(operands, seed)
    # The two products are one sum here, whose count of roundings is at most that of the two plus 1;
    # the bound has two gammas and two more sums.
    assert is_within(v, bounds.outputs[0])
    assert is_within(z, bounds.outputs[1])
    assert is_within(lif(*operands)[0], bounds.outputs[0])
    assert not bounds.without_row


FUSED: dict[str, Callable[..., Tensor]] = {
    "lerp": lambda a, b, c: torch.lerp(a, b, 0.3),
    "addcmul": lambda a, b, c: torch.addcmul(a, b, c, value=0.3),
    "add": lambda a, b, c: torch.add(a, b, alpha=0.3),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_torch_fuses_in_float64_is_as_far_as_two_roundings(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(3))
    bounded = bounds_of(FUSED[name], a, b, c).outputs[0]
    assert is_within(FUSED[name](a, b, c), bounded)
    assert bool((bounded.full_error > 0).all())


def test_float64_is_bounded_at_its_own_precision() -> None:
    operands = lif_operands(7, torch.float64)
    bounds = bounds_of(lif, *operands)
    assert is_within(reordered_lif(operands, 7)[0], bounds.outputs[0])
    # A sum of at most 200 terms below 1 whose roundings are 2**-52: far below 1e-10.
    assert float(bounds.outputs[0].error.max()) < 1e-10


def test_a_relative_error_of_one_in_ten_thousand_is_seen() -> None:
    operands = lif_operands(0)
    bounds = bounds_of(lif, *operands)
    wrong = list(operands)
    wrong[4] = operands[4] * (1 + 1e-4)
    assert not is_within(lif(*wrong)[0], bounds.outputs[0])


def test_spikes_are_events_with_their_distance_from_the_threshold() -> None:
    operands = lif_operands(0)
    v, z = bounds_of(lif, *operands).outputs
    assert z.event
    assert not v.event
    assert z.margin is not None
    distance, limit = z.margin
    assert torch.equal(distance > 0, z.value == 1)
    assert torch.equal(z.error > 0, distance.abs() <= limit)


def test_an_undecided_comparison_allows_both_results() -> None:
    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        v = x @ w
        z = v > 1
        return v, z, z.float(), torch.where(z, v - 1, v), ~z

    x = torch.full((1, 3), 0.1)
    w = torch.tensor([[1 / 0.3] * 2] * 3)
    w[0, 1] = 1
    bounds = bounds_of(step, x, w)
    _, z, as_float, reset, inverted = bounds.outputs
    assert z.error.tolist() == [[1, 0]]
    assert as_float.error.tolist() == [[1, 0]]
    assert inverted.error.tolist() == [[1, 0]]
    assert float(reset.error[0, 0]) >= 1
    # The sum of three products: three roundings of float32, of a value below 1.
    assert float(reset.error[0, 1]) < 4 * 2**-24
    assert (bounds.thresholds, bounds.undecided) == (2, 1)


def test_an_undecided_spike_reaches_its_receivers_as_a_bound() -> None:
    def step(v: Tensor, w: Tensor) -> Tensor:
        spikes = (v * 0.1 * 10 > 1).float()
        return spikes @ w

    w = torch.tensor([[0.3, 0.0], [0.2, 0.1]])
    [out] = bounds_of(step, torch.tensor([[1.0, 5.0]]), w).outputs
    for spikes in ([0.0, 1.0], [1.0, 1.0]):
        assert is_within(torch.tensor([spikes]) @ w, out)
    assert float(out.error[0, 1]) < 1e-6  # the undecided sender has a weight of zero there


def test_sums_of_few_dyadic_terms_are_exact_so_ties_are_decided() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randint(-32, 33, (100, 50), generator=generator) * 2.0**-6
    x = (torch.rand(64, 100, generator=generator) < 0.3).float()

    def step(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        v = x @ w * 0.5 + 0.25
        return v, v >= 0.25

    bounds = bounds_of(step, x, w)
    assert not bounds.outputs[0].error.any()
    assert bool((bounds.outputs[0].value == 0.25).any())
    assert bounds.undecided == 0
    assert bounds.thresholds == 64 * 50


@pytest.mark.parametrize(
    "function",
    [lambda v: torch.heaviside(v, torch.tensor(0.0)), torch.sign, torch.floor, lambda v: v >= 0],
    ids=["heaviside", "sign", "floor", "ge"],
)
def test_steps_are_events_and_counted(function: Callable[[Tensor], Tensor]) -> None:
    v = torch.tensor([-0.7, 0.9, 0.3, 0.1 + 0.2 - 0.3])

    def step(v: Tensor) -> tuple[Tensor, Tensor]:
        z = function(v * 0.1 - v / 10)
        return z, z.to(v.dtype) * 0.5

    bounds = bounds_of(step, v)
    assert all(output.event for output in bounds.outputs)
    assert bounds.thresholds == 4
    assert bounds.undecided == 3 + bool(v[3])
    assert bounds_of(function, v).undecided == 0


def test_nothing_active_is_exact() -> None:
    [out] = bounds_of(torch.mm, torch.zeros(2, 30), torch.randn(30, 4)).outputs
    assert not out.error.any()


def test_a_scalar_counts_as_rounded_to_the_working_precision() -> None:
    # 0.1 is no float32: torch compares with the nearest one, which is 0.1's own conversion here.
    x = torch.tensor([0.1])
    bounds = bounds_of(lambda x: x > 0.1, x)
    assert bounds.outputs[0].value.tolist() == (x > 0.1).tolist() == [False]
    assert bounds.undecided == 0


def test_a_float64_scalar_tensor_is_rounded_before_it_is_compared() -> None:
    x, threshold = torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)
    bounds = bounds_of(lambda x, t: x > t, x, threshold)
    assert bounds.outputs[0].value.tolist() == (x > threshold).tolist()


def test_nan_and_infinity_have_no_distance() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    result, above = bounds_of(lambda x: (x * 0.3 + 1, x > 0.5), x).outputs
    assert result.value.isnan().tolist() == [True, False, False, False]
    assert result.error[:3].tolist() == [0, 0, 0]
    assert above.value.tolist() == [False, True, False, True]
    assert not above.error.any()


def test_overflow_of_the_working_precision_is_unbounded() -> None:
    [out] = bounds_of(lambda x: x * x, torch.tensor([1e30])).outputs
    assert out.error.tolist() == [float("inf")]


def test_an_operation_without_a_row_is_named_and_infinite() -> None:
    bounds = bounds_of(lambda x: (torch.lgamma(x) + 1, x * 0.3), torch.randn(5))
    assert bounds.without_row == {"aten.lgamma.default"}
    assert bool(bounds.outputs[0].full_error.isinf().all())
    assert bool(bounds.outputs[1].error.isfinite().all())


def test_indices_beside_values_without_a_row_stay_indices() -> None:
    def winners(x: Tensor) -> Tensor:
        values, places = torch.relu(x).topk(2, -1)
        return torch.zeros_like(x).scatter_(-1, places, values)

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    bounds = bounds_of(winners, x)
    assert any(name.startswith("aten.topk") for name in bounds.without_row)
    assert torch.equal(bounds.outputs[0].value.float(), winners(x))
    assert bool(bounds.outputs[0].full_error.isinf().all())


def test_integers_stay_exact() -> None:
    def step(x: Tensor) -> tuple[Tensor, ...]:
        count = torch.arange(5) * 3 + 1
        return count, x + count, (count % 2 == 0) & (count > 4)

    count, total, mask = bounds_of(step, torch.zeros(5)).outputs
    assert count.value.tolist() == [1, 4, 7, 10, 13]
    assert total.value.tolist() == [1, 4, 7, 10, 13]
    assert not total.error.any()
    assert mask.value.tolist() == [False, False, False, True, False]


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "abs": torch.abs,
    "neg": torch.neg,
    "sqrt": lambda x: torch.sqrt(x.abs()),
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "hardshrink": lambda x: F.hardshrink(x, 0.3),
    "threshold": lambda x: F.threshold(x, 0.2, -1.0),
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.4, 0.7),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.1),
    "divide": lambda x: x / 0.7,
    "rsub": lambda x: 0.3 - x,
    "spike": lambda x: (x > 0.3).to(x.dtype),
    "gate": lambda x: torch.where((x > 0.1) & ~(x >= 0.9), x, x * 0.25),
    "mask": lambda x: (x > 0.1) * x,
    "sum": lambda x: x.sum(1, keepdim=True) * 0.1 + x,
    "mean": lambda x: x - x.mean(0),
    "stack": lambda x: torch.stack([x, x.flip(0)]).sum(0),
    "transpose": lambda x: x.t().reshape(x.shape),
    "cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "unbind": lambda x: x.unbind(1)[2].unsqueeze(1) + x,
    "view": lambda x: x.view(-1).view(x.shape),
    "expand": lambda x: x[:1].expand(x.shape) * x,
    "silu": F.silu,
    "expm1": torch.expm1,
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "erf": torch.erf,
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 0.7),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x * 0.3, approximate="tanh"),
    "softplus": lambda x: F.softplus(x, 2.0),
    "relu6": lambda x: F.relu6(x * 4),
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.2),
    "fill": lambda x: x.masked_fill(x > 0.4, 0.3),
    "trunc-divide": lambda x: torch.div(x * 7, 0.9, rounding_mode="trunc"),
    "floor-divide": lambda x: torch.div(x * 7, 0.9, rounding_mode="floor"),
    "cumsum": lambda x: x.cumsum(0),
    "view-as": lambda x: x.flatten().view_as(x) + torch.unflatten(x, 0, (2, -1)).reshape_as(x),
    "heaviside": lambda x: torch.heaviside(x, torch.full_like(x, 0.5)) * x,
    "pool": lambda x: F.max_pool2d(x[None], 2, 1)[0].mean() + x,
    "max-dim": lambda x: x.max(1, keepdim=True)[0] - x.min(1, keepdim=True)[0] * 0.3 + x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False) - 0.1,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "add_alpha": lambda a, b: torch.add(a, b, alpha=0.9),
    "sub": torch.sub,
    "sub_alpha": lambda a, b: torch.sub(a, b, alpha=0.7),
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mm": torch.mm,
    "addmm": lambda a, b: torch.addmm(a[0], a, b),
    "addmm_scaled": lambda a, b: torch.addmm(a, a, b, beta=0.3, alpha=0.6),
    "linear": lambda a, b: F.linear(a, b, b[0]),
    "bmm": lambda a, b: torch.bmm(a[None], b[None])[0],
    "mv": lambda a, b: torch.mv(a, b[0])[:, None] + a,
    "conv": lambda a, b: F.conv1d(a[None], b[:, :, None], b[0])[0],
    "compare": lambda a, b: (a <= b).to(a.dtype) - a,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "lerp_tensor": lambda a, b: torch.lerp(a, b, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.7),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, b.abs() + 0.5, value=0.7),
    "max": lambda a, b: torch.max(a, b),
    "xor": lambda a, b: ((a > 0) ^ (b > 0)).to(a.dtype) + b,
    "or": lambda a, b: ((a > 0) | (b > 0)).to(a.dtype) * b,
}
SIZE = 6


def apply_chain(names: list[tuple[str, str]], a: Tensor, b: Tensor) -> Tensor:
    for unary, binary in names:
        a, b = BINARY[binary](UNARY[unary](a), b), a
    return a


@pytest.mark.parametrize("name", UNARY)
def test_every_unary_row_bounds_float32(name: str) -> None:
    assert_chain_is_bounded([(name, "mul")], seed=3)


@pytest.mark.parametrize("name", BINARY)
def test_every_binary_row_bounds_float32(name: str) -> None:
    assert_chain_is_bounded([("neg", name)], seed=4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([*UNARY]), st.sampled_from([*BINARY])), max_size=5),
    st.integers(0, 1000),
)
def test_random_graphs_stay_inside(names: list[tuple[str, str]], seed: int) -> None:
    # Where float64 overflows, float32 did so before: infinities that it adds up may be no number.
    a, b = (operand.double() for operand in chain_operands(seed))
    assume(bool(apply_chain(names, a, b).isfinite().all()))
    assert_chain_is_bounded(names, seed)


def chain_operands(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(SIZE, SIZE, generator=generator) for _ in range(2))
    return a, b


def assert_chain_is_bounded(names: list[tuple[str, str]], seed: int) -> None:
    """Senders in another order, and products of single terms, must stay inside the same bound."""
    a, b = chain_operands(seed)
    graph = traced(lambda a, b: apply_chain(names, a, b), a, b)
    bounds = bound_errors(graph, [a, b])
    assert not bounds.without_row
    computed = graph(a, b)
    assert is_within(computed, bounds.outputs[0])
    other = OneByOne(graph).run(a, b)
    assert is_within(other, bounds.outputs[0])
    assert computed.dtype is bounds.outputs[0].dtype


class OneByOne(fx.Interpreter):
    """Runs a graph in its own precision with products summed from the last sender to the first."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is aten.mm.default:
            return descending(*args)
        if target is aten.addmm.default and not kwargs:
            return descending(args[1], args[2]) + args[0]
        return super().call_function(target, args, kwargs)


def descending(a: Tensor, b: Tensor) -> Tensor:
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in reversed(range(a.shape[1])):
        total = total + a[:, k, None] * b[k]
    return total


def test_every_operation_that_kernels_take_has_a_row() -> None:
    taken = {name for op in SCALAR_OPS.values() for name in op.torch} | {
        str(target) for target in EXPANSIONS
    }
    assert len(taken) > 60
    assert taken - {str(target) for target in ROWS} == set()


def test_the_error_of_an_exact_value_is_where_the_value_is() -> None:
    """So that it can be joined with others on a GPU."""
    value = torch.ones(3, dtype=torch.float64, device="meta")
    assert Bounded(value, EXACT, torch.float32).full_error.device == value.device
