"""Gathers of a team that are added up as one, because they read the same events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sparsify import ir
from sparsify.codegen.cuda.struct_text import Dim
from sparsify.codegen.cuda.team_shape import GRANULE, WARP, round_up
from sparsify.codegen.expressions import Symbols
from sparsify.codegen.predict_cost import BYTES
from sparsify.codegen.usage import Usage

MOST_APART = 2


@dataclass(frozen=True)
class Bundle:
    """Gathers of the same events for the same neurons, such as the gates of a GRU.

    Their weights lie together, as ``[sender][gather][neuron of the slice]``: a warp reads those of
    all in one access, where a slice alone would leave lanes idle. So do their sums. Columns are
    filled up to whole accesses, or the last ones lie apart.
    """

    name: str
    gathers: tuple[ir.Gather, ...]
    width: str  # the constant that is the slice
    weight_bytes: int = 4

    def columns(self, neurons: int) -> Dim:
        """Of all gathers, for so many neurons of a slice."""
        text, columns = f"{len(self.gathers)} * {self.width}", len(self.gathers) * neurons
        whole = round_up(columns, GRANULE)
        if columns == whole or self.apart(neurons):
            return text, columns
        return f"whole_columns({text})", whole

    def apart(self, neurons: int) -> int:
        """Of these, the columns behind those that groups of lanes read, 32 at once.

        Filling them up would keep a ninth lane for one column.
        """
        rest = len(self.gathers) * neurons % WARP
        return rest if self.weight_bytes == 4 and rest <= MOST_APART < neurons else 0

    def has(self, weight: str) -> bool:
        return any(gather.weight == weight for gather in self.gathers)

    def column(self, weight: str) -> str:
        """Where the columns of a weight begin, as text before another term; nothing for 0."""
        index = [gather.weight for gather in self.gathers].index(weight)
        return f"{index} * {self.width} + " if index else ""


def find_bundles(
    usage: Usage, schedule: ir.Schedule, symbols: Symbols, widths: Mapping[str, str]
) -> list[Bundle]:
    """All gathers of a phase that read one source, if all are of events and nobody shares weights.

    ``widths`` are the constants that are slices, by population.
    """
    kernel = usage.kernel
    dtypes = {weight.name: weight.dtype for weight in kernel.weights}
    readers = [gather.weight for gather in kernel.gathers]
    found = []
    for phase in kernel.phases:
        of_source: dict[str, list[ir.Gather]] = {}
        for gather in phase.gathers:
            of_source.setdefault(gather.source, []).append(gather)
        for source, gathers in of_source.items():
            events = not any(g.result in usage.dense | usage.selective for g in gathers)
            alike = len({dtypes[g.weight] for g in gathers}) == 1
            alone = all(readers.count(g.weight) == 1 for g in gathers)
            whole = all(schedule.layout_of(g.weight) == ir.DENSE_ROWS for g in gathers)
            if len(gathers) > 1 and events and alike and alone and whole:
                name = symbols.names.new(f"{symbols.values[source]}_to_{phase.population}")
                size = BYTES[dtypes[gathers[0].weight]]
                found.append(Bundle(name, tuple(gathers), widths[phase.population], size))
    return found
