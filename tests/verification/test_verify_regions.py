from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify.comparing.figures import RegionFigures, region_lines
from sparsify.comparing.regions import check_regions
from sparsify.errors import MismatchError
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.scans.scan import Scan
from tests.fake_regions import Stepwise, descending, edited, sum_descending, with_regions
from tests.models.looped_models import ROLLED_WHOLE, recurrent
from tests.passes.test_roll_loops import record, scans
from tests.unrolled import Tape, Unrolled, record_unrolled

aten = torch.ops.aten
Replaced = Callable[[Scan], nn.Module]
FORCED = "each step from the original's states"
CHAINED = "one call against single steps"


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def chaotic(steps: int, batch: int = 4, neurons: int = 100) -> Unrolled:
    """A recurrent net in which one flipped spike changes all that follows.

    A neuron of row 0 starts so close to its threshold that the order of its inputs decides.
    """
    x = normal(steps, batch, 50, seed=3)
    w_in, w_rec = normal(neurons, 50, seed=1), normal(neurons, neurons, seed=2)
    weights = {
        "w_in": w_in * 0.3,
        "w_rec": w_rec * 2 / neurons**0.5,
        "threshold": torch.ones(neurons),
    }
    if steps * batch:
        eager, other = F.linear(x[0], w_in * 0.3)[0], descending(x[0], w_in.t() * 0.3)[0]
        neuron = int((eager - other).abs().argmax())
        weights["threshold"][neuron] = torch.minimum(eager, other)[neuron]

    def net(tape: Tape, x: Tensor) -> Tensor:
        v = z = torch.zeros(batch, neurons)
        spikes = []
        for t in tape.loop(range(x.size(0))):
            v = 0.9 * v + F.linear(x[t], weights["w_in"]) + F.linear(z, weights["w_rec"])
            z = (v > weights["threshold"]).float()
            v = v - z * 0.7
            spikes.append(z)
        return torch.stack(spikes)

    return record_unrolled(net, [x], weights)


def with_ties() -> Unrolled:
    """Membranes are multiples of 1/8 below 8: many meet the threshold exactly."""
    w = (torch.randint(-8, 9, (10, 20), generator=torch.Generator().manual_seed(1))) / 8

    def net(tape: Tape, x: Tensor) -> Tensor:
        v, spikes = torch.zeros(4, 10), []
        for t in tape.loop(range(x.size(0))):
            v = v + F.linear(x[t], w)
            z = (v > 1).float()
            v = v - z
            spikes.append(z)
        return torch.stack(spikes)

    return record_unrolled(net, [(normal(6, 4, 20) > 1).float()], {"w": w})


def check(recorded: Unrolled, replaced: Replaced | None = None, **more: Any) -> RegionFigures:
    graph = roll_loops(recorded.graph).graph
    [figures] = check_regions(graph, with_regions(graph, replaced), recorded.operands, **more)
    return figures


def mutated(edit: Callable[[fx.Node], None]) -> Replaced:
    return lambda scan: edited(scan, edit)


@pytest.mark.parametrize("model", ROLLED_WHOLE, ids=lambda model: model.__name__)
def test_the_scan_itself_passes(model: Any) -> None:
    recorded = record(model, 5)
    rolled = roll_loops(recorded.graph).graph
    for graph in (rolled, split_time(rolled).graph):
        found = check_regions(graph, with_regions(graph), recorded.operands)
        assert len(found) == len(scans(graph)) > 0
        assert all(region.undecided == 0 for region in found)  # sums of dyadic values are exact


def test_sums_in_another_order_pass_although_they_flip_spikes() -> None:
    recorded = chaotic(60)
    graph = roll_loops(recorded.graph).graph
    reordered = with_regions(graph, sum_descending)
    [eager], [kernel] = graph(*recorded.operands), reordered(*recorded.operands)
    figures = check(recorded, sum_descending)
    assert figures.steps == 60
    assert figures.thresholds == 60 * 4 * 100
    assert figures.excluded <= 1e-4
    _, state, spikes = figures.outputs
    assert spikes.event and not state.event
    # The first flip makes the free run drift away, which is why it is not judged.
    assert int((eager[0] != kernel[0]).sum()) == 1
    assert int((eager != kernel).sum()) > 20
    assert spikes.rate != spikes.eager_rate
    assert 0 < state.worst_share < 1
    assert 0 < state.distance < 1e-4


def replace_target(old: Any, new: Any) -> Callable[[fx.Node], None]:
    def edit(node: fx.Node) -> None:
        node.target = new if node.target is old else node.target

    return edit


