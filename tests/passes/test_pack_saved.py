"""Bools that a gradient reads are saved as bits: same gradients, an eighth of the memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sparsify
from sparsify import ir
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.errors import Refusal
from sparsify.graph_meta import TensorInfo
from sparsify.passes.gradients import pack_saved as passes
from sparsify.passes.gradients.pack_saved import LEAST_NEURONS
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.outer_product import OuterProduct
from sparsify.saved_bits import pack_bits, unpack_bits
from sparsify.scans.differentiated import Differentiated, Operand
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan, retyped
from tests.models.spiking_net import Spiking, distance, gradients, spike_trains
from tests.models.step_bodies import BODIES, Body
from tests.models.zoo_surrogates import FastSigmoid, Window
from tests.passes.test_differentiate import differentiated, floats, own_gradients
from tests.steps import make_scan

pytestmark = pytest.mark.usefixtures("quickly_compiled")

Gradients = dict[Operand, Tensor | None]
# Bodies with bools that kernels have for all rows and neurons.
PACKED = (
    *("lif", "learnable", "scalars", "from input", "synapse", "adaptive", "feedback", "two layers"),
    *("detached", "no surrogate", "rates", "hard", "counted", "integers and masks", "one to one"),
    "maps",
)
# Bodies whose bools are saved as they are: in loops without a kernel, or without a batch.
NOT_PACKED = (
    "tied",
    "no batch",
    "kept time",
    "masked weight",
    "sums of neurons",
    "lateral",
)


def bodies(names: tuple[str, ...]) -> list[Body]:
    found = [body for body in BODIES if body.name in names]
    assert len(found) == len(names)
    return found


def plain_and_packed(
    body: Body, monkeypatch: pytest.MonkeyPatch, steps: int = 5, batch: int = 3
) -> tuple[Differentiated, Differentiated]:
    operands = body.operands(steps, batch)
    scan = make_scan(body.step, *operands.groups())
    parts = []
    for least in (LEAST_NEURONS, 1):
        monkeypatch.setattr(passes, "LEAST_NEURONS", least)
        parts.append(differentiated(scan, floats(operands), steps))
    return parts[0], parts[1]


def saved_dtypes(parts: Differentiated) -> list[torch.dtype]:
    results = parts.forward.results
    return [r.meta["val"].dtype for r in results[len(results) - parts.saved :]]


def assert_equal(got: Gradients, expected: Gradients) -> None:
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        own = got[key]
        assert gradient is not None and own is not None
        assert torch.equal(own, gradient), key


def scans_of(graph: fx.GraphModule) -> list[Scan]:
    return [module for module in graph.modules() if isinstance(module, Scan)]


@pytest.mark.parametrize(("steps", "batch"), [(5, 3), (1, 1)])
@pytest.mark.parametrize("body", bodies(PACKED), ids=lambda body: body.name)
def test_gradients_have_the_same_bits(
    body: Body, steps: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = plain_and_packed(body, monkeypatch, steps, batch)
    assert torch.bool in saved_dtypes(plain)
    assert saved_dtypes(packed) == [
        torch.uint8 if dtype is torch.bool else dtype for dtype in saved_dtypes(plain)
    ]
    operands, read = body.operands(steps, batch), range(len(plain.forward.results) - plain.saved)
    results, expected = own_gradients(plain, steps, operands, read)
    again, got = own_gradients(packed, steps, operands, read)
    assert all(map(torch.equal, results, again))
    assert_equal(got, expected)


@pytest.mark.parametrize("body", bodies(NOT_PACKED), ids=lambda body: body.name)
def test_what_kernels_cannot_pack_is_saved_as_it_is(
    body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = plain_and_packed(body, monkeypatch)
    assert torch.bool in saved_dtypes(packed)
    assert saved_dtypes(packed) == saved_dtypes(plain)


# The gradient of a convolution of the own state has no kernel.
IN_KERNELS = tuple(name for name in PACKED if name != "maps")


@pytest.mark.parametrize("body", bodies(IN_KERNELS), ids=lambda body: body.name)
def test_kernels_write_and_read_bits(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed = plain_and_packed(body, monkeypatch)
    forward = kernel_of(packed.forward)
    count = saved_dtypes(packed).count(torch.uint8)
    assert [o.dtype for o in forward.outputs].count("bits") == count
    read = 0
    for before, after in zip(scans_of(plain.backward), scans_of(packed.backward), strict=True):
        with_bools, with_bits = kernel_of(before), kernel_of(after)
        assert with_bits.phases == with_bools.phases
        dtypes = [(o.dtype, p.dtype) for o, p in zip_operands(with_bools, with_bits)]
        read += dtypes.count(("bool", "bits"))
        assert all(pair == ("bool", "bits") or pair[0] == pair[1] for pair in dtypes)
    modules = packed.backward.modules()
    read += sum(isinstance(m, OuterProduct) and m.senders is not None for m in modules)
    assert read >= count


def kernel_of(scan: Scan) -> ir.Kernel:
    lowered = lower_scan(scan, "kernel")
    assert isinstance(lowered, Lowered), lowered
    return lowered.kernel


def zip_operands(first: ir.Kernel, second: ir.Kernel) -> list[tuple[ir.Operand, ir.Operand]]:
    return list(zip(first.operands, second.operands, strict=True))


def test_small_layers_save_bools(monkeypatch: pytest.MonkeyPatch) -> None:
    [body] = bodies(("lif",))
    for least, dtype in ((7, torch.bool), (6, torch.uint8)):  # it has 6 neurons
        monkeypatch.setattr(passes, "LEAST_NEURONS", least)
        operands = body.operands(3, 2)
        scan = make_scan(body.step, *operands.groups())
        assert dtype in saved_dtypes(differentiated(scan, floats(operands), 3))


def compact(above: Tensor) -> Tensor:
    spikes: Tensor = Window.apply(above, 0.25)  # type: ignore[no-untyped-call]
    return spikes


SIZES = ((6, 3), (13, 5), (4, 7), (9, 1))  # steps and rows
HIDDEN = 70  # no multiple of eight, nor of a tile


def compiled(model: Spiking, x: Tensor) -> Any:
    """``model`` with kernels for ``x``; all gathers run the same way whatever times are like."""
    fast: Any = sparsify.sparsify(model, timing=False)
    gradients(fast, x)
    return fast


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("spike", [FastSigmoid.apply, compact])
def test_compiled_gradients_have_the_same_bits(spike: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For sizes that were recorded and for others, whose kernels are merged."""
    torch.manual_seed(0)
    model = Spiking(spike, hidden=HIDDEN)
    inputs = [spike_trains(steps, rows).float() for steps, rows in SIZES]
    monkeypatch.setattr(passes, "LEAST_NEURONS", HIDDEN + 1)
    bools = compiled(model, inputs[0])
    expected = [gradients(bools, x) for x in inputs]
    monkeypatch.setattr(passes, "LEAST_NEURONS", HIDDEN)
    bits = compiled(model, inputs[0])
    for x, wanted in zip(inputs, expected, strict=True):
        got = gradients(bits, x)
        assert len(got) == 4 and distance(got, wanted) == 0
    kernels = bits.compiled.kernels
    forward = [k.kernel for name, k in kernels.items() if "backward" not in name]
    assert ["bits" in {o.dtype for o in kernel.outputs} for kernel in forward] == [True]
    assert bits.compiled.recordings == bools.compiled.recordings == 2


