"""The compiled kernels of one model, each compiled once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sparsify import ir
from sparsify.codegen.backend import Backend, Binary, Launchable


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[tuple[ir.Kernel, ir.Schedule], Binary] = {}

    def compile_all(self, wanted: Sequence[tuple[ir.Kernel, ir.Schedule]]) -> None:
        """Compile what is missing, on all cores. Raises CompileError."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            made = list(pool.map(lambda key: self.backend.compile(*key), missing))
        self.made.update(zip(missing, made, strict=True))

    def load(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
        if (kernel, schedule) not in self.made:
            self.compile_all([(kernel, schedule)])
        return self.backend.load(self.made[kernel, schedule])
