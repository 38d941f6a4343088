"""What parts of a time step take of a multiprocessor, in clocks and in instructions of a warp.

Counted, not measured: for lists, sums of groups, mail and neurons in what the assembler makes of
them for sm_90, for others in the text of slice_sums.cuh, gather.cuh and tile_sums.cuh. Latencies
are those that published measurements have for Hopper.
"""

from __future__ import annotations

from sparsify import ir
from sparsify.scalars.elementary_ops import ELEMENTARY

FUNCTIONS = {row.name for row in ELEMENTARY} | {"div"}
ISSUED = 3.2  # instructions of a multiprocessor in a clock, of 4 that it can issue
SCHEDULERS = 4  # of a multiprocessor, each of which issues for every fourth warp
L2_CLOCKS, SHARED_CLOCKS = 263, 30  # until what is asked for arrives
TOLD_BYTES = 42e9 / 1.7e9  # that arrive in a clock, while all multiprocessors ask for the same
SECTOR_BYTES = 32  # of global memory, that are read at once
WAVE_BYTES = 128  # of shared memory, that are read in a clock
SYNC_CLOCKS = 30
LIST_CLOCKS = 250  # of 256 senders: compared, counted, put in place
LIST_OF = 128  # senders, and instructions to hear and list them
BITS_LISTED, VALUES_LISTED = 110, 148
EVENT_ISSUED = 4  # its place in the list, its row of weights, where that is, what is read
FOUR_EVENTS_ISSUED, FOUR_EVENTS_CLOCKS = 12, 70  # read of the list; weights, then four additions
# Of mail, whose lists say where weights are: address, weights; two loads of lists, the loop.
MAILED_ISSUED, FOUR_MAILED_ISSUED = 2, 8
APART_ISSUED, APART_WAVES = 2, 3.5  # where a lane's weight is; of 32 that are read anywhere
GROUPS_ISSUED, GROUPS_CLOCKS = 60, 80  # until the lists of a warp are found, and sums stored
# Of a weight to a float: a shift, or HADD2.F32, see halves.h.
CONVERTED_ISSUED: dict[ir.DType, int] = {"bfloat16": 1, "float16": 1}
DENSE_ISSUED, DENSE_CLOCKS = 2, 6  # of a sender: its value is passed round, and multiplied
# Of 32 neurons: operands, states, what is told; each operation; each that is no instruction.
CELL_ISSUED, OPERATION_ISSUED, FUNCTION_ISSUED = 70, 2, 45
CELL_CLOCKS, FUNCTION_CLOCKS = 120, 60
AHEAD_ISSUED, ASKED_ISSUED = 20, 18  # of 32 neurons, and of each operand that they will read
# Of a block of 256 senders, and for each four rows; of what a warp is sent by two slices, to ask
# for it and to sort it; of the ends of 32 lists.
NUMBERED_ISSUED, NUMBERED_WORD_ISSUED, NUMBERED_CLOCKS = 90, 29, 340
ASKED_MAIL_ISSUED, SORTED_ISSUED, PADDED_ISSUED, SORTED_CLOCKS = 8, 18, 60, 100
SENT_ISSUED, SENT_WORD_ISSUED = 70, 40  # of a warp that sends mail, and of 32 neurons
SENT_RATE = 1.5  # clocks of an instruction of a warp of which nobody hides the latencies
KEPT_ISSUED = 12  # of a word of values for tensor cores: two senders; thrice that in three parts
PRODUCT_CLOCKS = 33  # of a tile, before the next one can be added to it
# Of a scheduler, for the product of 16 x 16 and 16 x 8: at 62 % of 512 multiplications in a clock,
# which is what Hopper's tensor cores reach by instructions of a warp.
TENSOR_CLOCKS = 6.5
HOP_CLOCKS = 1105  # until others see what a block has written while they ask for it: 0.65 us


def functions_of(phase: ir.Phase) -> int:
    """How many operations of a phase are no instruction."""
    operations = [s.op for s in phase.body if isinstance(s, ir.Let)]
    return sum(operation in FUNCTIONS for operation in operations)


def latency_of(phase: ir.Phase) -> int:
    """Clocks from a neuron's sums to what it tells."""
    return CELL_CLOCKS + FUNCTION_CLOCKS * functions_of(phase)
