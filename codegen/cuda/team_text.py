"""CUDA text of a team: blocks that share the neurons of the same batch rows.

A block adds up and computes the neurons of its slice, then tells the others; they meet before they
read. How they meet, and where lies what they tell, is a ``Together``.
"""

from __future__ import annotations

from sparsify.codegen.cuda.cell_text import write_cells
from sparsify.codegen.cuda.frame_text import write_call, write_head
from sparsify.codegen.cuda.neuron_text import write_inputs, write_neuron
from sparsify.codegen.cuda.struct_text import write_struct
from sparsify.codegen.cuda.team_steps import TeamSteps
from sparsify.codegen.cuda.team_weights import write_weight


class TeamText(TeamSteps):
    """One rendering of a kernel, for a team of a given shape."""

    headers: tuple[str, ...] = ("group_sums.cuh",)
    mail_headers: tuple[str, ...] = ("mail_sums.cuh",)

    def render(self, entry: str) -> str:
        w, team = self.w, self.team
        masks = ("masked_slice.cuh",) if team.kept(self.shape) else ()
        mail = self.mail_headers if self.mail.mails else ()
        headers = (self.together.header, *self.headers, *masks, *mail)
        write_head(w, self.kernel, team.schedule, team.symbols, headers)
        self._write_sizes()
        write_call(w, self.kernel, team.members(self.shape))
        for neuron in team.neurons.values():
            write_neuron(w, neuron)
        note = "What the blocks of a team tell each other."
        write_struct(w, "Told", note, team.told(self.shape))
        note = "What a block keeps in shared memory."
        write_struct(w, "Shared", note, team.shared(self.shape))
        for inputs in self.inputs.values():
            write_inputs(w, inputs, self.usage, team.symbols)
        write_cells(w, self.usage, team.symbols, team.neurons, self.inputs)
        w.line()
        w.line("}  // namespace")
        w.line()
        bounds = "__launch_bounds__(THREADS, 1)"
        with w.block(f'extern "C" __global__ void {bounds} {entry}(const Call call)'):
            self._write_set_up()
            self._write_groups()
            w.line("team.leave();")
            self.mail.write_counts()
            gathers = len(self.kernel.gathers)
            for index in range(gathers):
                w.line(f"add_count(call.active + {index}, active[{index}]);")
            w.line(f"add_row_steps(call.active + {gathers}, call.steps, call.batch);")
        return w.text()

    def _write_sizes(self) -> None:
        w, shape = self.w, self.shape
        w.line(f"constexpr int BLOCKS = {shape.blocks};", "of a team")
        for population, width in shape.slices.items():
            note = f"neurons of {population} that a block owns"
            w.line(f"constexpr int {self.team.widths[population]} = {width};", note)
        w.line(f"constexpr int ROWS = {shape.rows};", "of the batch that a team carries at once")
        w.line(f"constexpr int WARPS = {shape.warps}, THREADS = WARPS * WARP;", "of a block")
        w.line(f"typedef {self.together.type}<BLOCKS> Team;")
        self.mail.write_sizes()

    def _write_set_up(self) -> None:
        w, team = self.w, self.team
        w.line("extern __shared__ __align__(16) unsigned char shared_memory[];")
        w.line("Shared& shared = *reinterpret_cast<Shared*>(shared_memory);")
        w.line(f"Team team{self.together.arguments};")
        told = "reinterpret_cast<Told*>(call.told)[team.team]"
        w.line(f"Told& told = {'shared.told' if self.together.is_cluster else told};")
        for population, mine in team.mine.items():
            size, width = team.size(population), team.widths[population]
            w.line(f"const Slice<{size}, {width}> {mine}(team.rank);")
        self._write_weights()
        if self.kernel.gathers:
            w.line(f"unsigned long long active[{len(self.kernel.gathers)}] = {{}};")
            if not self.mail.counts_all:
                w.line("const bool counts = team.rank == 0 && lane_of() == 0;")
        meets_later = not team.meets_first and not self.together.is_cluster
        self.mail.write_begin()
        if self.shape.resident and meets_later:
            w.line("__syncthreads();", "the weights are there")

    def _write_weights(self) -> None:
        for packing in self.team.packings:
            write_weight(self.w, self.team, self.shape, packing)
