"""Bring a first iteration that differs into the form of the others, where that changes no bit.

Three reasons make a first iteration differ harmlessly; all are checked node by node:

- it creates the state (``if mem is None: mem = torch.zeros_like(x)``): what needs nothing of the
  loop moves in front of it;
- the state starts as a Python number (``out = 0; out = out + z``): Python computed with it, so
  operations are missing. The pattern with the number filled in must evaluate to what was recorded;
- the state starts smaller and broadcasts (``mem = torch.zeros(1)``).
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor, fx

from sparsify.passes.loops.match_iterations import Fill, FirstIteration, expands, locate
from sparsify.passes.nodes.classify_ops import draws_random, is_pointwise
from sparsify.passes.nodes.encode_nodes import Code, Number, Open, Ref, encode, head_of, shape_of

aten = torch.ops.aten
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
INDEXING = (
    aten.select.int,
    aten.slice.Tensor,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    operator.getitem,
)
MAX_MISSING_OR_EXTRA = 64


def fold_first(iterations: list[list[fx.Node]]) -> FirstIteration | None:
    """Align the first iteration with the last one. None if it computes something else."""
    if abs(len(iterations[0]) - len(iterations[-1])) > MAX_MISSING_OR_EXTRA:
        return None
    return _Folding(iterations).run()


class _Folding:
    """Walks the pattern (the last iteration) and the first iteration side by side."""

    def __init__(self, iterations: list[list[fx.Node]]) -> None:
        self.first = iterations[0]
        self.pattern = iterations[-1]
        self.own = set(self.first)
        self.members = {node for iteration in iterations for node in iteration}
        where = locate(iterations[1:])
        last = len(iterations) - 2
        self.codes = [encode(node, last, where) for node in self.pattern]
        self.before = (
            [encode(node, last - 1, where) for node in iterations[-2]] if last > 0 else None
        )
        self.where: dict[fx.Node, tuple[int, int]] = {}  # of the first iteration, in the pattern
        self.hoisted: dict[fx.Node, None] = {}
        self.inits: dict[Code, fx.Node | Fill] = {}
        self.constants: dict[int, Tensor] = {}

    def run(self) -> FirstIteration | None:
        nodes: list[fx.Node | None] = []
        codes: list[tuple[Code, ...]] = []
        cursor = 0
        for position in range(len(self.pattern)):
            found = self._find(cursor, position)
            if found is None and not self._evaluate(position):
                return None
            if found is None:
                nodes.append(None)
                codes.append(self._with_inits(position))
                continue
            cursor, agreed = found
            nodes.append(self.first[cursor - 1])
            codes.append(agreed)
        if not self._hoist(self.first[cursor:]) or self._leaks_small(nodes):
            return None
        return FirstIteration(nodes, codes, list(self.hoisted))

    def _find(self, cursor: int, position: int) -> tuple[int, tuple[Code, ...]] | None:
        """The next node of the first iteration that does what the pattern does at ``position``."""
        skipped: list[fx.Node] = []
        for at in range(cursor, len(self.first)):
            node = self.first[at]
            before = dict(self.hoisted)
            if self._hoist(skipped):
                agreed = self._agree(node, position)
                if agreed is not None:
                    self.where[node] = (0, position)
                    return at + 1, agreed
            self.hoisted = before
            skipped.append(node)
            if not self._can_hoist(skipped):
                return None
        return None

    def _hoist(self, nodes: list[fx.Node]) -> bool:
        if not self._can_hoist(nodes):
            return False
        self.hoisted.update(dict.fromkeys(nodes))
        return True

    def _can_hoist(self, nodes: list[fx.Node]) -> bool:
        moved = {*self.hoisted, *nodes}
        return not any(
            draws_random(node)
            or node.op != "call_function"
            or any(i in self.own and i not in moved for i in node.all_input_nodes)
            for node in nodes
        )

    def _agree(self, node: fx.Node, position: int) -> tuple[Code, ...] | None:
        """The codes of ``node`` in the pattern's form, or None if it does something else."""
        if not self._same_head(node, self.pattern[position]):
            return None
        own = encode(node, 0, self.where)
        orders = [own]
        if node.target in COMMUTATIVE and len(own) == 2:
            orders.append((own[1], own[0]))
        for order in orders:
            before = dict(self.inits)
            agreed = self._agree_codes(order, position)
            if agreed is not None:
                return agreed
            self.inits = before
        return None

    def _agree_codes(self, own: tuple[Code, ...], position: int) -> tuple[Code, ...] | None:
        pattern = self.codes[position]
        if len(own) != len(pattern):
            return None
        agreed: list[Code] = []
        for index, (code, expected) in enumerate(zip(own, pattern, strict=True)):
            found = self._agree_code(code, expected, self._varies(position, index))
            if found is None:
                return None
            agreed.append(found[0])
        return tuple(agreed)

    def _agree_code(self, code: Code, expected: Code, varies: bool) -> tuple[Code] | None:
        """The code to use, in a tuple (a literal may be None); None if the two disagree."""
        if code == expected:
            return (expected,)
        if isinstance(expected, Ref) and expected.distance == 0:
            constant = self.constants.get(expected.position)
            if not isinstance(code, Number) or constant is None:
                return None
            return (expected,) if _same_bits(code, constant) else None
        if self._is_carried(expected):
            return self._unify(code, expected)
        if isinstance(code, fx.Node) and isinstance(expected, fx.Node):
            return (code,) if varies and not self._is_unaligned(code) else None
        if isinstance(code, Number) and isinstance(expected, Number):
            return (code,) if varies and code.kind is expected.kind else None
        return None

    def _unify(self, code: Code, expected: Code) -> tuple[Code] | None:
        """Take ``code`` as the initial value of the carry ``expected``, always the same one."""
        init: fx.Node | Fill
        if isinstance(code, Number):
            init = Fill(code.value)
        elif isinstance(code, fx.Node) and not self._is_unaligned(code):
            init = code
        else:
            return None
        if isinstance(init, Fill) and isinstance(expected, Ref) and expected.distance > 1:
            return None
        known = self.inits.setdefault(expected, init)
        return (known,) if known == init else None

    def _is_carried(self, code: Code) -> bool:
        return (isinstance(code, Ref) and code.distance > 0) or code in self.own

    def _is_unaligned(self, node: fx.Node) -> bool:
        return node in self.own and node not in self.hoisted

    def _varies(self, position: int, index: int) -> bool:
        """Whether later iterations differ in this argument; where there is one, they may."""
        if self.before is not None and len(self.before[position]) > index:
            return bool(self.before[position][index] != self.codes[position][index])
        is_number = isinstance(self.codes[position][index], Number)
        return not is_number or self.pattern[position].target in INDEXING

    def _same_head(self, node: fx.Node, pattern: fx.Node) -> bool:
        if head_of(node) == head_of(pattern):
            return True
        if (node.op, node.target) != (pattern.op, pattern.target) or not is_pointwise(node):
            return False
        (shape, dtype), (wider, wider_dtype) = shape_of(node)[:2], shape_of(pattern)[:2]
        return dtype is wider_dtype and expands(shape, wider)

    def _evaluate(self, position: int) -> bool:
        """Compute the pattern's value where all its operands are numbers known before the loop."""
        node = self.pattern[position]
        codes = self.codes[position]
        if not is_pointwise(node) or not isinstance(node.target, torch._ops.OpOverload):
            return False
        operands = [self._constant_operand(code) for code in codes]
        if any(isinstance(code, Open) for code in codes) or len(codes) != len(node.args):
            return False
        if any(operand is None for operand in operands):
            return False
        if not any(isinstance(operand, Tensor) for operand in operands):
            return False
        value = node.target(*operands)
        if value.dtype is not shape_of(node)[1]:
            return False
        self.constants[position] = value
        return True

    def _constant_operand(self, code: Code) -> Tensor | int | float | None:
        if isinstance(code, Number):
            return code.value
        if isinstance(code, Ref) and code.distance == 0:
            return self.constants.get(code.position)
        if not self._is_carried(code):
            return None
        # Python numbers leave no trace; zero is the usual start, and a wrong guess is found out.
        init = self.inits.setdefault(code, Fill(0))
        carried = self.pattern[code.position] if isinstance(code, Ref) else code
        return _one_element(init.value, shape_of(carried)[1]) if isinstance(init, Fill) else None

    def _with_inits(self, position: int) -> tuple[Code, ...]:
        return tuple(self.inits.get(code, code) for code in self.codes[position])

    def _leaks_small(self, nodes: list[fx.Node | None]) -> bool:
        """A value smaller than the pattern's must not be seen outside of the loop."""
        return any(
            node is not None
            and shape_of(node) != shape_of(pattern)
            and any(user not in self.members for user in node.users)
            for node, pattern in zip(nodes, self.pattern, strict=True)
        )


def _one_element(value: int | float | bool, dtype: torch.dtype) -> Tensor:
    return torch.full((1,), value, dtype=dtype)


def _same_bits(number: Number, constant: Tensor) -> bool:
    if isinstance(number.value, float) and not constant.dtype.is_floating_point:
        return False
    other = _one_element(number.value, constant.dtype)
    same_sign = math.copysign(1, other.item()) == math.copysign(1, constant.item())
    return bool(torch.equal(other, constant)) and same_sign
