"""The compiled kernels of one model, each compiled once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

from sparsify import ir
from sparsify.codegen.backend import Backend, Binary, Launchable
from sparsify.codegen.outer_product import Foreseen
from sparsify.errors import BackendUnavailable, CompileError, Refusal

CACHED_SECONDS = 0.1  # what is in the cache is there by then; what is not takes longer
Meanwhile = Callable[[int], object]  # is told how many compilers run beside it


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[tuple[ir.Kernel, ir.Schedule], Binary] = {}
        self._ready: Future[Refusal | None] | None = None
        self._early: dict[object, Future[None]] = {}

    def begin(self, likely: Iterable[Foreseen] = ()) -> bool:
        """Begin with what all kernels need, then products that are ``likely``, with one compiler.

        False if there is nothing to compile. What is not begun when ``compile_all`` is called is
        left to it.
        """
        with _at_once(1) as pool:
            self._ready = pool.submit(self.backend.why_not_ready)
            self._early = {
                _kind(product): pool.submit(self._compile_product, product)
                for product in unlike(likely)
            }
        wait(self._begun, timeout=CACHED_SECONDS)
        return self.is_compiling

    @property
    def is_compiling(self) -> bool:
        """Whether a compiler runs that ``begin`` has begun."""
        return not all(future.done() for future in self._begun)

    @property
    def _begun(self) -> list[Future[Any]]:
        return [*([self._ready] if self._ready else []), *self._early.values()]

    def compile_all(
        self,
        wanted: Sequence[tuple[ir.Kernel, ir.Schedule]],
        products: Iterable[Foreseen] = (),
        meanwhile: Meanwhile | None = None,
    ) -> Refusal | None:
        """Compile what is missing of these, and what all kernels need, on all cores.

        ``meanwhile`` runs beside the compilers, and nothing more is compiled if it raises. Returns
        why nothing can run here, if so. Raises CompileError.
        """
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        # What takes longest comes first, so that all cores end together.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            early = {kind: made for kind, made in self._early.items() if not made.cancel()}
            libraries = self.backend.libraries(schedule for _, schedule in missing)
            others = [pool.submit(library) for library in libraries]
            ready = self._ready or pool.submit(self.backend.why_not_ready)
            outer = [
                early.get(_kind(product)) or pool.submit(self._compile_product, product)
                for product in unlike(products)
            ]
            made = [pool.submit(self.backend.compile, *key) for key in missing]
            if meanwhile is not None:
                _run_beside(meanwhile, pool, [*others, ready, *outer, *made])
        self._ready, self._early = None, {}
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


def _run_beside(
    work: Meanwhile, pool: ThreadPoolExecutor, compiling: Sequence[Future[Any]]
) -> None:
    """Run ``work`` while the pool is ``compiling``."""
    running = wait(compiling, timeout=CACHED_SECONDS).not_done
    try:
        work(len(running))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextmanager
def _at_once(compilers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that nobody waits for."""
    pool = ThreadPoolExecutor(max_workers=compilers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)


def unlike(products: Iterable[Foreseen]) -> list[Foreseen]:
    """Of products that one kernel computes the largest."""
    ordered = sorted(products, key=lambda each: each.multiplications)
    return list({_kind(each): each for each in ordered}.values())


def _kind(product: Foreseen) -> object:
    """What a kernel for it depends on: bits are bits, whatever they are kept in."""
    return product.d, None if product.packed else product.activity
