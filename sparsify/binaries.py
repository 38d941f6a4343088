"""The compiled kernels of one model, each compiled once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sparsify import ir
from sparsify.codegen.backend import Backend, Binary, Launchable


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[tuple[ir.Kernel, ir.Schedule], Binary] = {}

    def compile_all(self, wanted: Sequence[tuple[ir.Kernel, ir.Schedule]]) -> None:
        """Compile what is missing, on all cores. Raises CompileError."""
        with self.compiling(wanted):
            pass

    @contextmanager
    def compiling(self, wanted: Sequence[tuple[ir.Kernel, ir.Schedule]]) -> Iterator[None]:
        """Compile what is missing beside the block, which ends when all is there.

        Raises CompileError. If the block raises, what has not begun is left out.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        try:
            begun = [pool.submit(self.backend.compile, *key) for key in missing]
            yield
            made = [each.result() for each in begun]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        self.made.update(zip(missing, made, strict=True))

    def load(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
        if (kernel, schedule) not in self.made:
            self.compile_all([(kernel, schedule)])
        return self.backend.load(self.made[kernel, schedule])
