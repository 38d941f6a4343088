"""What parts of a time step take of a multiprocessor, in clocks and in instructions of a warp.

Counted from the text of slice_sums.cuh, group_sums.cuh, exchange.cuh, gather.cuh and tile_sums.cuh,
not measured. Latencies are those that published measurements have for Hopper.
"""

from __future__ import annotations

from sparsify import ir

ISSUED = 3.2  # instructions of a multiprocessor in a clock, of 4 that it can issue
L2_CLOCKS, SHARED_CLOCKS = 263, 30  # until what is asked for arrives
TOLD_BYTES = 42e9 / 1.7e9  # that arrive in a clock, while all multiprocessors ask for the same
WAVE_BYTES = 128  # of shared memory, that are read in a clock
SYNC_CLOCKS = 30
LIST_ISSUED, LIST_CLOCKS = 110, 250  # of 256 senders: compared, counted, put in place
EVENT_ISSUED = 2  # its place in the list, and its row of weights
FOUR_EVENTS_ISSUED, FOUR_EVENTS_CLOCKS = 3, 60  # read of the list; weights, then four additions
# Of a weight to a float: a shift, or HADD2.F32, see halves.h.
CONVERTED_ISSUED: dict[ir.DType, int] = {"bfloat16": 1, "float16": 1}
DENSE_ISSUED, DENSE_CLOCKS = 2, 6  # of a sender: its value is passed round, and multiplied
CELL_ISSUED, CELL_CLOCKS = 80, 300  # of 32 neurons: operands, some functions, what is told
KEPT_ISSUED = 12  # of a word of values for tensor cores: two senders; thrice that in three parts
PRODUCT_CLOCKS = 33  # of a tile, before the next one can be added to it
