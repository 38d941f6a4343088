"""Dense values through sparse weights: what becomes a site, what is left alone, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import ir
from sparsify.api import sparsify
from sparsify.errors import MismatchError
from sparsify.plan import Plan
from sparsify.verification.model import verify

H, IN, T, B = 32, 12, 6, 3
SITE = "rnn.weight_hh_l0"
COMPRESSED = ir.Layout("compressed-rows")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """A recurrent layer; what it returns is the output and the final hidden values."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    @property
    def recurrent(self) -> Tensor:
        return self.rnn.get_parameter("weight_hh_l0")

    def forward(self, x: Tensor, start: Tensor | None = None) -> Any:
        return self.rnn(x, start)


def gru(kept: float = 0.2) -> Net:
    torch.manual_seed(0)
    net = Net(nn.GRU(IN, H)).eval()
    zero_weights(net.recurrent, kept)
    return net


def zero_weights(weight: Tensor, kept: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight.mul_(torch.rand(weight.shape, generator=generator) < kept)


def example(steps: int = T, batch: int = B) -> Tensor:
    return torch.randn(steps, batch, IN, generator=torch.Generator().manual_seed(steps))


def compressed(net: Net) -> Any:
    plan = Plan().pin(SITE, "dense", COMPRESSED)
    return sparsify(net, example(), plan=plan, timing=False)


def test_a_pruned_layer_runs_without_its_zeros() -> None:
    net = gru()
    fast = compressed(net)
    site = fast.report[SITE]
    assert (site.decision, site.layout) == ("dense", "compressed-rows")
    assert site.weight_density == int(net.recurrent.count_nonzero()) / net.recurrent.numel() < 0.3
    assert len(fast.kernels) == 1
    verify(
        net, fast, example(), must_replace=True
    )  # no site runs as events, and that is no mistake
    assert fast.report["rnn.weight_ih_l0"].code == "no-event"


def test_steps_of_single_operations_are_not_called_the_original() -> None:
    """What the model would run is torch's whole layer, several times faster than its steps."""
    fast: Any = sparsify(gru(0.05), example())
    site = fast.report[SITE]
    assert "step by step" in site.took_ms
    assert "original" not in site.took_ms
    assert site.fusion_gain is None


def test_dense_rows_alone_are_not_verified_unasked() -> None:
    net = gru()
    plan = Plan().pin(SITE, "dense", ir.DENSE_ROWS)
    fast = sparsify(net, example(), plan=plan, timing=False)
    with pytest.raises(MismatchError, match="0 of 2 sites run as events, 1 are asked for"):
        verify(net, fast, example(), must_replace=True)
    verify(net, fast, example(), events=0, must_replace=True)


def test_other_sizes_and_weights_are_served() -> None:
    net = gru()
    fast = compressed(net)
    verify(net, fast, example(9, 1), must_replace=True)
    verify(net, fast, example(2, 17), must_replace=True)
    net.recurrent.copy_(torch.randn(3 * H, H) / H**0.5)  # no zero is left
    verify(net, fast, example(), must_replace=True)
    zero_weights(net.recurrent, 0.0)
    verify(net, fast, example(), must_replace=True)


@pytest.mark.parametrize("kept", [1.0, 0.7])
def test_a_layer_with_few_zeros_is_left_alone(kept: float) -> None:
    net = gru(kept)
    fast: Any = sparsify(net, example(), timing=False)
    for site in fast.report.sites:
        assert (site.decision, site.code) == ("kept", "no-event")
        assert "Prune its recurrent weights" in site.remedy
    got, expected = fast(example()), net(example())
    assert all(map(torch.equal, got, expected))


def test_a_layer_without_a_kernel_is_put_back_whole() -> None:
    """Step by step it would be slower than torch's own operation."""
    net = gru()
    fast: Any = sparsify(net, example(), plan=Plan().pin(SITE, "off"), timing=False)
    targets = [node.target for node in fast.compiled.compiled.graph.graph.nodes]
    assert torch.ops.aten.gru.input in targets
    assert fast.report[SITE].code == "pinned"
    assert dict(fast.plan.sites) == {SITE: "off", "rnn.weight_ih_l0": "off"}
    assert all(map(torch.equal, fast(example()), net(example())))


def test_a_lone_product_with_a_sparse_weight_is_a_kernel_over_all_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, H), nn.Tanh(), nn.Linear(H, H)).eval()
    for layer in (net[0], net[2]):
        assert isinstance(layer, nn.Linear)
        zero_weights(layer.weight, 0.2)
    plan = Plan().pin("2", "dense", COMPRESSED).pin("0", "off")
    fast: Any = sparsify(net, example(), plan=plan, timing=False)
    assert {site.name: site.decision for site in fast.report.sites} == {"0": "kept", "2": "dense"}
    verify(net, fast, example(), must_replace=True)
    verify(net, fast, example(11, 2), must_replace=True)


def test_what_is_not_finite_reaches_all_that_eager_says() -> None:
    """A zero of a weight times infinity is NaN."""
    net = gru()
    start = torch.zeros(1, B, H)
    plan = Plan().pin(SITE, "dense", COMPRESSED)
    fast: Any = sparsify(net, example(), start, plan=plan, timing=False)
    assert fast.report[SITE].decision == "dense"
    start[0, 1, 7] = float("inf")
    got, expected = fast(example(), start), net(example(), start)
    for one, other in zip(got, expected, strict=True):
        assert bool(other[:, 1].isnan().all()) and not bool(other[:, 0].isnan().any())
        assert torch.equal(one.isnan(), other.isnan())
    net.recurrent[4, 5] = float("nan")
    start.zero_()
    for one, other in zip(fast(example(), start), net(example(), start), strict=True):
        assert bool(other[-1].isnan().all())
        assert torch.equal(one.isnan(), other.isnan())
