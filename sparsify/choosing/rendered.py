"""A backend of which only the text is wanted: nothing is compiled, loaded or run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from sparsify import ir
from sparsify.codegen.backend import Backend, Binary, Cost, Launchable, Source, Strategy
from sparsify.codegen.outer_product import OuterProducts
from sparsify.errors import Refusal


class Rendered:
    """Writes the kernels of ``backend`` on machines that it cannot run on."""

    is_timed = False  # nothing runs

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def name(self) -> str:
        return f"{self.backend.name} (text only)"

    @property
    def strategies(self) -> tuple[Strategy, ...]:
        return self.backend.strategies

    @property
    def outer_products(self) -> OuterProducts:
        return self.backend.outer_products

    @property
    def eager(self) -> Literal["cpu", "cuda"]:
        return self.backend.eager

    def why_unavailable(self) -> Refusal | None:
        return None

    def is_at_hand(self) -> bool:
        return True

    def why_not_ready(self) -> Refusal | None:
        return None

    def libraries(self, schedules: Iterable[ir.Schedule]) -> Sequence[Callable[[], object]]:
        return ()

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        return self.backend.why_not(kernel, schedule)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Source:
        return self.backend.render(kernel, schedule)

    def compile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Binary:
        source = self.render(kernel, schedule)
        return Binary(Path(source.filename), source, kernel, schedule)

    def load(self, binary: Binary) -> Launchable:
        return Unloaded(binary.kernel, binary.schedule)

    def seconds(self, cost: Cost) -> float:
        return self.backend.seconds(cost)


class Unloaded:
    """A kernel that is only looked at."""

    def __init__(self, kernel: ir.Kernel, schedule: ir.Schedule) -> None:
        self.kernel, self.schedule = kernel, schedule

    def __call__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        steps: int,
        batch: int,
        outputs: Mapping[str, Tensor] | None = None,
        frozen: bool = False,
    ) -> dict[str, Tensor]:
        raise RuntimeError(f"kernel {self.kernel.name!r} was rendered and not compiled")

    @property
    def events(self) -> dict[str, tuple[int, int]]:
        return {}

    def reset_events(self) -> None:
        """There are none."""