def saved_by(node: Any) -> list[Tensor]:
    """What the autograd node of the loop behind ``node`` keeps."""
    while type(node).__name__ != "_TrainedScanBackward":
        node = next(before for before, _ in node.next_functions if before is not None)
    return list(node.saved_tensors)


@pytest.mark.skipif(why_no_compiler() is not None, reason="no C++ compiler")
def test_spikes_take_an_eighth_of_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "LEAST_NEURONS", HIDDEN)
    torch.manual_seed(0)
    model, x = Spiking(compact, hidden=HIDDEN), spike_trains().float()
    fast = compiled(model, x)
    result = fast(x)
    saved = saved_by(result.grad_fn)
    bits = [tensor for tensor in saved if tensor.dtype is torch.uint8]
    assert [tuple(tensor.shape) for tensor in bits] == [(6, 3, 9)] * 2
    assert not any(tensor.dtype is torch.bool for tensor in saved)
    before = torch.cat([torch.zeros(1, 3, HIDDEN), result[:-1]]) != 0
    assert any(torch.equal(unpack_bits(tensor, HIDDEN), before) for tensor in bits)


def test_loops_in_chunks_and_their_products_read_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    [body] = bodies(("feedback",))
    _, packed = plain_and_packed(body, monkeypatch)
    [chunked] = [m for m in packed.backward.modules() if isinstance(m, ChunkedScan)]
    [product] = chunked.products
    assert isinstance(product, OuterProduct)
    assert (product.event, product.senders) == (True, 6)
    assert any(node.target is unpack_bits for node in chunked.scan.body.graph.nodes)


