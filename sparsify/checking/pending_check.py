"""The last word on a recording, spoken while compilers run: they need the time, it the graph."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Sequence

import torch
from torch import fx, nn

from sparsify.call_conditions import needs_grad
from sparsify.checking.check_recording import Repetition, repeat
from sparsify.errors import TraceError
from sparsify.graph_meta import TensorInfo
from sparsify.products.find_products import Product
from sparsify.recording.operations import Op, operation_of
from sparsify.recording.product_threads import MOST_SMALL
from sparsify.recording.recording import Args, Kwargs, Recording
from sparsify.thread_count import threads

# Beside compilers a check runs on fewer threads: two seconds of one core, for two runs and, of
# training, their gradients. Products that take longer have all cores for themselves.
MOST_OPERATIONS = 1e11
# What gradients need of two runs lies in memory beside what was captured for the kernels.
MOST_BYTES = 1 << 30
RUNS, TRAINED_RUNS = 2.0, 6.0  # in multiply-adds of one forward run


class PendingCheck:
    """Compares a recording with its model, once.

    ``seconds`` is then what the model took, or less if it ran on fewer threads than it would.
    """

    def __init__(self, model: nn.Module, recording: Recording, args: Args, kwargs: Kwargs) -> None:
        self._call = model, recording, args, kwargs
        self._held = recording.guard.matches(args, kwargs)
        self._repetition: Repetition | None = None
        self.seconds = 0.0
        self._has_small_products = False
        self._is_trained = needs_grad(recording.calling.operands(args, kwargs))

    def weigh(self, products: Sequence[Product]) -> None:
        """Compare them now unless it may wait; ``products`` are those of the recording."""
        if not self.is_light(products):
            self.run()
            return
        count = sum(len(product.nodes) for product in products)
        operations = math.fsum(product.operations for product in products)
        self._has_small_products = 0 < operations <= MOST_SMALL * count

    def is_light(self, products: Sequence[Product]) -> bool:
        """Whether it may run on fewer threads, and beside what is kept of the passes.

        ``products`` are those of the recording.
        """
        runs = TRAINED_RUNS if self._is_trained else RUNS
        if runs * math.fsum(product.operations for product in products) > MOST_OPERATIONS:
            return False
        return not self._is_trained or _bytes_of(self._call[1]) <= MOST_BYTES

    def run(self, compilers: int = 0) -> None:
        """Compare them unless that was done; ``compilers`` are how many cores have other work.

        Raises TraceError if the recording does not repeat the model, or passes changed its state.
        """
        if self._repetition is None:
            self._repetition = self._repeat(compilers)
        if self._repetition.differs:
            raise TraceError(f"the recording does not repeat the model: {self._repetition.differs}")

    def _repeat(self, compilers: int) -> Repetition:
        self._check_state()
        every = torch.get_num_threads()
        count = 1 if self._has_small_products else max(1, every - compilers)
        # One thread's own time is not that in which it waited for a core.
        clock = time.thread_time if compilers and count == 1 else time.perf_counter
        with threads(count):
            repetition = repeat(*self._call, clock=clock)
        # More threads would have made it faster by their number, at most.
        self.seconds = repetition.seconds * count / every
        return repetition

    def _check_state(self) -> None:
        """Raise TraceError if the model's own backward, which passes trace, changed Python state.

        What it changes when it runs in the check is found there.
        """
        _, recording, args, kwargs = self._call
        if self._held and not recording.guard.matches(args, kwargs):
            changed = recording.guard.explain(args, kwargs)
            raise TraceError(f"its backward changes Python state: {changed}")


def _bytes_of(recording: Recording) -> int:
    """What all results of operations take together, about; views take nothing."""
    made = (node.meta.get("val") for node in recording.graph.graph.nodes if not _is_view(node))
    infos = (info for info in made if isinstance(info, TensorInfo))
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, Op):
        return node.op == "placeholder" or node.target is operator.getitem
    return operation_of(node.target).is_view
