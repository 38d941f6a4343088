"""The C++ backend: the system's compiler, ctypes, torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch

from sparsify import ir
from sparsify.check_ir import check_kernel
from sparsify.codegen import runtime
from sparsify.codegen.backend import Binary, Cost, Launchable, Source
from sparsify.codegen.cpp.cost_model import Rates, calibrate_rates
from sparsify.codegen.cpp.launch import CppLaunchable
from sparsify.codegen.cpp.outer_product import CppOuterProducts
from sparsify.codegen.cpp.strategies import STRATEGIES, find_strategy
from sparsify.codegen.plain_names import PLAIN, with_plain_names
from sparsify.codegen.toolchain import (
    ALONE,
    KERNEL_HEADERS,
    compile_shared_library,
    load_library,
    only_gcc,
    read_source,
)
from sparsify.codegen.toolchain import why_unavailable as why_no_compiler
from sparsify.codegen.writer import Names
from sparsify.errors import Refusal


class CppBackend:
    """Kernels for this machine's processor; its ``rates`` are measured when none are given."""

    name = "cpp"
    strategies = STRATEGIES
    outer_products = CppOuterProducts()
    eager: Literal["cpu", "cuda"] = "cpu"
    is_timed = True

    def __init__(self, rates: Rates | None = None) -> None:
        self._rates = rates

    def why_unavailable(self) -> Refusal | None:
        return why_no_compiler()

    def is_at_hand(self) -> bool:
        return runtime.is_at_hand()

    def why_not_ready(self) -> Refusal | None:
        return runtime.why_unavailable()

    def libraries(self, schedules: Iterable[ir.Schedule]) -> Sequence[Callable[[], object]]:
        is_any_pruned = any(schedule.layouts for schedule in schedules)
        return (runtime.load_compressing,) if is_any_pruned else ()

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        check_kernel(kernel)
        return find_strategy(schedule.strategy).why_not(kernel, schedule)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Source:
        """The kernel's C++ text. Raises ValueError if ``why_not`` refuses it."""
        refusal = self.why_not(kernel, schedule)
        if refusal is not None:
            raise ValueError(str(refusal))
        entry = _entry(kernel.name)
        text = find_strategy(schedule.strategy).render(kernel, schedule, entry)
        return Source(text, f"{entry}.cpp", entry)

    def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
        """The compiled kernel, from the cache if one was compiled that differs in names only."""
        source = self.render(kernel, schedule)
        plain = self.render(*with_plain_names(kernel, schedule))
        headers = {file: read_source(file) for file in KERNEL_HEADERS}
        options = only_gcc(*ALONE)
        path = compile_shared_library(plain.text, plain.entry, headers=headers, options=options)
        return Binary(path, source, kernel, schedule)

    def load(self, binary: Binary) -> Launchable:
        function = _function_in(binary)
        tile = find_strategy(binary.schedule.strategy).tile(binary.kernel, binary.schedule)
        return CppLaunchable(
            binary.kernel,
            binary.schedule,
            binary.source,
            function,
            runtime.load_runtime(),
            tile,
            self._function_of,
        )

    def seconds(self, cost: Cost) -> float:
        rates = self._rates or calibrate_rates()
        return rates.predict_seconds(cost, torch.get_num_threads())

    def _function_of(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Any:
        return _function_in(self.compile(kernel, schedule))


def _entry(name: str) -> str:
    return Names().new(f"run_{name}")


def _function_in(binary: Binary) -> Any:
    """What was compiled has plain names, whatever ``binary.source`` has."""
    return load_library(binary.path)[_entry(PLAIN)]
