"""The passes in the order in which a recording goes through them."""

from __future__ import annotations

from sparsify.passes.expand_rnn import expand_rnn
from sparsify.passes.find_events import find_events
from sparsify.passes.roll_loops import roll_loops
from sparsify.passes.split_time import split_time

PIPELINE = (
    expand_rnn,
    roll_loops,
    find_events,
    split_time,
)
