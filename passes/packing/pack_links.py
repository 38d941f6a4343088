"""Let loops hand spikes to one another as bits.

Before::

    v_T, z = scan_0(T, (v_0,), (x,), ())        # z: floats [T, B, N] of 0 and 1
    y = scan_1(T, (), (z,), (w,))

After, where loops that can read bits are the only readers::

    v_T, z, bits = scan_0(T, (v_0,), (x,), ())  # z: a stand-in; bits: bytes [T, B, ceil(N / 8)]
    y = scan_1(T, (), (z,), (w,), bits)         # its gradient reads them as well
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from sparsify.passes.gradients.link_loops import Reading, by_y, origin_of
from sparsify.passes.gradients.pack_saved import LEAST_NEURONS, reading_bits, writing_bits
from sparsify.passes.gradients.save_values import is_binary
from sparsify.passes.lowering.lower_layout import shape_of
from sparsify.passes.lowering.lower_scan import lower_scan
from sparsify.scans.differentiated import Differentiated
from sparsify.scans.lowered import Lowered
from sparsify.scans.scan import Scan


def find_packed(
    readings: Iterable[Reading], parts: Mapping[str, Differentiated]
) -> tuple[dict[fx.Node, list[Reading]], dict[str, Differentiated]]:
    """The ys of calls that can be bits, by their ``getitem``, with all that read them.

    Also returns ``parts`` as they write and read them.
    """
    changed, packed = dict(parts), {}
    for y, own in by_y(readings).items():
        taken = _with_bits(y, own, changed) if _can_pack(y, own, parts) else None
        if taken is not None:
            changed, packed[y] = taken, own
    return packed, changed


def _can_pack(y: fx.Node, readings: list[Reading], parts: Mapping[str, Differentiated]) -> bool:
    writer, index = origin_of(y)
    forward = parts[str(writer.target)].forward
    result = forward.results[index]
    return (
        hands_on_spikes(y, readings, forward)
        and result.meta["val"].dtype.is_floating_point
        and len(shape_of(result)) == 2
        and shape_of(result)[-1] >= LEAST_NEURONS
    )


def _with_bits(
    y: fx.Node, readings: list[Reading], parts: Mapping[str, Differentiated]
) -> dict[str, Differentiated] | None:
    """``parts`` with ``y`` as bits; None if one of them cannot, beside the bits that it has."""
    writer, index = origin_of(y)
    name, changed = str(writer.target), dict(parts)
    forward = writing_bits(parts[name].forward, {index})
    if not isinstance(lower_scan(forward, "forward"), Lowered):
        return None
    changed[name] = replace(parts[name], forward=forward)
    for reading in readings:
        reader = str(reading.reader.target)
        reads = reading_bits(changed[reader], reading.index)
        if reads is None:
            return None
        changed[reader] = reads
    return changed


def hands_on_spikes(y: fx.Node, readings: list[Reading], writer: Scan) -> bool:
    """Whether ``writer`` stacks 0 and 1 as ``y``, for ``readings`` alone."""
    call, index = origin_of(y)
    return (
        index >= writer.carries
        and [user for user in call.users if user.args[1] == index] == [y]
        and is_binary(writer.results[index])
        and is_read_by_loops_only(y, readings)
    )


def is_read_by_loops_only(y: fx.Node, readings: list[Reading]) -> bool:
    """Whether every way on from ``y`` ends at one of ``readings``, as an x and nothing else."""
    views = {view for reading in readings for view in reading.views}
    readers = {reading.reader for reading in readings}
    for value in (y, *views):
        for user in value.users:
            if user not in views and user not in readers:
                return False
            groups: Any = user.args
            if user in readers and value in (*groups[1], *groups[3]):
                return False
    return True
