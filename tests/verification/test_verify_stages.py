from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsify.compiling.compiled import Stage
from sparsify.errors import MismatchError
from sparsify.graphs.loops import find_scans
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.recurrent_layers.expand_rnn import expand_rnn
from sparsify.rounding.error_bounds import bound_errors
from sparsify.scans.scan import Scan, retyped
from sparsify.verification.aligned_products import AlignedProducts
from sparsify.verification.stages import check_stages
from tests.fake_regions import edited
from tests.models.looped_models import ROLLED_WHOLE
from tests.passes.test_expand_rnn import INPUTS, H, example, opaque_graph
from tests.passes.test_roll_loops import record
from tests.unrolled import Tape, Unrolled, record_unrolled
from tests.verification.test_verify_regions import chaotic, normal, replace_constant

aten = torch.ops.aten
PASSES = (roll_loops, split_time)


def stages_of(graph: fx.GraphModule, passes: Any = PASSES) -> list[Stage]:
    stages = [Stage("record", graph)]
    for each in passes:
        stages.append(Stage(each.__name__, each(stages[-1].graph).graph))
    return stages


def mutated(stage: Stage, edit: Callable[[fx.Node], None]) -> Stage:
    modules = {
        name: edited(module, edit) if isinstance(module, Scan) else module
        for name, module in stage.graph.named_children()
    }
    return Stage(stage.name, fx.GraphModule(modules, stage.graph.graph))


WEIGHT = normal(8, 8, seed=1)


def membranes() -> Unrolled:
    """A leaky sum, whose product leaves the loop."""

    def net(tape: Tape, x: Tensor) -> Tensor:
        v, out = torch.zeros(3, 8), []
        for t in tape.loop(range(x.size(0))):
            v = 0.9 * v + F.linear(x[t], WEIGHT)
            out.append(v)
        return torch.stack(out)

    return record_unrolled(net, [normal(30, 3, 8)], {"w": WEIGHT})


def product_of_steps() -> Unrolled:
    """A product that leaves the loop, so that float32 sums in another order."""
    return chaotic(30, batch=3, neurons=64)


@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_all_stages_of_a_model_agree(model: Any) -> None:
    recorded = record(model, 4)
    figures = check_stages(stages_of(recorded.graph), recorded.operands)
    assert figures[0].stage == "roll_loops" and figures[0].worst_share is None
    assert all(f.values == sum(r.numel() for r in recorded.results) for f in figures)


def test_split_is_judged_in_float64_over_all_steps() -> None:
    recorded = product_of_steps()
    stages = stages_of(recorded.graph)
    assert stages[2].graph is not stages[1].graph
    rolled, split = check_stages(stages, recorded.operands)
    assert (rolled.stage, rolled.reference) == ("roll_loops", "record")
    assert (split.stage, split.reference) == ("split_time", "roll_loops")
    assert split.undecided == 0
    assert split.worst_share is not None and split.worst_share <= 1
    # 30 steps, a decay of 0.9 and at most 115 terms below 4: some 2**-52 * 115 * 4 / (1 - 0.9).
    assert split.largest_bound < 1e-11


def test_the_bound_of_a_scan_covers_the_other_order_of_float32() -> None:
    recorded = product_of_steps()
    rolled, split = (s.graph for s in stages_of(recorded.graph)[1:])
    scan_bounds = bound_errors(rolled, recorded.operands)
    assert scan_bounds.thresholds == 30 * 3 * 64
    for got, bounded in zip(split(*recorded.operands), scan_bounds.outputs, strict=True):
        assert bool(((got.double() - bounded.value).abs() <= bounded.error).all())
    # One scan of bounds is the bounds of the unrolled graph.
    unrolled = bound_errors(recorded.graph, recorded.operands)
    for a, b in zip(scan_bounds.outputs, unrolled.outputs, strict=True):
        assert torch.equal(a.value, b.value)
        assert torch.equal(a.full_error, b.full_error)


