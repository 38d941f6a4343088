"""Find kernels that hand values of every step to one another, and could do so in chunks of time."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import fx, nn

from sparsify.passes.nodes.call_scan import draws_numbers
from sparsify.passes.nodes.classify_ops import product_operand
from sparsify.regions.region import Region

aten = torch.ops.aten
# Every row of the result is computed of one row of the operand.
ROW_PRODUCTS = (aten.mm.default, aten.addmm.default)


@dataclass(frozen=True)
class Chain:
    """``loops`` that run ``steps`` steps, with views and products between them and before them.

    ``members`` are all of these. ``unfolds`` have steps as a size again, in that dim.
    ``steps`` is a number, or the node of one. ``finals`` are last states, ``ys`` what is read
    elsewhere at all steps, and ``picks`` take one step of what nothing else reads elsewhere.
    ``after`` has to be computed after the loops. What nobody else reads are ``values_a_step``.
    """

    steps: int | fx.Node
    members: tuple[fx.Node, ...]
    loops: tuple[fx.Node, ...]
    unfolds: Mapping[fx.Node, int]
    finals: tuple[fx.Node, ...]
    ys: tuple[fx.Node, ...]
    picks: tuple[fx.Node, ...]
    after: frozenset[fx.Node]
    values_a_step: int
    bytes_a_step: int

    def given(self, role: Literal["x", "const"]) -> list[fx.Node]:
        """The operands in this role that the chain does not compute."""
        place = 2 if role == "x" else 3
        found = [node for loop in self.loops for node in loop_args(loop)[place]]
        for node in self.members:
            if node not in self.loops:
                others = [n for n in node.all_input_nodes if n is not _operand(node)]
                others = [n for n in others if n is not self.steps]
                found += others if role == "const" else [_operand(node)]
        return [node for node in dict.fromkeys(found) if node not in self.members]


def find_chain(gm: fx.GraphModule) -> Chain | None:
    """The first chain of Regions of ``gm`` of which something need not be kept for all steps."""
    regions = {name for name, module in gm.named_children() if _runs_forward(module)}
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and n.target in regions]
    for steps in dict.fromkeys(loop_args(call)[0] for call in calls):
        if not isinstance(steps, int) or steps > 1:
            chain = _Search(gm, frozenset(calls), steps).run()
            if chain is not None:
                return chain
    return None


def _runs_forward(module: nn.Module) -> bool:
    return isinstance(module, Region) and not module.scan.reverse


def loop_args(loop: fx.Node) -> tuple[Any, Sequence[Any], Sequence[Any], Sequence[Any]]:
    """How many steps it runs, and its carries, xs and consts."""
    steps, carries, xs, consts = loop.args[:4]
    return steps, cast(Any, carries), cast(Any, xs), cast(Any, consts)


class _Place(NamedTuple):
    """Where a value of all steps has time: ``dim`` has T "steps", T * B rows, those of one step
    together ("outer"), or B * T rows, those of one sample together ("inner").
    """

    dim: int
    form: Literal["steps", "outer", "inner"]


STACKED, FOLDED = _Place(0, "steps"), _Place(0, "outer")
SWAPPED, SWAPPED_FOLDED = _Place(1, "steps"), _Place(0, "inner")


@dataclass
class _Grown:
    """``places`` of the members that are values; those of loops are where their ys have time."""

    places: dict[fx.Node, _Place]
    after: set[fx.Node]


class _Search:
    """Looks for a chain of those of ``calls`` that run ``steps`` steps, or rows of all of them."""

    def __init__(
        self, gm: fx.GraphModule, calls: Collection[fx.Node], steps: int | fx.Node
    ) -> None:
        self.graph, self.calls, self.steps = gm.graph, calls, steps
        self.modules = dict(gm.named_children())

    def run(self) -> Chain | None:
        grown = self._settle(set(self.graph.nodes))
        for part in self._parts(grown):
            own = self._settle(part)
            if len(self._parts(own)) == 1 and self._handed(own):
                return self._chain(own)
        return None

    def _settle(self, allowed: set[fx.Node]) -> _Grown:
        """The members among ``allowed`` of which the others read no more than they may."""
        while True:
            grown = self._grow(allowed)
            wrong = {node for node in grown.places if self._is_misread(node, grown)}
            if not wrong:
                return grown
            allowed = allowed - wrong

    def _grow(self, allowed: Collection[fx.Node]) -> _Grown:
        grown = _Grown({}, set())
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            read = node.all_input_nodes
            is_after = any(operand in grown.after for operand in read)
            place = None if is_after or node not in allowed else self._place(node, grown)
            if place is not None:
                grown.places[node] = place
            elif is_after or any(operand in grown.places for operand in read):
                grown.after.add(node)
        return grown

    def _place(self, node: fx.Node, grown: _Grown) -> _Place | None:
        """Where ``node`` has time, if it is computed of a chunk as it is of all steps."""
        if node in self.calls:
            return self._place_of_loop(node, grown)
        operand = _operand(node)
        given = None if operand is None else grown.places.get(operand)
        if operand is None or given is None:
            return self._place_of_source(node)
        others = [other for other in node.all_input_nodes if other is not operand]
        if any(other in grown.places for other in others):
            return None
        return self._place_behind(node, given)

    def _place_of_source(self, node: fx.Node) -> _Place | None:
        """Of what makes rows of something that is not computed here, for products of all steps."""
        place = self._place_behind(node, STACKED)
        if place not in (FOLDED, SWAPPED):
            return None
        return place if self._becomes_steps(node, place) else None

    def _becomes_steps(self, node: fx.Node, place: _Place) -> bool:
        """Whether all that is computed of ``node`` is that of the steps in the end."""
        behind = [(user, self._place_behind(user, place)) for user in node.users]
        return bool(behind) and all(
            after is not None
            and (user.target is aten.reshape.default or self._becomes_steps(user, after))
            for user, after in behind
        )

    def _place_behind(self, node: fx.Node, given: _Place) -> _Place | None:
        """The place of ``node``, of which what it is computed from has the place ``given``."""
        args: Any = node.args
        dim, form = given
        if node in self.calls:
            return given if self._is_for_rows(node) and dim == 1 and form != "steps" else None
        if node.target is operator.getitem:
            loop, index = args
            is_y = loop in self.calls and index >= len(loop_args(loop)[1])
            return given if is_y else None
        if product_operand(node) is not None and node.target in ROW_PRODUCTS:
            return given if given in (FOLDED, SWAPPED_FOLDED) else None
        if node.target is aten.flatten.using_ints and args[1:] == (0, 1):
            return {STACKED: FOLDED, SWAPPED: SWAPPED_FOLDED}.get(given)
        if node.target is aten.permute.default and list(args[1][:2]) == [1, 0]:
            swaps = list(args[1][2:]) == list(range(2, len(args[1])))
            return {STACKED: SWAPPED, SWAPPED: STACKED}.get(given) if swaps else None
        if node.target is aten.unsqueeze.default and args[1] == 0:
            return _Place(dim + 1, form)
        if node.target is aten.select.int and args[1:] == (0, 0) and dim > 0:
            return _Place(dim - 1, form)
        if node.target is aten.reshape.default and self._is_unfolded(node, given):
            return {FOLDED: STACKED, SWAPPED_FOLDED: SWAPPED}.get(given)
        return None

    def _place_of_loop(self, loop: fx.Node, grown: _Grown) -> _Place | None:
        steps, carries, xs, consts = loop_args(loop)
        if any(operand in grown.places for operand in (*carries, *consts)):
            return None
        places = [grown.places.get(x) for x in xs]
        if _is_same(steps, self.steps):
            return STACKED if {*places} <= {STACKED, None} else None
        if not self._is_for_rows(loop) or len({*places}) != 1 or places[0] is None:
            return None
        return self._place_behind(loop, places[0])

    def _is_for_rows(self, loop: fx.Node) -> bool:
        steps, carries, xs, _ = loop_args(loop)
        return not isinstance(steps, fx.Node) and steps == 1 and not carries and len(xs) > 0

    def _is_unfolded(self, node: fx.Node, given: _Place) -> bool:
        """Whether it makes ``[T, B, ...]`` of ``[T * B, ...]``, or ``[B, T, ...]``."""
        args: Any = node.args
        before, shape = args[0].meta["val"].shape, node.meta["val"].shape
        steps = args[1][given.form == "inner"] if len(shape) > 1 else None
        is_split = len(shape) > 1 and shape[0] * shape[1] == before[0] and shape[2:] == before[1:]
        return is_split and _is_same(steps, self.steps)

    def _is_misread(self, node: fx.Node, grown: _Grown) -> bool:
        """Whether ``node`` is read elsewhere, and is not ``[T, ...]``; or is a view of no use."""
        if node in self.calls:
            return False
        outside = [user for user in node.users if user not in grown.places]
        if grown.places[node] != STACKED:
            return bool(outside) or not node.users
        return False

    def _parts(self, grown: _Grown) -> list[set[fx.Node]]:
        """The members, those that read from one another together."""
        parts: list[set[fx.Node]] = []
        for node in grown.places:
            linked = {node, *(n for n in node.all_input_nodes if n in grown.places)}
            met = [part for part in parts if not part.isdisjoint(linked)]
            parts = [part for part in parts if part not in met]
            parts.append(linked.union(*met))
        return parts

    def _handed(self, grown: _Grown) -> list[fx.Node]:
        """The ys that loops alone read, of memory of their own."""
        return [
            node
            for node in grown.places
            if (node.target is operator.getitem or product_operand(node) is not None)
            and (ends := list(self._ends(node, grown)))
            and any(end in self.calls for end in ends)
            and all(end in grown.places or _is_pick(end) for end in ends)
        ]

    def _ends(self, value: fx.Node, grown: _Grown) -> Iterable[fx.Node]:
        """What reads ``value``, also through views that are members."""
        for user in value.users:
            if user in grown.places and user not in self.calls:
                yield from self._ends(user, grown)
            else:
                yield user

    def _count_steps(self, grown: _Grown) -> int:
        """In the recording that the graph is of."""
        for node, place in grown.places.items():
            if node not in self.calls and place == STACKED:
                return int(node.meta["val"].shape[0])
        raise AssertionError("a chain has a value of all steps")

    def _chain(self, grown: _Grown) -> Chain | None:
        members = tuple(grown.places)
        nodes = list(self.graph.nodes)
        between = nodes[nodes.index(members[0]) : nodes.index(members[-1])]
        apart = (node for node in between if node not in grown.places)
        if any(draws_numbers(node, self.modules) for node in apart):
            return None  # the order of draws has to stay
        loops = tuple(node for node in members if node in self.calls)
        values = [node for node in members if node not in self.calls]
        read = {node: [u for u in node.users if u not in grown.places] for node in values}
        ys = tuple(n for n, users in read.items() if not all(map(_is_pick, users)))
        picks = tuple(u for n, users in read.items() if n not in ys for u in users)
        finals = (u for loop in loops for u in loop.users if u not in grown.places)
        steps = self._count_steps(grown)
        infos = [node.meta["val"] for node in self._handed(grown)]
        nbytes = sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)
        handed = sum(math.prod(info.shape) * _values_of(info.dtype) for info in infos)
        unfolds = {n: grown.places[n].dim for n in values if n.target is aten.reshape.default}
        chain = Chain(
            self.steps,
            members,
            loops,
            unfolds,
            tuple(finals),
            ys,
            picks,
            frozenset(grown.after),
            max(1, handed // steps),
            max(1, nbytes // steps),
        )
        # What is read at every step here must not be read as a whole there.
        return chain if {*chain.given("x")}.isdisjoint(chain.given("const")) else None


def _operand(node: fx.Node) -> Any:
    """What has the steps, of those that ``node`` reads."""
    product = product_operand(node)
    return next(iter(node.all_input_nodes), None) if product is None else product


def _is_same(steps: object, others: object) -> bool:
    return steps is others or (isinstance(steps, int) and steps == others)


def _values_of(dtype: torch.dtype) -> int:
    """How many values an element holds: loops hand bits to one another as bytes of eight."""
    return 8 if dtype is torch.uint8 else 1


def _is_pick(user: fx.Node) -> bool:
    """Whether it takes one step."""
    return user.target is aten.select.int and bool(user.args[1] == 0)
