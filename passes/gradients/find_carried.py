"""Find what a gradient may read of a loop's ys instead of saving it once more.

Before, where ``y`` is carried to the next step, and returned::

    y_T, y, kept = forward(T, (y_0,), (x,), (w,))     # kept: what every step starts with

After, since ``kept`` is ``y_0`` followed by ``y``::

    y_T, y = forward(T, (y_0,), (x,), (w,))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from sparsify.passes.gradients.joint_graph import JointGraph
from sparsify.passes.gradients.save_values import is_binary


def find_carried(
    joint: JointGraph, saved: Iterable[fx.Node], private: Collection[int]
) -> dict[fx.Node, tuple[int, int]]:
    """Which of ``saved`` are carries, and which y among results ``private`` they are a step later.

    Binary values are not among them: they are saved as bits.
    """
    scan = joint.scan
    if scan.reverse:
        return {}
    found: dict[fx.Node, tuple[int, int]] = {}
    carries = {joint.operands["carry", index]: index for index in range(scan.carries)}
    for node in saved:
        if node not in carries or is_binary(node):
            continue
        value = joint.values.get(scan.results[carries[node]])
        for index in sorted(private):
            result = scan.results[index]
            is_same = joint.values.get(result) is value and not is_binary(result)
            if value is not None and index >= scan.carries and is_same:
                found[node] = carries[node], index
    return found
