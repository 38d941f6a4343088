"""Strategies: blocks share the neurons of the same batch rows, for layers too large for one.

``neurons-per-grid`` has its blocks meet at a barrier in global memory, ``neurons-per-cluster`` in
clusters, whose blocks write to each other's shared memory. Weights lie in shared memory, where they
fit; several teams carry different rows side by side.
"""

from __future__ import annotations

from collections.abc import Mapping

from sparsify import ir
from sparsify.codegen.backend import Cost, Workload
from sparsify.codegen.cuda.device import H100, Grid, Limits
from sparsify.codegen.cuda.find_shape import Pace, find_shape, pace_of
from sparsify.codegen.cuda.frame_text import Scratch, packed_name
from sparsify.codegen.cuda.predict_cost import predict_cost
from sparsify.codegen.cuda.strategy import Plan, Resident, why_not_shared
from sparsify.codegen.cuda.team_clocks import StepClocks, clocks_of_step
from sparsify.codegen.cuda.team_kernel import TeamKernel
from sparsify.codegen.cuda.team_masks import why_not_layouts
from sparsify.codegen.cuda.team_names import Together
from sparsify.codegen.cuda.team_shape import Shape
from sparsify.codegen.cuda.team_text import TeamText
from sparsify.codegen.usage import find_usage, why_not_gather
from sparsify.errors import Refusal

CLUSTERS_SINCE = (9, 0)  # compute capability
COUNTER_WORDS = 64  # of the counters of a team: two lines of the second cache, see barrier.cuh
TOGETHER_IN_GRID = Together(
    type="GridTeam",
    arguments="(call.arrivals, call.patience, call.stuck)",
    header="barrier.cuh",
    scratch=(
        Scratch("told", "word", "what the blocks of each team tell each other"),
        Scratch("arrivals", "word", "of blocks at barriers, two lines for each team", zeroed=True),
        Scratch("stuck", "int64", "a block did not come to a barrier", lasting=True),
    ),
    numbers=("patience",),
)
TOGETHER_IN_CLUSTER = Together(type="ClusterTeam", arguments="", header="cluster.cuh")
PATIENCE = 1 << 25  # polls of a barrier before a block gives up, more than ten seconds


