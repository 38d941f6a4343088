"""What CUDA kernels do for a weight of a layout, in additions or products of dense rows.

Instructions are counted from the text of masked_rows.cuh and kept_runs.cuh, not measured. Those
of a warp are for 32 weights; a multiprocessor issues 3.2 in a clock, in which it adds 64 weights
of dense rows and multiplies 96 (see ``Rates``).
"""

from __future__ import annotations

import math

from sparsify import ir
from sparsify.codegen.cuda.step_clocks import L2_CLOCKS, SHARED_CLOCKS
from sparsify.codegen.layout_costs import Access, Reading
from sparsify.weight_pattern import Pattern

WARP, MOST_WARPS = 32, 16  # of a block, each of which has a band of receivers
ADDS, PRODUCTS = 64 / 3.2, 96 / 3.2  # of dense rows in the time of one instruction
SECTOR = 32.0  # bytes that are read from memory at once
MASKED = 9  # instructions: mask, its bit, the bits before it, the weight, the sum
BAND = 22  # for a sender's runs in a band: how many, places, weights, the sums, the next sender
TURN = 12  # for each further 32 weights of them
# A lane reads its place, its weight and the value there, where some three lanes meet in a bank of
# shared memory; a warp waits for the fullest of its receivers.
PLACED = 12
WANTED = 26  # for a receiver, whose parts are added up
RUNS_AHEAD = 6  # senders, see gather_runs
SENDER_CLOCKS = 15  # of an addition, and until the warp sees it
PLACE_BYTES = {"event": 1.0, "product": 2.0}


def read_layout(layout: ir.Layout, pattern: Pattern, access: Access) -> Reading:
    """Each batch row reads for itself."""
    element, places = access.element, max(1, access.places)
    unit = PRODUCTS if access.is_product else ADDS
    if layout.kind == "dense-rows":
        return Reading(1.0, float(element))
    if layout.kind == "masked-rows":
        return Reading(MASKED * unit / WARP, _of_sectors(pattern.density, element) + 1 / 8)
    if access.is_product:
        filled = pattern.density
        beside = WANTED / places
        each = element + PLACE_BYTES["product"]
        return Reading((filled * PLACED / WARP + beside) * unit, filled * each)
    width = layout.width if layout.kind == "block-rows" else 1
    filled = pattern.density if width == 1 else pattern.run_density.get(width, 1.0)
    bands = min(MOST_WARPS, -(-places // WARP))
    further = max(0.0, filled - WARP * bands / places)
    instructions = BAND * bands / places + further * TURN / WARP
    read = filled * (element + PLACE_BYTES["event"] / width)
    begun = 1.5 * SECTOR * bands / places  # what is read of sectors beside, in each band
    return Reading(instructions * unit, read + begun)


def event_clocks(layout: ir.Layout, ahead: int) -> float:
    """Until an event is added, of which the weights of ``ahead`` are asked for at once.

    Of what is kept, a mask or the number of runs arrives first. A sender's runs are added to shared
    memory before those of the next one.
    """
    if layout.kind == "dense-rows":
        return L2_CLOCKS / ahead
    if layout.kind == "masked-rows":
        return 2 * L2_CLOCKS / ahead
    return 2 * L2_CLOCKS / RUNS_AHEAD + SHARED_CLOCKS + SENDER_CLOCKS


def _of_sectors(share: float, element: int) -> float:
    """Bytes that are read of 32 places, for each of them: whole sectors."""
    least = 1.0 - math.exp(-WARP * share)  # of the sectors one at least is read
    return min(float(element), share * element + least * SECTOR / 2 / WARP)
