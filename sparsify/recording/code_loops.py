"""The loops of a code object: the natural loops of its control flow, from its bytecode."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType

_NEVER_FALLS_THROUGH = frozenset(
    {"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "JUMP_FORWARD", "JUMP_BACKWARD"}
    | {"JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"}
)


@dataclass(frozen=True)
class CodeLoop:
    """``first`` is where every iteration starts; ``jumps`` are the unconditional jumps back.

    Python may put a copy of the test ``ahead`` of it, to which ``continue`` jumps; its first offset
    is ``start``, which is ``first`` where there is no copy. ``is_told`` says that Python reports a
    line where the loop is entered: it does not where that is on the line before.
    """

    first: int
    last: int
    line: int
    start: int
    is_told: bool
    jumps: frozenset[int]
    ahead: frozenset[int] = field(repr=False)
    offsets: frozenset[int] = field(repr=False)


def find_code_loops(code: CodeType) -> tuple[CodeLoop, ...]:
    """All loops of ``code`` (not of the functions defined in it), outer ones before inner ones.

    Loops of ``yield from`` and ``await``, and jumps of exception handlers back into the normal
    flow, are none.
    """
    if not any("JUMP_BACKWARD" in name for name in _names(code)):
        return ()
    flow = _Flow(code)
    found = [flow.make_loop(*loop) for loop in flow.find_loops()]
    return tuple(sorted(found, key=lambda loop: -len(loop.offsets)))


def _names(code: CodeType) -> Iterator[str]:
    return (dis.opname[opcode] for opcode in set(code.co_code[::2]))


class _Flow:
    """Basic blocks, numbered in order, with the edges between them."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self.instructions = list(dis.get_instructions(code))
        offsets = [i.offset for i in self.instructions]
        self.ends = dict(zip(offsets, [*offsets[1:], len(code.co_code)], strict=True))
        handlers = list(dis.Bytecode(code).exception_entries)  # type: ignore[attr-defined]
        leaders = {0}
        for here in self.instructions:
            target = _target(here)
            if target is not None:
                leaders.add(target)
            if target is not None or here.opname in _NEVER_FALLS_THROUGH:
                leaders.add(self.ends[here.offset])
        for entry in handlers:
            leaders |= {entry.start, entry.end, entry.target}
        self.blocks: list[list[dis.Instruction]] = []
        self.block_of: dict[int, int] = {}
        for instruction in self.instructions:
            if instruction.offset in leaders or not self.blocks:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
            self.block_of[instruction.offset] = len(self.blocks) - 1
        self.after: list[set[int]] = [self._successors(i) for i in range(len(self.blocks))]
        for entry in handlers:
            for index, block in enumerate(self.blocks):
                if entry.start <= block[0].offset < entry.end:
                    self.after[index].add(self.block_of[entry.target])
        self.before: list[set[int]] = [set() for _ in self.blocks]
        for index, targets in enumerate(self.after):
            for target in targets:
                self.before[target].add(index)

    def _extent(self, instruction: dis.Instruction) -> range:
        """The offsets of an instruction and its inline caches, all of which ``f_lasti`` may be."""
        return range(instruction.offset, self.ends[instruction.offset], 2)

    def _successors(self, index: int) -> set[int]:
        last = self.blocks[index][-1]
        found = set()
        target = _target(last)
        if target is not None:
            found.add(self.block_of[target])
        if last.opname not in _NEVER_FALLS_THROUGH and index + 1 < len(self.blocks):
            found.add(index + 1)
        return found

    def find_loops(self) -> Iterator[tuple[int, int, list[int]]]:
        """Of each loop the block where it starts, its header, and the blocks that jump back."""
        edges = self._back_edges()
        inside = {header: self._inside(header, sources) for header, sources in edges.items()}
        copies = {
            inner: outer
            for outer in edges
            for inner in edges
            if self._is_test_ahead(outer, inner, inside[outer], inside[inner])
        }
        for header, sources in edges.items():
            start = copies.get(header, header)
            if start != header:
                yield start, header, [*sources, *edges[start]]
            elif header not in copies.values():
                yield header, header, sources

    def _is_test_ahead(self, outer: int, inner: int, around: set[int], within: set[int]) -> bool:
        """Whether two loops are one, of which the blocks up to ``inner`` are a copy of its test.

        Their instructions have the positions of others, and lead to ``inner`` or out of both loops.
        """
        ahead = range(outer, inner)
        if not ahead or inner not in around or not within < around:
            return False
        ways = {way for block in ahead for way in self.after[block]} - {*ahead, inner}
        if not ways.isdisjoint(around):
            return False
        known = {i.positions for block in within for i in self.blocks[block]}
        copied = {i.positions for block in ahead for i in self.blocks[block]}
        return copied <= known and all(p and p.end_col_offset is not None for p in copied)

    def _back_edges(self) -> dict[int, list[int]]:
        """Jumps to a block that dominates them: block -> blocks that jump back to it."""
        dominators = self._dominators()
        edges: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            last = block[-1]
            target = _target(last)
            if target is None or target > last.offset or last.opname.endswith("NO_INTERRUPT"):
                continue
            header = self.block_of[target]
            if dominators[index] >> header & 1:
                edges.setdefault(header, []).append(index)
        return edges

    def _dominators(self) -> list[int]:
        """For each block the set of blocks, as bits, that every path to it passes."""
        everything = (1 << len(self.blocks)) - 1
        found = [everything] * len(self.blocks)
        found[0] = 1
        changed = True
        while changed:
            changed = False
            for index in range(1, len(self.blocks)):
                common = everything
                for before in self.before[index]:
                    common &= found[before]
                new = common | 1 << index
                changed = changed or new != found[index]
                found[index] = new
        return found

    def _inside(self, header: int, sources: list[int]) -> set[int]:
        """The blocks from which a jump back is reached without passing the header again."""
        inside = {header}
        waiting = list(sources)
        while waiting:
            block = waiting.pop()
            if block not in inside:
                inside.add(block)
                waiting.extend(self.before[block])
        return inside

    def make_loop(self, start: int, header: int, sources: list[int]) -> CodeLoop:
        inside = self._inside(start, sources)
        jumps = [self.blocks[source][-1] for source in sources]
        lines = [_line(i) for i in (self.blocks[header][0], *jumps)]
        entered_from = {_line(self.blocks[b][-1]) for b in self.before[start] - inside}
        return CodeLoop(
            first=self.blocks[header][0].offset,
            last=max(jump.offset for jump in jumps),
            line=min((line for line in lines if line), default=self.code.co_firstlineno),
            start=self.blocks[start][0].offset,
            is_told=entered_from != {_line(self.blocks[start][0])},
            jumps=frozenset(j.offset for j in jumps if j.opname == "JUMP_BACKWARD"),
            ahead=self._offsets(range(start, header)),
            offsets=self._offsets(inside),
        )

    def _offsets(self, blocks: Iterable[int]) -> frozenset[int]:
        return frozenset(o for b in blocks for i in self.blocks[b] for o in self._extent(i))


def _target(instruction: dis.Instruction) -> int | None:
    if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
        return int(instruction.argval)
    return None


def _line(instruction: dis.Instruction) -> int | None:
    return instruction.positions.lineno if instruction.positions is not None else None