class _NeuronsPerBlock:
    """What both have in common.

    ``limits`` are those of the device that kernels are made for. A block that has asked
    ``patience`` times whether the others have come to a barrier ends the kernel.
    """

    name: str
    together: Together

    def __init__(self, limits: Limits = H100, patience: int = PATIENCE) -> None:
        self.limits, self.patience = limits, patience

    @property
    def most_blocks(self) -> int:
        """Of a team."""
        raise NotImplementedError

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        refusal = why_not_gather(kernel, schedule) or why_not_layouts(kernel, schedule)
        if refusal is not None:
            return refusal
        if not find_usage(kernel, schedule).exchanges:
            reason = f"The neurons of kernel {kernel.name!r} tell each other nothing."
            remedy = "Choose row-per-block, which has a block for each row and step."
            return Refusal("no-gain", reason, remedy)
        shape = self.shape(kernel, schedule)
        if shape.blocks > self.most_blocks:
            return Refusal(
                "unsupported-layout",
                f"{shape.blocks} blocks of {schedule.tile} neurons would share kernel "
                f"{kernel.name!r}; {self.limits.name} runs {self.most_blocks} together.",
                "Choose a larger tile, or 0.",
            )
        team = self.team(kernel, schedule)
        return why_not_shared(kernel, team.shared_bytes(shape), self.limits)

    def tile(self, kernel: ir.Kernel, schedule: ir.Schedule) -> int:
        """Neurons of the largest population that a block owns."""
        return max(self.shape(kernel, schedule).slices.values())

    def shape(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Shape:
        """The one that fits best; one that does not fit where none does."""
        return find_shape(kernel, schedule, self.together, self.limits, self.most_blocks)

    def team(self, kernel: ir.Kernel, schedule: ir.Schedule) -> TeamKernel:
        return TeamKernel(kernel, schedule, self.together)

    def text(self, team: TeamKernel, shape: Shape) -> TeamText:
        return TeamText(team, shape)

    def render(self, kernel: ir.Kernel, schedule: ir.Schedule, entry: str) -> str:
        team = self.team(kernel, schedule)
        return self.text(team, self.shape(kernel, schedule)).render(entry)

    def plan(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Plan:
        team = self.team(kernel, schedule)
        shape = self.shape(kernel, schedule)
        shared_bytes = team.shared_bytes(shape)

        def grid(steps: int, batch: int, limits: Limits, resident: Resident) -> Grid:
            held = limits.multiprocessors * resident(shape.threads, shared_bytes)
            teams = max(1, min(batch, held // shape.blocks))
            return self.grid(teams, shape, shared_bytes)

        def sizes(grid: Grid, batch: int) -> list[int]:
            teams = grid.blocks // shape.blocks
            found = [teams * team.told_bytes(shape) // 4, teams * COUNTER_WORDS, 1]
            return found[: len(self.together.scratch)]

        def numbers(grid: Grid, batch: int) -> list[int]:
            return [self.patience][: len(self.together.numbers)]

        kept = team.kept(shape)
        return Plan(team.members(shape), grid, self.together.scratch, sizes, numbers, kept)

    def grid(self, teams: int, shape: Shape, shared_bytes: int) -> Grid:
        raise NotImplementedError

    def predict(self, kernel: ir.Kernel, schedule: ir.Schedule, workload: Workload) -> Cost:
        team = self.team(kernel, schedule)
        shape = self.shape(kernel, schedule)
        pace = pace_of(team, shape, workload.batch, self.limits)
        clocks = self.step_clocks(team, shape, pace, workload.activity)
        is_resident = shape.resident >= {packed_name(p, team.symbols) for p in team.packings}
        return predict_cost(
            kernel,
            schedule,
            workload,
            limits=self.limits,
            rows_per_block=pace.rows,
            blocks=pace.teams * shape.blocks,
            weights_from="shared" if is_resident else None,
            meets="cluster" if self.together is TOGETHER_IN_CLUSTER else "grid",
            barriers_per_step=team.barriers_per_step(),
            side_by_side=pace.teams,
            step_clocks=clocks.busy,
            hidden_clocks=clocks.hidden,
        )

    def step_clocks(
        self, team: TeamKernel, shape: Shape, pace: Pace, activity: Mapping[str, float]
    ) -> StepClocks:
        return clocks_of_step(team, shape, pace.at_once, pace.halves, activity)


class NeuronsPerGrid(_NeuronsPerBlock):
    """All blocks are resident at once, and meet in global memory."""

    name = "neurons-per-grid"
    together = TOGETHER_IN_GRID

    @property
    def most_blocks(self) -> int:
        return self.limits.multiprocessors

    def grid(self, teams: int, shape: Shape, shared_bytes: int) -> Grid:
        return Grid(teams * shape.blocks, shape.threads, shared_bytes, cooperative=True)


class NeuronsPerCluster(_NeuronsPerBlock):
    """The blocks of a cluster meet in hardware, and write to each other's shared memory."""

    name = "neurons-per-cluster"
    together = TOGETHER_IN_CLUSTER

    @property
    def most_blocks(self) -> int:
        return self.limits.cluster

    def why_not(self, kernel: ir.Kernel, schedule: ir.Schedule) -> Refusal | None:
        if self.limits.capability < CLUSTERS_SINCE:
            has = ".".join(map(str, self.limits.capability))
            reason = f"Clusters need compute capability 9.0; {self.limits.name} has {has}."
            return Refusal("unsupported-layout", reason, "Choose neurons-per-grid.")
        return super().why_not(kernel, schedule)

    def grid(self, teams: int, shape: Shape, shared_bytes: int) -> Grid:
        return Grid(teams * shape.blocks, shape.threads, shared_bytes, cluster=shape.blocks)
