"""What a backend is: IR to text, text to a binary, a binary to something that can be called.

Only ``load`` needs the machine that the code is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from sparsify import ir
from sparsify.codegen.native_call import Repeater
from sparsify.codegen.outer_product import OuterProducts
from sparsify.errors import Refusal
from sparsify.weight_pattern import Pattern

MemoryLevel = Literal["cache", "hbm", "l2", "shared"]
Meeting = Literal["threads", "block", "cluster", "grid"]


@dataclass(frozen=True)
class Source:
    """Generated code. ``entry`` is the function to call.

    ``title`` says what of the model it computes, to profilers and in reports of faults.
    """

    text: str
    filename: str
    entry: str
    title: str = ""


@dataclass(frozen=True)
class Binary:
    """A compiled Source and what it was rendered from."""

    path: Path
    source: Source
    kernel: ir.Kernel
    schedule: ir.Schedule


@dataclass(frozen=True)
class Workload:
    """The sizes of one call, and what is sparse in it.

    ``activity`` is the share of active senders of each Gather, or of wanted sums where one is
    restricted. ``patterns`` are those of weights, by name: one that has none gains by no layout.
    """

    steps: int
    batch: int
    activity: Mapping[str, float]
    patterns: Mapping[str, Pattern] = field(default_factory=dict)


@dataclass(frozen=True)
class GatherWork:
    """What one Gather takes of a ``Cost``."""

    weight_bytes: float
    event_adds: float = 0.0
    dense_macs: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What one call is predicted to do, summed over steps and batch rows.

    ``weight_bytes`` are the bytes of weight rows touched, ``event_adds`` the additions (or multiply
    and add pairs) of event gathers, ``dense_macs`` the fused products of dense gathers,
    ``pointwise`` the neuron updates, ``barriers`` the points where all that ``meets`` says wait for
    each other. The work can be divided among ``parts`` threads of a processor, or blocks of a GPU.
    ``weights_from`` is the memory that ``weight_bytes`` are read from, ``other_bytes`` what is read
    and written once: operands, outputs, and weights that then stay where they are. ``waits`` counts
    how often the first weight of a sum has to arrive before anything goes on. ``clocks`` are those
    that the busiest part takes whatever it reads: instructions, and latencies one after the other;
    0 where nobody has counted them; in ``hidden_clocks`` of them other rows wait for a barrier.
    ``resident_bytes`` are those of all weights that a step may touch; ``is_divided`` if each part
    has its own of them. ``gathers`` are what Gathers take that run one after the other, if that is
    known: memory is waited for where it is read. ``gathers_beside`` are those that threads without
    a part of the work run at the same time, and others where they would have to wait.
    """

    weight_bytes: float
    event_adds: float
    dense_macs: float
    pointwise: float
    barriers: float
    parts: int = 1
    weights_from: MemoryLevel = "cache"
    meets: Meeting = "threads"
    other_bytes: float = 0.0
    waits: float = 0.0
    launches: int = 1
    clocks: float = 0.0
    hidden_clocks: float = 0.0
    resident_bytes: float = 0.0
    is_divided: bool = False
    gathers: tuple[GatherWork, ...] = ()
    gathers_beside: tuple[GatherWork, ...] = ()


def describe_kernel(kernel: ir.Kernel) -> str:
    """What of the model a kernel computes: its weights, and the first line that it came from."""
    weights = ", ".join(dict.fromkeys(w.note or w.name for w in kernel.weights))
    parts = [f"with {weights}"] if weights else []
    parts += [f"from {kernel.origin[0]}"] if kernel.origin else []
    return " ".join((kernel.name, *parts))


class Launchable(Protocol):
    """A kernel that can be called."""

    kernel: ir.Kernel
    schedule: ir.Schedule

    def __call__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, torch.Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run the kernel. Operands have axes in the order T, B, N; weights are ``[R, S]``.

        ``outputs`` may be preallocated with any T and B strides. ``frozen`` promises that the
        weights have not changed since the last call.
        Raises ValueError or TypeError for tensors that do not fit the kernel.
        """

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        """Per Gather, how many senders were active and how many there were, over all calls.

        Of restricted ones, how many sums were wanted and how many there were.
        """

    def reset_events(self) -> None: ...


class Repeatable(Protocol):
    """What some Launchables are, too."""

    def repeat(
        self,
        tensors: Sequence[torch.Tensor],
        steps: int,
        batch: int,
        frozen: bool,
        unread: frozenset[int] = frozenset(),
    ) -> list[torch.Tensor] | None:
        """A call like an earlier one, made in less time: the kernel's outputs, in its order.

        None where there was none of these sizes, or with tensors of other layouts. ``tensors`` are
        operands and weights in the kernel's order; ``frozen`` is as in ``Launchable``. Outputs of
        the numbers ``unread`` may hold anything, and be the same tensors in other calls.
        """

    def repeater(
        self,
        tensors: Sequence[torch.Tensor],
        steps: int,
        batch: int,
        places: Sequence[tuple[int, int]],
        returned: Sequence[int],
        unread: frozenset[int],
    ) -> tuple[Repeater, int] | None:
        """What makes calls like one that was made natively, and how many before it is asked for
        anew; see ``Prepared.repeater``.
        """


class Strategy(Protocol):
    """Decides the skeleton of loops: who shares neurons, batch rows and time."""

    name: str

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None: ...

    def tile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> int:
        """How many receivers a tile has, in which the weights are packed."""

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str: ...

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        """The cost of a call."""


class Backend(Protocol):
    """Seven questions, asked in this order, and how long a kernel is expected to take."""

    @property
    def name(self) -> str: ...

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        """In the order in which a tie is decided."""

    @property
    def outer_products(self) -> OuterProducts:
        """What computes gradients of weights."""

    @property
    def eager(self) -> Literal["cpu", "cuda"]:
        """Whose rounding of torch's operations its kernels follow."""

    @property
    def is_timed(self) -> bool:
        """False where times tell nothing: of an emulator."""

    def why_unavailable(self) -> Refusal | None:
        """Why nothing can run here, as far as is known without compiling."""

    def is_at_hand(self) -> bool:
        """Whether ``why_not_ready`` has nothing to compile."""

    def why_not_ready(self) -> Refusal | None:
        """Compile and load what all kernels need beside their own code; why that fails."""

    def libraries(self, schedules: Iterable[ir.Schedule]) -> Sequence[Callable[[], object]]:
        """What makes what only some of these need, else made when it is met; may raise CompileError
        and BackendUnavailable.
        """

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None: ...

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Source: ...

    def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary: ...

    def load(self, binary: Binary) -> Launchable: ...

    def seconds(self, cost: Cost) -> float:
        """How long a call of this cost is predicted to take."""
