"""Strategy: loops whose neurons tell their events to tensor cores, see ``event_tiles.cuh``.

Blocks share neurons as in ``neurons-per-grid``, and tell each other who is active. What they hear
is not sorted into lists but put where its sender is, in tiles of eight batch rows and all senders;
sums are products of these with the weights of a block, most of which stay in registers. So a step
takes as long for many events as for few, until they fill more than a line of mail. Nobody waits at
a barrier: mail says in which round it was sent, see ``flagged_mail.cuh``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.device import Limits
from sparsify.codegen.cuda.event_tile_clocks import cycle_of_tiles
from sparsify.codegen.cuda.event_tile_shape import tile_shapes
from sparsify.codegen.cuda.event_tile_text import EventTileKernel, EventTileText
from sparsify.codegen.cuda.find_shape import USUAL_ACTIVITY, USUAL_BATCH, Pace, pace_of
from sparsify.codegen.cuda.neurons_per_block import TOGETHER_IN_GRID, NeuronsPerGrid
from sparsify.codegen.cuda.team_clocks import StepClocks
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_memory import is_binary
from sparsify.codegen.cuda.team_shape import WARP, Shape
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.cuda.tile_parts import why_not_tiles
from sparsify.codegen.usage import Usage, find_usage
from sparsify.errors import Refusal
from sparsify.scalars.halves import HALVES


class EventTiles(NeuronsPerGrid):
    """The blocks of a grid, with products of their events on tensor cores."""

    name = "event-tiles"
    stand_in = "plain products stand for those of tensor cores"

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = why_not_tiles(kernel, schedule, self.limits)
        if refusal is not None:
            return refusal
        reason = _why_not_told(find_usage(kernel, schedule))
        if reason:
            return Refusal("unsupported-layout", reason, "Choose neurons-per-grid or dense-tiles.")
        return super().why_not(kernel, schedule) or self._why_not_width(kernel, schedule)

    def _why_not_width(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        (width,) = self.shape(kernel, schedule).slices.values()
        if width <= WARP:
            return None
        reason = f"A block would own {width} neurons of kernel {kernel.name!r}; mail names {WARP}."
        return Refusal("unsupported-layout", reason, "Choose neurons-per-grid.")

    def team(self, kernel: ir.Kernel, schedule: ir.Schedule) -> TeamKernel:
        return EventTileKernel(kernel, schedule, self.together)

    def text(self, team: TeamKernel, shape: Shape) -> TeamText:
        return EventTileText(team, shape)

    def shape(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Shape:
        return _quickest(kernel, schedule, self.limits, self.most_blocks)

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        """Blocks meet before they begin with some rows; all else of a step is among the clocks."""
        cost = super().predict(kernel, schedule, workload)
        meetings = cost.barriers / max(1, workload.steps)
        return replace(
            cost, dense_macs=0.0, weight_bytes=0.0, weights_from="shared", barriers=meetings
        )

    def step_clocks(
        self, team: TeamKernel, shape: Shape, pace: Pace, activity: Mapping[str, float]
    ) -> StepClocks:
        return StepClocks(cycle_of_tiles(team, shape, pace, activity))


@lru_cache(maxsize=256)
def _quickest(kernel: ir.Kernel, schedule: ir.Schedule, limits: Limits, most_blocks: int) -> Shape:
    """The shape that fits whose steps take the shortest for a usual batch; any, if none fits."""
    team = EventTileKernel(kernel, schedule, TOGETHER_IN_GRID)
    active = {gather.result: USUAL_ACTIVITY for gather in kernel.gathers}

    def clocks(shape: Shape) -> float:
        pace = pace_of(team, shape, USUAL_BATCH, limits)
        return pace.turns * cycle_of_tiles(team, shape, pace, active)

    shapes = list(tile_shapes(kernel, schedule, most_blocks))
    fitting = [s for s in shapes if team.shared_bytes(s) <= limits.shared_per_block]
    return min(fitting, key=clocks, default=shapes[0])


def _why_not_told(usage: Usage) -> str:
    """Why the neurons of a kernel do not all add up, once in a step, what they tell each other."""
    kernel, sources = usage.kernel, list(usage.sources.values())
    *before, last = kernel.phases
    is_of_state = len(sources) == 1 and sources[0].kind == ("let" if before else "state")
    if not is_of_state or len(before) > 1 or not all(_is_of_states(ph, kernel) for ph in before):
        return f"Not all sums of kernel {kernel.name!r} are those of one state, once in a step."
    if any(phase.population != last.population for phase in before):
        return f"Kernel {kernel.name!r} computes several populations."
    source, dtype = sources[0], kernel.weights[0].dtype
    if any(gather.only is not None for gather in kernel.gathers):
        return f"Tensor cores multiply whole tiles, and sums of {source.name!r} are restricted."
    if is_binary(source, usage):
        return f"{source.name!r} is told in bits, which are shorter than mail."
    if any(weight.dtype != dtype for weight in kernel.weights) or dtype not in HALVES:
        return "Weights are not all halves of one kind."
    if source.value_dtype != dtype:
        return f"{source.name!r} is {source.value_dtype}, and is multiplied with {dtype}."
    return ""


def _is_of_states(phase: ir.Phase, kernel: ir.Kernel) -> bool:
    """Whether a phase computes values of states alone, which may be done a step earlier."""
    known = {state.name for state in kernel.states}
    for statement in phase.body:
        if not isinstance(statement, ir.Let):
            return False
        if not all(isinstance(arg, ir.Const) or arg in known for arg in statement.args):
            return False
        known.add(statement.result)
    return True
