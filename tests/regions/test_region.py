from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify import ir
from sparsify.codegen.cpp.backend import CppBackend
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.regions.region import Fetch, Region
from sparsify.scans.lowered import Binding
from sparsify.scans.scan import Scan
from tests.models.looped_models import WEIGHTS, H, lif
from tests.models.neuron_models import NEURONS, channels, drive, refractory, unbatched_products
from tests.passes.test_roll_loops import assert_same
from tests.run_lowered import (
    ReferenceLaunchable,
    captured,
    lowered,
    prepared,
    scans_of,
    with_regions,
)
from tests.unrolled import Tape, dyadic, record_unrolled

W0, W1, _, _, BIAS = WEIGHTS.values()
Call = tuple[Any, ...]


def free(tape: Tape, x: Tensor) -> tuple[Tensor, ...]:
    v = z = torch.zeros(x.size(1), H)
    out = []
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, F.linear(x[t], W0, BIAS) + F.linear(z, W1))
        out.append(z)
    return torch.stack(out), v


def region_and_call(
    model: Callable[..., Any], x: Tensor, launchable: Callable[[ir.Kernel], Any]
) -> tuple[Region, Call]:
    """The Region of the model's only loop and the arguments that it is called with."""
    recorded = record_unrolled(model, [x], NEURONS)
    graph = prepared(recorded)
    [(name, scan)] = scans_of(graph).items()
    with captured(graph) as calls:
        graph(*recorded.operands)
    kernel = lowered(scan, name)
    return Region(scan, kernel, launchable(kernel.kernel)), calls[name]


@pytest.fixture
def region() -> Region:
    return region_and_call(free, drive(4), ReferenceLaunchable)[0]


@pytest.fixture
def call() -> Call:
    return region_and_call(free, drive(4), ReferenceLaunchable)[1]


def operands(steps: int, batch: int) -> Call:
    """A call of ``free``'s loop, whose input product stands before it."""
    current = dyadic(steps, batch, H)
    zeros = torch.zeros(batch, H)
    return steps, (zeros, zeros), (current,), (W1,)


def test_a_region_gives_what_its_scan_gives(region: Region, call: Call) -> None:
    got = region(*call)
    assert_same(list(got), list(region.scan(*call)))
    assert region.launchable.calls == 1  # type: ignore[attr-defined]
    assert got[-1].is_contiguous()


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 5), (7, 1), (6, 4)])
def test_other_steps_and_batch_sizes(region: Region, steps: int, batch: int) -> None:
    call = operands(steps, batch)
    assert_same(list(region(*call)), list(region.scan(*call)))
    assert region.launchable.calls == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_compute_runs_the_scan(region: Region, steps: int, batch: int) -> None:
    call = operands(steps, batch)
    assert_same(list(region(*call)), list(region.scan(*call)))
    assert region.launchable.calls == 0  # type: ignore[attr-defined]


def test_gradients_run_the_scan(region: Region) -> None:
    steps, carries, xs, _ = operands(4, 3)
    weight = nn.Parameter(W1.clone())
    results = region(steps, carries, xs, (weight,))
    assert results[0].requires_grad or results[1].requires_grad
    assert region.launchable.calls == 0  # type: ignore[attr-defined]
    with torch.no_grad():
        assert_same(list(region(steps, carries, xs, (weight,))), list(results))
    assert region.launchable.calls == 1  # type: ignore[attr-defined]


def test_operands_that_do_not_fit_are_the_scans_to_refuse(region: Region) -> None:
    steps, carries, xs, consts = operands(4, 3)
    with pytest.raises(ValueError, match="4 steps"):
        region(5, carries, xs, consts)
    with pytest.raises(RuntimeError):
        region(steps, carries, (xs[0][:, :2],), consts)
    assert region.launchable.calls == 0  # type: ignore[attr-defined]


def test_more_steps_than_are_run_are_cut_off(region: Region) -> None:
    _, carries, xs, consts = operands(6, 3)
    assert_same(list(region(4, carries, xs, consts)), list(region.scan(4, carries, xs, consts)))
    assert region.launchable.calls == 1  # type: ignore[attr-defined]


def test_one_row_serves_the_whole_batch(region: Region) -> None:
    steps, carries, xs, consts = operands(4, 3)
    one = (xs[0][:, :1],)
    assert_same(
        list(region(steps, carries, one, consts)), list(region.scan(steps, carries, one, consts))
    )
    assert region.launchable.calls == 1  # type: ignore[attr-defined]


def counted(tape: Tape, x: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    v = z = torch.zeros(x.size(1), H)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W1))
        count = count + 1
    return v, count


def test_a_carry_without_dims_comes_back_without_dims() -> None:
    start = torch.tensor(2)
    recorded = record_unrolled(counted, [drive(4), start], NEURONS)
    graph = prepared(recorded)
    with_regions(graph)
    v, count = graph(*recorded.operands)
    assert count.shape == ()
    assert_same([v, count], recorded.results)
    assert int(count) == 2 + drive(4).shape[0]


