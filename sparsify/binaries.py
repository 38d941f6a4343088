"""The compiled kernels of one model, each compiled once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from sparsify import ir
from sparsify.codegen.backend import Backend, Binary, Launchable
from sparsify.codegen.outer_product import Foreseen
from sparsify.errors import BackendUnavailable, CompileError, Refusal


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[tuple[ir.Kernel, ir.Schedule], Binary] = {}

    def compile_all(
        self,
        wanted: Sequence[tuple[ir.Kernel, ir.Schedule]],
        products: Iterable[Foreseen] = (),
    ) -> Refusal | None:
        """Compile what is missing of these, and what all kernels need, on all cores.

        Returns why nothing can run here, if so. Raises CompileError.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        # What takes longest comes first, so that all cores end together.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            libraries = self.backend.libraries(schedule for _, schedule in missing)
            others = [pool.submit(library) for library in libraries]
            ready = pool.submit(self.backend.why_not_ready)
            for product in unlike(products):
                pool.submit(self._compile_product, product)
            made = [pool.submit(self.backend.compile, *key) for key in missing]
        refusal = ready.result()
        if refusal is None:
            for other in others:
                other.result()
            self.made.update(zip(missing, (each.result() for each in made), strict=True))
        return refusal

    def load(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
        if (kernel, schedule) not in self.made:
            self.compile_all([(kernel, schedule)])
        return self.backend.load(self.made[kernel, schedule])

    def _compile_product(self, product: Foreseen) -> None:
        # Where this fails, an OuterProduct computes a dense product and says why.
        with suppress(BackendUnavailable, CompileError):
            self.backend.outer_products.compile(product)


def unlike(products: Iterable[Foreseen]) -> list[Foreseen]:
    """Of products that one kernel computes the largest."""
    ordered = sorted(products, key=lambda each: each.multiplications)
    return list({(each.d, each.activity, each.packed): each for each in ordered}.values())
