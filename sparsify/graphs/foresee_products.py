"""Which gradients a differentiated graph will compute by itself: they are compiled ahead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from sparsify.codegen.cpp.convolution_gradient import why_no_kernel
from sparsify.codegen.cpp.event_sum import SMALL_PRODUCT
from sparsify.codegen.cpp.foreseen_convolution import ForeseenConvolution
from sparsify.codegen.cpp.sender_gradient import why_no_senders
from sparsify.codegen.outer_product import VALUES, Foreseen, source_type
from sparsify.graph_meta import TensorInfo
from sparsify.regions.chunked_scan import ChunkedScan
from sparsify.regions.convolution_backward import ReadGradient, WeightGradient
from sparsify.regions.outer_product import OuterProduct
from sparsify.regions.trained_region import TrainedRegion


def foresee_products(graph: fx.GraphModule) -> Iterator[Foreseen | ForeseenConvolution]:
    """The products of events in ``graph`` and in the gradients of its TrainedRegions."""
    modules = dict(graph.named_children())
    for node in graph.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, TrainedRegion):
            yield from foresee_products(module.backward)
        elif isinstance(module, ReadGradient):
            yield from _foreseen_senders(module, *node.args)
        elif isinstance(module, (OuterProduct, WeightGradient)):
            d, activation = node.args
            yield from _foreseen(module, d.meta["val"], d.meta["val"].shape, activation)
        elif isinstance(module, ChunkedScan):
            steps, *_, activations = node.args
            for product, read, activation in zip(
                module.products, module.reads, activations, strict=True
            ):
                of_step = module.scan.results[module.scan.carries + read].meta["val"]
                yield from _foreseen(product, of_step, (steps, *of_step.shape), activation)


def likely_products(tensors: Iterable[Tensor]) -> list[Foreseen]:
    """What gradients of a call with these arguments and weights may need, before it is recorded.

    Spikes of a loop are kept as values or as bits.
    """
    given = list(tensors)
    rows = max((t.shape[:-1].numel() for t in given if not t.requires_grad), default=0)
    weights = [t for t in given if t.requires_grad and t.dim() > 1 and t.is_floating_point()]
    return [
        Foreseen(rows, len(weight), weight[0].numel(), weight.dtype, weight.dtype, packed)
        for packed in (False, True)
        for weight in weights
    ]


def _foreseen(
    product: nn.Module, d: TensorInfo, shape: tuple[int, ...], activation: Any
) -> Iterator[Foreseen | ForeseenConvolution]:
    if not isinstance(product, (OuterProduct, WeightGradient)) or not product.event:
        return
    *_, values = (activation,) if isinstance(activation, fx.Node) else activation
    info = values.meta["val"]
    if isinstance(product, WeightGradient):
        convolution = product.gradient.convolution
        macs = math.prod(shape) * convolution.taps
        if d.dtype in VALUES and macs >= SMALL_PRODUCT and not why_no_kernel(convolution):
            source = source_type(info.dtype, d.dtype, product.packed)
            yield ForeseenConvolution(convolution, VALUES[d.dtype], source, macs)
        return
    packed = product.senders is not None
    senders = info.shape[-1] if product.senders is None else product.senders
    yield Foreseen(math.prod(shape[:-1]), shape[-1], senders, d.dtype, info.dtype, packed)


def _foreseen_senders(
    gradient: ReadGradient, d: fx.Node, _: fx.Node, z: fx.Node | None, only: fx.Node | None = None
) -> Iterator[ForeseenConvolution]:
    """Where all senders are wanted, kernels compute the gradients of pools alone."""
    convolution, info = gradient.gradient.convolution, d.meta["val"]
    macs = math.prod(info.shape) * convolution.taps
    if info.dtype not in VALUES or macs < SMALL_PRODUCT or why_no_senders(convolution):
        return
    value = VALUES[info.dtype]
    if only is not None:
        yield ForeseenConvolution(convolution, value, None, macs)
    elif z is not None and convolution.pooling != (1, 1):
        source = source_type(z.meta["val"].dtype, info.dtype, gradient.packed)
        yield ForeseenConvolution(convolution, value, source, macs)