def replace_constant(target: Any, old: float, new: float) -> Callable[[fx.Node], None]:
    def edit(node: fx.Node) -> None:
        if node.target is target:
            node.args = tuple(new if a == old else a for a in node.args)

    return edit


def drop_last_sender(node: fx.Node) -> None:
    if node.target is not aten.mm.default:
        return
    senders, weight = node.all_input_nodes
    with node.graph.inserting_before(node):
        shorter = node.graph.call_function(aten.slice.Tensor, (senders, 1, 0, -1))
        rows = node.graph.call_function(aten.slice.Tensor, (weight, 0, 0, -1))
    node.args = (shorter, rows)


MUTANTS = {
    "decay": replace_constant(aten.mul.Tensor, 0.9, 0.9001),
    "reset": replace_constant(aten.mul.Tensor, 0.7, 0.7001),
    "no-reset": replace_target(aten.sub.Tensor, aten.add.Tensor),
    "sender": drop_last_sender,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutated_step_is_caught(name: str) -> None:
    with pytest.raises(MismatchError, match=FORCED) as caught:
        check(chaotic(30), mutated(MUTANTS[name]))
    facts = caught.value.facts
    assert facts["region"] == "scan_0"
    assert isinstance(facts["step"], int)
    assert abs(facts["value"] - facts["expected"]) > facts["bound"]  # type: ignore[operator]


def test_the_message_names_output_step_row_neuron_and_distance() -> None:
    def flip_one(scan: Scan) -> nn.Module:
        def body(t: int, *operands: Tensor) -> tuple[Tensor, ...]:
            *states, z = (r.clone() for r in scan.body(*operands))
            z[2, 17] = 1 - z[2, 17]
            return (*states, z)

        return Stepwise(scan, body)

    with pytest.raises(MismatchError) as caught:
        check(chaotic(3), flip_one)
    facts = caught.value.facts
    assert facts["step"] == 0
    assert facts["index"] == (2, 17)
    assert {facts["value"], facts["expected"]} == {0.0, 1.0}
    distance = facts["distance"]
    assert isinstance(distance, float) and (distance > 0) == (facts["expected"] == 1)
    text = str(caught.value)
    assert text.startswith(f"{FORCED}: scan_0, _to_copy_default, step 0, batch row 2, neuron 17: ")
    assert f"{distance:.3g} from the threshold, decided from" in text
    assert "computed at model.py:2  aten._to_copy.default" in text


def test_greater_or_equal_for_greater_is_caught_where_a_membrane_meets_the_threshold() -> None:
    assert check(with_ties()).undecided == 0
    with pytest.raises(MismatchError, match="; 0 from the threshold, decided from 0 on"):
        check(with_ties(), mutated(replace_target(aten.gt.Scalar, aten.ge.Scalar)))


def test_swapped_batch_rows_are_caught() -> None:
    def swap(scan: Scan) -> nn.Module:
        return Stepwise(scan, lambda t, *given: tuple(r.flip(0) for r in scan.body(*given)))

    with pytest.raises(MismatchError, match=f"{FORCED}: .*batch row 0"):
        check(chaotic(3), swap)


def test_a_stale_weight_is_caught() -> None:
    recorded = chaotic(5)

    def pack_once(scan: Scan) -> nn.Module:
        packed = [w.clone() for w in recorded.operands[:3]]

        def run(steps: int, carries: Any, xs: Any, consts: Any) -> tuple[Tensor, ...]:
            old = [p for c in consts for p in packed if p.shape == c.shape]
            result: tuple[Tensor, ...] = scan(steps, carries, xs, old)
            return result

        stale = nn.Module()
        stale.forward = run
        return stale

    assert check(recorded, pack_once).steps == 5
    graph = roll_loops(recorded.graph).graph
    regions = with_regions(graph, pack_once)
    changed = copy.deepcopy(recorded.operands)
    changed[1][7] *= 1.001
    with pytest.raises(MismatchError, match=f"{FORCED}: .*neuron 7"):
        check_regions(graph, regions, changed)


def test_a_result_of_the_step_before_is_caught() -> None:
    """Right in every single step, wrong in one call: the second event buffer is never read."""

    def late(scan: Scan) -> nn.Module:
        before: dict[str, Tensor] = {}

        def body(t: int, *operands: Tensor) -> tuple[Tensor, ...]:
            z = operands[0] if t < 2 else before["z"]
            before["z"] = operands[0]
            return tuple(scan.body(z, *operands[1:]))

        return Stepwise(scan, body)

    with pytest.raises(MismatchError, match=CHAINED) as caught:
        check(chaotic(10), late)
    assert caught.value.facts["step"] == 2


def test_a_wrong_final_state_is_caught() -> None:
    def unfinished(scan: Scan) -> nn.Module:
        def run(steps: int, carries: Any, xs: Any, consts: Any) -> tuple[Tensor, ...]:
            z, v, *ys = scan(steps, carries, xs, consts)
            return (z, v if steps == 1 else scan(steps - 1, carries, xs, consts)[1], *ys)

        module = nn.Module()
        module.forward = run
        return module

    with pytest.raises(MismatchError, match=CHAINED) as caught:
        check(chaotic(4), unfinished)
    assert caught.value.facts["step"] is None
    assert caught.value.facts["output"] == "sub_tensor (state)"


def test_a_wrong_dtype_is_caught() -> None:
    def widen(scan: Scan) -> nn.Module:
        return Stepwise(scan, lambda t, *given: tuple(r.double() for r in scan.body(*given)))

    with pytest.raises(MismatchError, match=r"is \[4, 100\] torch.float64, expected"):
        check(chaotic(1), widen)


def test_a_region_in_another_place_than_its_scan_is_caught() -> None:
    recorded = record(recurrent, 4)
    graph = roll_loops(recorded.graph).graph
    compiled = with_regions(graph)
    for node in compiled.graph.nodes:
        if node.op == "call_module":
            steps, (v, z), xs, consts = node.args
            node.args = (steps, (z, v), xs, tuple(reversed(consts)))
    assert len(scans(graph)) == 1
    with pytest.raises((MismatchError, RuntimeError)):
        check_regions(graph, compiled, recorded.operands)


def test_too_many_comparisons_at_the_threshold_are_no_verification() -> None:
    def net(tape: Tape, x: Tensor) -> Tensor:
        v, out = torch.zeros(4, 50), []
        for t in tape.loop(range(x.size(0))):
            v = 0.9 * v + x[t] * 0.3
            out.append((v > x[t] * 0.3 * 1.9).float())
        return torch.stack(out)

    recorded = record_unrolled(net, [normal(1, 4, 50).abs().expand(2, 4, 50).contiguous()], {})
    with pytest.raises(MismatchError, match="closer to the threshold than rounding") as caught:
        check(recorded)
    undecided = caught.value.facts["undecided"]
    assert isinstance(undecided, int) and undecided >= 200
    figures = check(recorded, most_undecided=1.0)
    assert figures.undecided == undecided
    assert f"{undecided:,} undecided" in "\n".join(region_lines(figures))


def unbounded(tape: Tape, x: Tensor) -> Tensor:
    v, out = torch.zeros(4, 50), []
    for t in tape.loop(range(x.size(0))):
        v = 0.9 * v + torch.lgamma(x[t])
        out.append(v)
    return torch.stack(out)


def test_without_a_bound_eagers_own_distance_to_float64_judges() -> None:
    recorded = record_unrolled(unbounded, [normal(5, 4, 50)], {})
    figures = check(recorded)
    assert figures.without_bound == {"aten.lgamma.default"}
    assert figures.outputs[0].distance == figures.outputs[0].eager_distance > 0
    assert "no bound is known for aten.lgamma.default" in "\n".join(region_lines(figures))
    with pytest.raises(MismatchError, match="twice the original's distance to float64"):
        check(recorded, mutated(replace_constant(aten.mul.Tensor, 0.9, 0.90001)))


def test_nan_and_infinity_pass_where_the_original_has_them() -> None:
    recorded = chaotic(4)
    x = recorded.operands[-1]
    x[1, 2, 3], x[2, 0, 0] = torch.nan, torch.inf
    assert check(recorded).steps == 4
    with pytest.raises(MismatchError, match="expected nan"):
        check(
            recorded,
            lambda scan: Stepwise(
                scan, lambda t, *given: tuple(r.nan_to_num() for r in scan.body(*given))
            ),
        )


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (3, 0)])
def test_few_values(steps: int, batch: int) -> None:
    figures = check(chaotic(steps, batch))
    assert figures.thresholds == steps * batch * 100
    assert figures.undecided <= 1  # the one that starts at its threshold


def test_no_steps() -> None:
    recorded = chaotic(3)
    graph = roll_loops(recorded.graph).graph
    [call] = [node for node in graph.graph.nodes if node.op == "call_module"]
    call.args = (0, *call.args[1:])
    graph.recompile()
    [figures] = check_regions(graph, with_regions(graph), recorded.operands)
    assert figures.steps == figures.thresholds == 0


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    check(chaotic(3), progress=lambda *state: told.append(state))
    assert told == [("scan_0", step, 3) for step in (1, 2, 3)]
