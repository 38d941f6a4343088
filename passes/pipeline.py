"""The passes in the order in which a recording goes through them."""

from __future__ import annotations

from torch import fx

from sparsify.passes.events.find_events import find_events
from sparsify.passes.hoisting.hoist_draws import hoist_draws
from sparsify.passes.hoisting.part_norms import part_norms
from sparsify.passes.hoisting.scale_norms import scale_norms
from sparsify.passes.hoisting.set_apart import set_apart
from sparsify.passes.hoisting.split_time import split_time
from sparsify.passes.loops.complete_parts import complete_parts
from sparsify.passes.loops.frame_step import frame_step
from sparsify.passes.loops.join_growth import join_growth
from sparsify.passes.loops.read_delays import read_delays
from sparsify.passes.loops.read_single_parts import read_single_parts
from sparsify.passes.loops.roll_loops import roll_loops
from sparsify.passes.loops.single_results import single_results
from sparsify.passes.loops.write_sums import write_sums
from sparsify.passes.nodes.result import Pass, PassResult
from sparsify.passes.products.look_up_products import look_up_products
from sparsify.passes.products.scan_products import scan_products
from sparsify.passes.products.split_gates import split_gates
from sparsify.passes.products.split_operands import split_operands
from sparsify.passes.products.unify_products import unify_products
from sparsify.passes.products.write_reductions import write_reductions
from sparsify.passes.recurrent_layers.expand_rnn import expand_rnn
from sparsify.passes.recurrent_layers.write_cells import write_cells


def split_products(gm: fx.GraphModule) -> PassResult:
    """Split in time with every product outside of recurrences computed for all steps at once.

    ``scan_products`` then takes those of events into the loop that reads them, or runs them as
    kernels over all rows of all steps.
    """
    return split_time(gm, lambda _: True)


def scan_matrix_products(gm: fx.GraphModule) -> PassResult:
    """``scan_products`` for kernels that compute no convolutions."""
    return scan_products(gm, convolutions=False)


PIPELINE: tuple[Pass, ...] = (
    single_results,
    part_norms,
    write_cells,
    expand_rnn,
    read_single_parts,
    read_delays,
    join_growth,
    unify_products,
    write_sums,
    split_operands,
    split_gates,
    complete_parts,
    roll_loops,
    frame_step,
    hoist_draws,
    scale_norms,
    find_events,
    split_products,
    write_reductions,
    find_events,
    set_apart,
    scan_products,
    find_events,
    look_up_products,
)

WITHOUT_CONVOLUTIONS: tuple[Pass, ...] = tuple(
    scan_matrix_products if each is scan_products else each for each in PIPELINE
)
