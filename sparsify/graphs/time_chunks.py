"""A chain of loops that runs chunk after chunk of time.

What one loop of the chain hands to another exists for one chunk at a time. Kernels run any number
of steps from any state, and give the same bits in one call as in several: so does the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn

from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.scans.scan import retyped

# Of what loops hand to one another in a chunk: to compute so many takes milliseconds, beside which
# calls of some kernels do not show. They are 8 MiB of floats, or 256 KiB of bits.
CHUNK_VALUES = 2**21
GPU_CHUNK_VALUES = 2**24
# Or so many times the bytes of all weights, if that is more: every chunk reads them anew, since
# other kernels have driven them out of the caches meanwhile.
OF_WEIGHTS = 2
COPIED_BYTES = 2**20  # to copy so much of a y takes as long as to tell a kernel where it belongs

Body = Callable[..., tuple[Any, ...]]


def code_of(graph: fx.GraphModule) -> str:
    """The Python of ``graph``, and of what the chains in it run for every chunk."""
    texts = [str(graph.code)]
    for name, module in graph.named_children():
        if isinstance(module, TimeChunks):
            texts.append(f"# {name}, for the steps of a chunk of time{module.body.code}")
    return "\n\n".join(texts)


@dataclass(frozen=True)
class Handed:
    """How much loops hand to one another a step, where ``role[index]`` has ``numel`` elements.

    They read ``weight_bytes`` of weights.
    """

    values: int
    nbytes: int
    weight_bytes: int
    role: Literal["carry", "x"]
    index: int
    numel: int

    def chunk_length(self, carries: Sequence[Tensor], xs: Sequence[Tensor]) -> int:
        """How many steps a chunk has in a call with these operands."""
        known = (carries if self.role == "carry" else xs)[self.index]
        now = known.numel() if self.role == "carry" else known.numel() // max(1, len(known))
        most = self.most_bytes(known.is_cpu)
        return max(1, most * self.numel // (self.nbytes * max(1, now)))

    def most_bytes(self, on_cpu: bool = True) -> int:
        """What is handed on in a chunk takes no more than this, or is that of one step."""
        values = CHUNK_VALUES if on_cpu else GPU_CHUNK_VALUES
        return max(values * self.nbytes // self.values, OF_WEIGHTS * self.weight_bytes)


class Executors(NamedTuple):
    """Of a ``body``: for all steps at once, for the first chunk, and for later ones of a call.

    ``into`` is as ``again``, and takes tensors behind the consts that it may write ys to.
    """

    once: Body
    first: Body
    again: Body
    into: Body | None = None

    @staticmethod
    def of(body: Body) -> Executors:
        """The same for all of them."""
        return Executors(body, body, body)


class TimeChunks(nn.Module):
    """Runs ``body`` for all steps, so that it never has more than a chunk of what it hands on.

    ``body(steps, *carries, *xs, *consts)`` returns ``(final carries..., ys..., sources...)`` of
    these steps. ``forward`` returns the final carries, the ys of all steps, and of each source the
    step that ``picks`` says, which counts from the end if it is negative.
    """

    def __init__(self, body: fx.GraphModule, carries: int, ys: int, handed: Handed) -> None:
        super().__init__()
        self.body, self.carries, self.ys, self.handed = body, carries, ys, handed
        self.has_products = any(product_operand(n) is not None for n in body.graph.nodes)

    def forward(
        self,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        picks: Sequence[int] = (),
    ) -> tuple[Tensor, ...]:
        return self.run(Executors.of(self.body), steps, carries, xs, consts, picks)

    def run(
        self,
        executors: Executors,
        steps: int,
        carries: Sequence[Tensor],
        xs: Sequence[Tensor],
        consts: Sequence[Tensor],
        picks: Sequence[int] = (),
        *,
        length: int | None = None,
    ) -> tuple[Any, ...]:
        """``forward`` by ``executors``; ``length`` is a chunk's if bytes are not to decide it."""
        length = length or self.handed.chunk_length(carries, xs)
        # A step that there is none of fails in the end, as it does in the model.
        if length >= steps or not all(-steps <= at < steps for at in picks):
            values = executors.once(steps, *carries, *xs, *consts)
            return self._with_picked(values, picks) if picks else values
        now, run = tuple(carries), executors.first
        whole: list[Tensor] = []
        picked: list[Tensor | None] = [None for _ in picks]
        for start in range(0, steps, length):
            stop = min(start + length, steps)
            places = [y[start:stop] for y in whole]
            given = (stop - start, *now, *[x[start:stop] for x in xs], *consts)
            most = max((place.nbytes for place in places), default=0)
            if executors.into is not None and most > COPIED_BYTES:
                values = executors.into(*given, *places)
            else:
                values = run(*given)
            run, now = executors.again, values[: self.carries]
            ys = values[self.carries : self.carries + self.ys]
            sources = values[self.carries + self.ys :]
            del values, given
            if not whole:
                whole = [y.new_empty((steps, *y.shape[1:])) for y in ys]
                places = [y[start:stop] for y in whole]
            for y, place in zip(ys, places, strict=True):
                if y is not place:
                    place.copy_(y)
            for index, (source, at) in enumerate(zip(sources, picks, strict=True)):
                if start <= at % steps < stop:
                    picked[index] = source[at % steps - start].clone()
            del ys, sources  # before the next ones are made
        return (*now, *whole, *picked)

    def with_body(self, body: fx.GraphModule) -> TimeChunks:
        """The same with other executors of its loops."""
        return TimeChunks(body, self.carries, self.ys, self.handed)

    def retyped(self, dtype: torch.dtype, source: torch.dtype = torch.float32) -> TimeChunks:
        """The same computing in ``dtype`` instead of ``source``; without kernels."""
        return self.with_body(retyped(self.body, dtype, source))

    def extra_repr(self) -> str:
        return f"carries={self.carries}, ys={self.ys}, bytes_a_step={self.handed.nbytes}"

    def _with_picked(self, values: tuple[Any, ...], picks: Sequence[int]) -> tuple[Any, ...]:
        given, sources = values[: -len(picks)], values[-len(picks) :]
        pairs = zip(sources, picks, strict=True)
        return (*given, *[None if source is None else source[at] for source, at in pairs])
