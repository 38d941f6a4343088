"""The CUDA backend: for a GPU, or for its emulator on the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from sparsify import ir
from sparsify.check_ir import check_kernel
from sparsify.codegen.backend import Binary, Cost, Launchable, Source, describe_kernel
from sparsify.codegen.cuda.device import H100, Device, Function, Limits
from sparsify.codegen.cuda.headers import headers_for
from sparsify.codegen.cuda.launch import CudaLaunchable
from sparsify.codegen.cuda.layout_packing import source_of
from sparsify.codegen.cuda.outer_product import CudaOuterProducts
from sparsify.codegen.cuda.packing import render_packing
from sparsify.codegen.cuda.predict_cost import predict_seconds
from sparsify.codegen.cuda.rates import Rates, rates_of
from sparsify.codegen.cuda.strategies import make_strategies
from sparsify.codegen.cuda.strategy import CudaStrategy
from sparsify.codegen.outer_product import OuterProducts
from sparsify.codegen.usage import has_convolution
from sparsify.codegen.writer import Names
from sparsify.errors import Refusal


class CudaBackend:
    """Kernels for what ``device`` is. ``limits`` are those of its current device, if there is one.

    Without one, text is rendered and costs are predicted for an H100.
    """

    eager: Literal["cpu", "cuda"] = "cuda"

    def __init__(
        self, device: Device, limits: Limits | None = None, rates: Rates | None = None
    ) -> None:
        self.device, self._limits, self._given_rates = device, limits, rates

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def is_timed(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def limits(self) -> Limits:
        if self._limits is not None:
            return self._limits
        if self.device.why_unavailable() is not None:
            return H100
        return self.device.limits(torch.device(self.device.type))

    @cached_property
    def rates(self) -> Rates:
        """Those that were given or measured on the device, else the stated ones."""
        return self._given_rates or rates_of(self.limits)

    @cached_property
    def strategies(self) -> tuple[CudaStrategy, ...]:
        return make_strategies(self.limits)

    @cached_property
    def outer_products(self) -> OuterProducts:
        return CudaOuterProducts(self.device, any_size=not self.is_timed)

    def why_unavailable(self) -> Refusal | None:
        return self.device.why_unavailable()

    def is_at_hand(self) -> bool:
        return True

    def why_not_ready(self) -> Refusal | None:
        return None

    def libraries(self, schedules: Iterable[ir.Schedule]) -> Sequence[Callable[[], object]]:
        return ()

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        check_kernel(kernel)
        if has_convolution(kernel):
            reason = "Convolutions have no event kernel on CUDA."
            return Refusal("unsupported-layout", reason, "It runs as before; on the CPU it has.")
        return self._strategy(schedule).why_not(kernel, schedule)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Source:
        """The kernel's CUDA text. Raises ValueError if ``why_not`` refuses it."""
        refusal = self.why_not(kernel, schedule)
        if refusal is not None:
            raise ValueError(str(refusal))
        entry = Names().new(f"run_{kernel.name}")
        text = self._strategy(schedule).render(kernel, schedule, entry)
        return Source(text, f"{entry}.cu", entry, describe_kernel(kernel))

    def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
        """The compiled kernel, from the cache if it was compiled before."""
        source = self.render(kernel, schedule)
        kept = self._strategy(schedule).plan(kernel, schedule).kept
        packing = {render_packing(weight.dtype) for weight in kernel.weights}
        for other in packing | {source_of(one) for one in kept}:
            self._compile(other)
        return Binary(self._compile(source), source, kernel, schedule)

    def load(self, binary: Binary) -> Launchable:
        def function_on(device: torch.device) -> Function:
            source = binary.source
            return self.device.load(binary.path, source.entry, device, source.title)

        def packing_on(source: Source, device: torch.device) -> Function:
            path = self._compile(source)
            return self.device.load(path, source.entry, device, source.title)

        return CudaLaunchable(
            binary.kernel,
            binary.schedule,
            binary.source,
            self._strategy(binary.schedule).plan(binary.kernel, binary.schedule),
            self.device,
            function_on,
            packing_on,
        )

    def seconds(self, cost: Cost) -> float:
        return predict_seconds(cost, self.limits, self.rates)

    def _compile(self, source: Source) -> Path:
        """From the cache, if it was compiled before for this kind of device."""
        return self.device.compile(source, headers_for(source))

    def _strategy(self, schedule: ir.Schedule) -> CudaStrategy:
        """Raises ValueError for a name that no strategy has."""
        for strategy in self.strategies:
            if strategy.name == schedule.strategy:
                return strategy
        known = ", ".join(strategy.name for strategy in self.strategies)
        raise ValueError(f"no strategy {schedule.strategy!r}; known: {known}")
