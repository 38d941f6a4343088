"""What operations make of facts about events: one line an operation.

Operations without a line make dense real values.
"""

from __future__ import annotations

import torch

from sparsify.passes.events.combine_facts import ZERO, Rule, constant
from sparsify.passes.events.keep_events import (
    absolute,
    add,
    add_product,
    blend,
    both,
    cast,
    divide,
    either,
    fill,
    gather_parts,
    invert,
    keep_zero,
    multiply,
    negate,
    overwrite,
    pad,
    power,
    same,
    scatter_value,
    square,
    subtract,
    subtract_from,
    to_integers,
)
from sparsify.passes.events.start_events import (
    choose,
    clamp,
    clamp_max,
    clamp_six,
    combine,
    compare,
    differ,
    draw,
    equal,
    fill_masked,
    keep_above,
    rectify,
    shrink,
    step,
)
from sparsify.recording.application import Application

aten = torch.ops.aten


def _overloads(rule: Rule, *names: str) -> dict[object, Rule]:
    """The rule for every overload of the operations that this torch has."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    return {getattr(packet, name): rule for packet in packets for name in packet.overloads()}


RULES: dict[object, Rule] = {
    **_overloads(compare, "gt", "ge", "lt", "le", "greater", "greater_equal", "less", "less_equal"),
    **_overloads(differ, "ne", "not_equal"),
    **_overloads(equal, "eq", "isnan", "isinf", "any", "all"),
    **_overloads(draw, "bernoulli"),
    **_overloads(rectify, "relu"),
    **_overloads(shrink, "hardshrink", "softshrink"),
    **_overloads(keep_above, "threshold"),
    **_overloads(step, "heaviside"),
    **_overloads(clamp, "clamp", "clip", "clamp_min", "hardtanh"),
    **_overloads(clamp_max, "clamp_max"),
    **_overloads(clamp_six, "relu6"),
    **_overloads(choose, "where"),
    **_overloads(fill_masked, "masked_fill"),
    **_overloads(multiply, "mul", "multiply"),
    **_overloads(divide, "div", "divide", "true_divide"),
    **_overloads(negate, "neg", "negative"),
    **_overloads(square, "square"),
    **_overloads(power, "pow"),
    **_overloads(absolute, "abs", "absolute"),
    **_overloads(keep_zero, "sqrt", "tanh", "sin", "erf", "atan", "asinh", "expm1", "log1p"),
    **_overloads(keep_zero, "silu", "gelu", "leaky_relu", "elu"),
    **_overloads(to_integers, "floor", "ceil", "trunc", "fix", "round", "sign", "sgn"),
    **_overloads(add, "add"),
    **_overloads(subtract, "sub", "subtract"),
    **_overloads(subtract_from, "rsub"),
    **_overloads(add_product, "addcmul"),
    **_overloads(blend, "lerp"),
    **_overloads(combine, "maximum", "minimum"),
    aten.max.other: combine,
    aten.min.other: combine,
    **_overloads(both, "logical_and", "bitwise_and", "__and__"),
    **_overloads(either, "logical_or", "bitwise_or", "__or__", "logical_xor", "bitwise_xor"),
    **_overloads(invert, "logical_not", "bitwise_not"),
    **_overloads(cast, "_to_copy", "to", "type_as"),
    **_overloads(same, "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze"),
    **_overloads(same, "squeeze", "view_as", "reshape_as", "t", "transpose", "permute", "movedim"),
    **_overloads(same, "select", "slice", "narrow", "index_select", "index", "gather", "flip"),
    **_overloads(same, "roll", "repeat", "expand", "expand_as", "broadcast_to", "as_strided"),
    **_overloads(same, "clone", "contiguous", "detach", "alias", "lift_fresh", "positive"),
    **_overloads(same, "unbind", "split", "split_with_sizes", "chunk", "diagonal", "unfold"),
    **_overloads(keep_zero, "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    **_overloads(same, "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"),
    **_overloads(same, "dropout", "feature_dropout"),  # in eval mode; find_events checks
    **_overloads(gather_parts, "stack", "cat", "hstack", "vstack"),
    **_overloads(overwrite, "select_scatter", "slice_scatter"),
    **_overloads(pad, "constant_pad_nd"),
    **_overloads(fill, "full", "full_like"),
    **_overloads(lambda node, operand: operand(node.args[0]), "scalar_tensor"),
    **_overloads(lambda node, operand: operand(node.args[2]), "new_full"),
    **_overloads(lambda node, operand: ZERO, "zeros", "zeros_like", "new_zeros"),
    **_overloads(lambda node, operand: constant(1, False), "ones", "ones_like", "new_ones"),
    aten.scatter.value: scatter_value,
}


def rule_of(target: object) -> Rule | None:
    """What an operation makes of facts; None for dense real values."""
    return same if isinstance(target, Application) else RULES.get(target)


# Sums: a value that is added to from step to step is soon zero nowhere.
SUMS: frozenset[Rule] = frozenset({add, subtract, subtract_from, add_product, blend})
# What these give depends on a threshold and not on how the operand came about.
STARTS: frozenset[Rule] = frozenset(
    {compare, differ, equal, draw, rectify, shrink, keep_above, step, invert, both, either}
)