def test_a_rolled_loop_with_another_constant_is_caught() -> None:
    recorded = membranes()
    stages = stages_of(recorded.graph)
    stages[1] = mutated(stages[1], replace_constant(aten.mul.Tensor, 0.9, 0.9 + 1e-6))
    with pytest.raises(MismatchError, match="stage roll_loops against record: output 0"):
        check_stages(stages[:2], recorded.operands)


def products_of_drawn() -> Unrolled:
    """Inputs of each step in memory of their own, which rolling makes slices of one tensor."""
    weight = normal(17, 11, seed=2)

    def net(tape: Tape, x: Tensor) -> Tensor:
        drawn = [0.5 * x[t] for t in tape.loop(range(x.size(0)))]
        out = [F.linear(drawn[t], weight) for t in tape.loop(range(x.size(0)))]
        return torch.stack(out)

    return record_unrolled(net, [normal(8, 3, 11)], {"w": weight})


def test_where_the_operands_of_a_product_lie_is_no_difference() -> None:
    recorded = products_of_drawn()
    stages = stages_of(recorded.graph, (roll_loops,))
    assert len(find_scans(stages[1].graph)) == 2
    (rolled,) = check_stages(stages, recorded.operands)
    assert rolled.values == 8 * 3 * 17 and rolled.worst_share is None


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_memory(offset: int, dtype: torch.dtype) -> None:
    a, b = normal(3, 11, seed=3).to(dtype), normal(11, 17, seed=4).to(dtype)
    apart = torch.empty(3, 12 + offset, dtype=dtype)[:, offset : offset + 11].copy_(a)
    with AlignedProducts():
        for product in (torch.mm, lambda x, w: torch.mv(w.t(), x[2]), lambda x, w: w.t() @ x.t()):
            assert torch.equal(product(apart, b), product(a, b))


@pytest.mark.parametrize("error", [1e-4, 1e-9])
def test_a_split_loop_with_another_constant_is_caught(error: float) -> None:
    recorded = membranes()
    stages = stages_of(recorded.graph)
    stages[2] = mutated(stages[2], replace_constant(aten.mul.Tensor, 0.9, 0.9 + error))
    with pytest.raises(MismatchError, match="stage split_time against roll_loops, both in float64"):
        check_stages(stages, recorded.operands)


def test_an_expanded_rnn_is_compared_with_torchs_own() -> None:
    rnn = torch.nn.RNN(INPUTS, H, nonlinearity="relu")
    x, states = example(rnn)
    graph = opaque_graph(aten.rnn_relu.input, rnn, x, states)
    for node in graph.graph.nodes:
        node.meta["loops"] = ()
    stages = stages_of(graph, (expand_rnn, *PASSES))
    figures = check_stages(stages, [*(p.detach() for p in rnn.parameters()), x, *states])
    # Nothing is left to roll or to split: torch's own is compared with the expanded one.
    assert [f.stage for f in figures] == ["record"]
    assert all(f.reference == "roll_loops" and f.worst_share is not None for f in figures)


def test_what_has_no_bound_must_agree_as_far_as_float32_sees() -> None:
    def net(tape: Tape, x: Tensor) -> Tensor:
        v, out = torch.zeros(3, 8), []
        for t in tape.loop(range(x.size(0))):
            v = 0.9 * v + torch.erf(x[t])
            out.append(v)
        return torch.stack(out)

    recorded = record_unrolled(net, [normal(5, 3, 8)], {})
    stages = stages_of(recorded.graph)
    assert check_stages(stages, recorded.operands)
    stages[2] = mutated(stages[2], replace_constant(aten.mul.Tensor, 0.9, 0.9 + 1e-5))
    with pytest.raises(MismatchError, match="stage split_time against roll_loops, both in float64"):
        check_stages(stages, recorded.operands)


def test_one_stage_needs_no_comparison() -> None:
    recorded = record(ROLLED_WHOLE[0], 3)
    assert check_stages([Stage("record", recorded.graph)], recorded.operands) == []


def test_a_float64_model_is_left_in_its_precision() -> None:
    recorded = product_of_steps()
    graph = retyped(recorded.graph, torch.float64)
    figures = check_stages(stages_of(graph), [t.double() for t in recorded.operands])
    assert [f.stage for f in figures] == ["roll_loops", "split_time"]
