"""The compiled kernels of one model, each compiled once, and equal layers together."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from sparsify import ir
from sparsify.choosing.comparisons import Comparisons
from sparsify.codegen.backend import Backend, Binary, Launchable
from sparsify.codegen.cpp.foreseen_convolution import ForeseenConvolution
from sparsify.codegen.outer_product import Foreseen
from sparsify.codegen.plain_names import with_plain_names
from sparsify.errors import BackendUnavailable, CompileError, Refusal

CACHED_SECONDS = 0.1  # what is in the cache is there by then; what is not takes longer
NICENESS = 5  # added to that of compilers beside a check: other work may leave both one core
Meanwhile = Callable[[int], object]  # is told how many compilers run beside it
Key = tuple[ir.Kernel, ir.Schedule]
AnyForeseen = Foreseen | ForeseenConvolution


class Binaries:
    """Compiles each kernel and schedule once; they are independent of sizes and of recordings."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.made: dict[Key, Binary] = {}
        self.comparisons = Comparisons()
        self._forget_begun()

    def _forget_begun(self) -> None:
        self._process = os.getpid()
        self._pool: ThreadPoolExecutor | None = None  # of what is begun before kernels are known
        self._ready: Future[Refusal | None] | None = None
        self._early: dict[object, Future[Any]] = {}
        self._begun: set[Key] = set()  # under plain names

    def _leave_to_parent(self) -> None:
        """In a forked child, forget what is begun: the threads that would end it are not here."""
        if self._process != os.getpid():
            self._forget_begun()

    def begin(self) -> None:
        """Begin with what all kernels need, unless there are kernels already."""
        self._leave_to_parent()
        if self._pool is None and not self.made:
            self._pool = ThreadPoolExecutor(max_workers=1)
            self._ready = self._pool.submit(self.backend.why_not_ready)

    def begin_likely(self, products: Iterable[AnyForeseen]) -> bool:
        """Begin also with products that are likely, with the same compiler.

        False if what all kernels need is in the cache: then few wait for so little. What is not
        begun when ``compile_all`` is called is left to it.
        """
        is_at_hand = self.backend.is_at_hand()
        self.begin()
        if self._pool is None or is_at_hand:
            return False
        for each in unlike(products):
            self._early[_kind(each)] = self._pool.submit(self._compile_product, each)
        return True

    @property
    def is_cold(self) -> bool:
        """Whether ``begin_likely`` has found the cache to be empty."""
        self._leave_to_parent()
        return bool(self._early)

    def begin_kernel(self, kernel: ir.Kernel, schedule: ir.Schedule) -> None:
        """Begin with a kernel that ``compile_all`` will be asked for."""
        self._leave_to_parent()
        if self._pool is not None:
            plain = with_plain_names(kernel, schedule)
            if plain not in self._begun:
                self._begun.add(plain)
                made = self._pool.submit(self.backend.compile, kernel, schedule)
                self._early[kernel, schedule] = made

    @property
    def is_compiling(self) -> bool:
        """Whether a compiler runs that was begun with."""
        self._leave_to_parent()
        begun: list[Future[Any]] = [*self._early.values()]
        if self._ready is not None:
            begun.append(self._ready)
        return not all(future.done() for future in begun)

    def compile_all(
        self,
        wanted: Sequence[Key],
        products: Iterable[AnyForeseen] = (),
        meanwhile: Meanwhile | None = None,
    ) -> Refusal | None:
        """Compile what is missing of these, and what all kernels need, on all cores.

        ``meanwhile`` runs beside the compilers, and nothing more is compiled if it raises. Returns
        why nothing can run here, if so. Raises CompileError.
        """
        self._leave_to_parent()
        missing = [key for key in dict.fromkeys(wanted) if key not in self.made]
        first, cores = None if meanwhile is None else _stand_back, os.cpu_count() or 1
        keeps = meanwhile is not None and cores > 1
        # What takes longest comes first, so that all cores end together.
        with (
            ThreadPoolExecutor(cores, initializer=first) as pool,
            _core_kept(pool) if keeps else nullcontext(),
        ):
            early = {kind: made for kind, made in self._early.items() if not made.cancel()}
            if keeps:  # nor does another one, while what is begun has its core
                pool.submit(wait, [*early.values(), *filter(None, [self._ready])])
            libraries = self.backend.libraries(schedule for _, schedule in missing)
            others = [pool.submit(library) for library in libraries]
            ready = self._ready or pool.submit(self.backend.why_not_ready)
            outer = [
                early.get(_kind(product)) or pool.submit(self._compile_product, product)
                for product in unlike(products)
            ]
            found = self._compile_unlike(pool, missing, early)
            made = [found[key] for key in missing]
            if meanwhile is not None:
                # Where a first compiler ran already, nothing is in the cache.
                patience = 0.0 if self.is_cold else CACHED_SECONDS
                _run_beside(meanwhile, pool, [*others, ready, *outer, *made], patience)
        wait(early.values())  # those that are not wanted must not disturb what is timed
        self.end_early()
        refusal = ready.result()
        if refusal is None:
            for other in others:
                other.result()
            self.made.update(zip(missing, (each.result() for each in made), strict=True))
        return refusal

    def end_early(self) -> None:
        """Take back what was begun with, as far as no compiler runs yet."""
        self._leave_to_parent()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._forget_begun()

    def load(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Launchable:
        if (kernel, schedule) not in self.made:
            self.compile_all([(kernel, schedule)])
        return self.backend.load(self.made[kernel, schedule])

    def _compile_unlike(
        self, pool: ThreadPoolExecutor, keys: Sequence[Key], early: dict[object, Future[Any]]
    ) -> dict[Key, Future[Any]]:
        """Compile ``keys``, of those that differ in names only the others when the first is done:
        they are in the cache then. ``early`` are those that run already.
        """
        found = {key: early[key] for key in keys if key in early}
        firsts = {with_plain_names(*key): made for key, made in found.items()}
        likes: list[tuple[Key, Future[Any]]] = []
        for key in sorted(keys, key=_statements, reverse=True):
            plain = with_plain_names(*key)
            if plain not in firsts:
                found[key] = firsts[plain] = pool.submit(self.backend.compile, *key)
            elif key not in found:
                likes.append((key, firsts[plain]))
        # No core waits for a first one as long as there is other work.
        return found | {key: pool.submit(self._compile_after, made, key) for key, made in likes}

    def _compile_after(self, first: Future[Any], key: Key) -> Binary:
        wait([first])
        return self.backend.compile(*key)

    def _compile_product(self, product: AnyForeseen) -> None:
        # Where this fails, an OuterProduct computes a dense product and says why.
        with suppress(BackendUnavailable, CompileError):
            if isinstance(product, Foreseen):
                self.backend.outer_products.compile(product)
            elif self.backend.name == "cpp":
                product.compile()


def _statements(key: Key) -> int:
    """What the time grows with that a compiler takes."""
    kernel, _ = key
    return sum(len(phase.body) for phase in kernel.phases)


@contextmanager
def _core_kept(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Inside, one worker of ``pool`` does nothing: its core is that of what runs beside the pool.

    All cores are busy until both have ended, but one thread cannot make up for what it lost.
    """
    ended = threading.Event()
    pool.submit(ended.wait)
    try:
        yield
    finally:
        ended.set()


def _stand_back() -> None:
    """Give compilers that this thread starts less of a core than what runs beside them needs."""
    with suppress(OSError):  # other systems know no priority of a thread
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _run_beside(
    work: Meanwhile,
    pool: ThreadPoolExecutor,
    compiling: Sequence[Future[Any]],
    patience: float,
) -> None:
    """Run ``work`` while the pool is ``compiling``: what it has not done after ``patience``."""
    running = wait(compiling, timeout=patience).not_done
    try:
        work(len(running))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def unlike(products: Iterable[AnyForeseen]) -> list[AnyForeseen]:
    """Of products that one kernel computes the largest."""
    ordered = sorted(products, key=lambda each: each.multiplications)
    return list({_kind(each): each for each in ordered}.values())


def _kind(product: AnyForeseen) -> object:
    """What a kernel for it depends on: bits are bits, whatever they are kept in."""
    if isinstance(product, ForeseenConvolution):
        return product.kind
    return product.d, None if product.packed else product.activity