def masked(tape: Tape, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    v = z = torch.zeros(x.size(1), H)
    for t in tape.loop(range(x.size(0))):
        v, z = lif(v, x[t] + F.linear(z, W1))
        v = v * mask[:, t, None]
    return v, z


@pytest.mark.parametrize("batch", [1, 3, H], ids=["one row", "rows", "as many rows as neurons"])
def test_a_number_for_each_row_and_step_is_not_taken_for_neurons(batch: int) -> None:
    mask = (torch.arange(4 * batch).reshape(batch, 4) % 3).float() / 2
    recorded = record_unrolled(masked, [dyadic(4, batch, H), mask], NEURONS)
    graph = prepared(recorded)
    launchables = with_regions(graph)
    assert_same(list(graph(*recorded.operands)), recorded.results)
    assert [launchable.calls for launchable in launchables.values()] == [1]


def given(region: Region, role: str) -> list[Tensor]:
    tensors = region.launchable.given  # type: ignore[attr-defined]
    return [tensors[b.name] for b in region.lowered.bindings if b.role == role]


def test_a_batch_first_input_is_passed_without_a_copy(region: Region) -> None:
    steps, carries, xs, consts = operands(4, 3)
    view = xs[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not view.is_contiguous()
    assert_same(
        list(region(steps, carries, (view,), consts)),
        list(region.scan(steps, carries, (view,), consts)),
    )
    [passed] = given(region, "x")
    assert passed.data_ptr() == view.data_ptr()
    assert passed.stride() == view.stride()


def test_neurons_need_not_be_contiguous(region: Region) -> None:
    steps, carries, xs, consts = operands(4, 3)
    view = xs[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(
        list(region(steps, carries, (view,), consts)),
        list(region.scan(steps, carries, (view,), consts)),
    )


def test_weights_are_the_models_own_tensors(region: Region) -> None:
    steps, carries, xs, _ = operands(4, 3)
    weight = W1.clone()
    region(steps, carries, xs, (weight,))
    [passed] = given(region, "const")
    assert passed.data_ptr() == weight.data_ptr()


def test_a_carry_that_never_changes_is_returned_as_it_is() -> None:
    graph = torch.fx.Graph()
    v, kept, x = (graph.placeholder(name) for name in ("v", "kept", "x"))
    total = graph.call_function(torch.ops.aten.add.Tensor, (v, x))
    total = graph.call_function(torch.ops.aten.mul.Tensor, (total, kept))
    graph.output((total, kept))
    for node in (v, kept, x, total, total.args[0]):
        node.meta["val"] = torch.empty(2, H, device="meta")  # type: ignore[union-attr]
    scan = Scan(torch.fx.GraphModule({}, graph), 2, 1, 0)
    kernel = lowered(scan)
    region = Region(scan, kernel, ReferenceLaunchable(kernel.kernel))
    carries = (torch.zeros(2, H), torch.full((2, H), 0.5))
    last, same = region(3, carries, (dyadic(3, 2, H),), ())
    assert same is carries[1]
    assert torch.equal(last, scan(3, carries, (dyadic(3, 2, H),), ())[0])


@pytest.mark.parametrize(
    "model", [channels, refractory, unbatched_products], ids=lambda m: m.__name__
)
def test_other_shapes_and_dtypes_come_back_as_the_scan_has_them(model: Any) -> None:
    recorded = record_unrolled(model, [drive(3)], NEURONS)
    graph = prepared(recorded)
    with_regions(graph)
    results = graph(*recorded.operands)
    assert_same(results, recorded.results)
    for result in results:
        result.detach_()  # which torch refuses for views


def test_an_operand_is_expanded_to_the_neurons_it_serves() -> None:
    binding = Binding("gain", "x", 0, ("expand", "flatten"), lead=1, neurons=(2, 2, 2))
    operand = ir.Operand("gain", ("T", "B", "N"), "n", "float32")
    tensor = dyadic(3, 1, 2, 1, 1)
    fetched = Fetch(binding, operand)(tensor, 2, 4)
    assert torch.equal(fetched, tensor[:2].expand(2, 4, 2, 2, 2).reshape(2, 4, 8))


def test_a_region_holds_no_operands(region: Region) -> None:
    steps, carries, xs, consts = operands(4, 3)
    region.launchable = None  # type: ignore[assignment]
    watched = weakref.ref(xs[0])
    region._tensors(steps, 3, {"carry": carries, "x": xs, "const": consts})
    del xs
    gc.collect()
    assert watched() is None


# ---- compiled


@pytest.fixture(scope="module")
def backend() -> CppBackend:
    found = CppBackend()
    refusal = found.why_unavailable()
    if refusal is not None:
        pytest.skip(str(refusal))
    return found


@pytest.mark.parametrize("model", [free, channels, refractory], ids=lambda m: m.__name__)
def test_compiled_regions_give_what_eager_gives(model: Any, backend: CppBackend) -> None:
    recorded = record_unrolled(model, [drive(4)], NEURONS)
    graph = prepared(recorded)
    for name, scan in scans_of(graph).items():
        found = lower_scan(scan, name)
        gathers = tuple((g.result, "event") for g in lowered(scan, name).kernel.gathers)
        schedule = ir.Schedule("rows-per-thread", gathers)  # type: ignore[arg-type]
        kernel = lowered(scan, name)
        assert found == kernel
        binary = backend.compile(kernel.kernel, schedule)
        setattr(graph, name, Region(scan, kernel, backend.load(binary)))
    with torch.no_grad():
        assert_same(graph(*recorded.operands), recorded.results)


def test_a_changed_weight_is_seen(backend: CppBackend) -> None:
    def load(kernel: ir.Kernel) -> Any:
        gathers = tuple((g.result, "event") for g in kernel.gathers)
        schedule = ir.Schedule("rows-per-thread", gathers)  # type: ignore[arg-type]
        return backend.load(backend.compile(kernel, schedule))

    compiled, _ = region_and_call(free, drive(4), load)
    steps, carries, xs, _ = operands(4, 3)
    weight = W1.clone()
    for change in (0.0, 0.5, -0.25):
        weight.data += change
        call = (steps, carries, xs, (weight,))
        assert_same(list(compiled(*call)), list(compiled.scan(*call)))