@pytest.mark.parametrize("body", bodies(("lif", "hard")), ids=lambda body: body.name)
def test_in_another_dtype(body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification compares with: the same steps in float32."""
    operands = body.operands(5, 3, torch.float32)
    found = []
    for parts in plain_and_packed(body, monkeypatch):
        single = replace(
            parts,
            forward=parts.forward.retyped(torch.float32, torch.float64),
            backward=retyped(parts.backward, torch.float32, torch.float64),
        )
        read = range(len(parts.forward.results) - parts.saved)
        found.append(own_gradients(single, 5, operands, read)[1])
    assert_equal(found[1], found[0])
    assert {gradient.dtype for gradient in found[0].values() if gradient is not None} == {
        torch.float32
    }


def loop(step: Any, x: Tensor, y_shape: tuple[int, ...]) -> Scan:
    """A loop over ``x`` of bits; one carry ``[2, 8]`` keeps what it is."""
    info = TensorInfo.of
    graph = fx.Graph()
    carry, place = graph.placeholder("carry"), graph.placeholder("near_bits")
    carry.meta["val"], place.meta["val"] = info(torch.zeros(2, 8)), info(x)
    near = graph.call_function(unpack_bits, (place, 8))
    near.meta["val"] = info(unpack_bits(x, 8))
    result, value = step(graph, carry, near)
    result.meta["val"] = info(torch.zeros(2, 8))
    y = graph.call_function(pack_bits, (value,))
    y.meta["val"] = info(torch.zeros(y_shape, dtype=torch.uint8))
    graph.output((result, y))
    return Scan(fx.GraphModule(nn.Module(), graph), 1, 1, 0)


def chosen(graph: fx.Graph, carry: fx.Node, near: fx.Node) -> tuple[fx.Node, fx.Node]:
    return graph.call_function(torch.ops.aten.mul.Tensor, (carry, near)), near


def test_bits_of_other_axes_are_refused() -> None:
    one_row = torch.zeros(1, 1, dtype=torch.uint8)
    found = lower_scan(loop(chosen, one_row, (1, 1)), "kernel")
    assert isinstance(found, Refusal)
    assert found.code == "unsupported-layout"
    assert "The bits of near_bits are not those of steps, rows and neurons." in str(found)
    assert "Save its bools as they are." in str(found)


def test_bits_of_all_rows_are_lowered() -> None:
    rows = torch.zeros(2, 1, dtype=torch.uint8)
    kernel = kernel_of(loop(chosen, rows, (2, 1)))
    assert [o.dtype for o in kernel.operands].count("bits") == 1
    assert [o.dtype for o in kernel.outputs].count("bits") == 1


def in_maps(graph: fx.Graph, carry: fx.Node, near: fx.Node) -> tuple[fx.Node, fx.Node]:
    maps = graph.call_function(torch.ops.aten.view.default, (near, [2, 2, 4]))
    maps.meta["val"] = TensorInfo.of(torch.zeros(2, 2, 4, dtype=torch.bool))
    return graph.call_function(torch.ops.aten.mul.Tensor, (carry, near)), maps


def test_packed_results_of_other_axes_are_refused() -> None:
    rows = torch.zeros(2, 1, dtype=torch.uint8)
    found = lower_scan(loop(in_maps, rows, (2, 2, 1)), "kernel")
    assert isinstance(found, Refusal)
    assert "are not those of rows and neurons" in str(found)
