"""Find the values of which a threshold decides what is zero: events, and what they carry.

Before::

    z = (v > 1).float(); h = fc(z)

After, the same graph with ``meta["fact"]`` on every value::

    z = (v > 1).float()     # Fact(event=True, payload="binary", origin=model.py:41)
    h = fc(z)               # Fact(event=False)

Facts hold for every input: graph inputs and parameters are dense real values whatever the example
showed. They flow into the bodies of Scans until the carries' facts are stable.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import fx

from sparsify.errors import Location
from sparsify.graph_meta import Fact
from sparsify.passes.events.combine_facts import DENSE, constant, join
from sparsify.passes.events.event_table import STARTS, SUMS, rule_of
from sparsify.passes.events.find_cancelled import chosen_by_mask, left_of_sum
from sparsify.passes.events.keep_events import cast, multiply, negate, same
from sparsify.passes.events.start_events import choose, fill_masked
from sparsify.passes.events.without_gradients import is_application
from sparsify.passes.nodes.classify_ops import draws_random
from sparsify.passes.nodes.result import PassResult
from sparsify.scans.scan import Scan

aten = torch.ops.aten
Value = Fact | tuple[Fact, ...]
WEIGHTS = ("parameter", "buffer", "constant")  # no threshold on these makes an event
POOLS = (aten.max_pool2d_with_indices.default,)


def find_events(gm: fx.GraphModule) -> PassResult:
    """Annotate every node of ``gm`` and of its Scans' bodies with what is known of its value."""
    finder = _Finder(gm)
    finder.run(gm.graph, {})
    return PassResult(gm, finder.annotate())


@dataclass
class _Finder:
    gm: fx.GraphModule
    facts: dict[fx.Node, Value] = field(default_factory=dict)
    summed: set[fx.Node] = field(default_factory=set)  # see find_sums
    fixed: set[fx.Node] = field(default_factory=set)  # follows from parameters and literals

    def run(self, graph: fx.Graph, known: Mapping[fx.Node, Fact]) -> None:
        """Derive the facts of a graph whose placeholders have ``known`` ones."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self.facts[node] = known.get(node, DENSE)
                if getattr(node.meta.get("source"), "kind", "") in WEIGHTS and not known:
                    self.fixed.add(node)
            elif node.op != "output":
                follows = all(operand in self.fixed for operand in node.all_input_nodes)
                if follows and not draws_random(node):
                    self.fixed.add(node)
                fact = self._derive(node)
                ends = node in self.summed or node in self.fixed
                self.facts[node] = _ended(fact) if ends else fact

    def _derive(self, node: fx.Node) -> Value:
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            return self._scan(node, module) if isinstance(module, Scan) else DENSE
        if node.target is operator.getitem:
            return self._part(node)
        rule = rule_of(node.target)
        is_noise = draws_random(node) and node.target is not aten.bernoulli.default
        if rule is None or is_noise or not node.args:
            return DENSE
        left, choice = left_of_sum(node), chosen_by_mask(node)
        if choice is not None and self.operand(choice[0]).payload == "binary":
            return join(self.operand(choice[1]), self.operand(choice[2]))
        fact = rule(node, self.operand) if left is None else self._left(node, left)
        return (fact, DENSE) if node.target in POOLS else fact

    def _left(self, node: fx.Node, terms: list[fx.Node]) -> Fact:
        facts = [self.operand(term) for term in terms]
        if not all(fact.event or fact.payload == "zero" for fact in facts):
            return DENSE
        origins = (fact.origin for fact in facts if fact.origin is not None)
        return Fact(True, "real", None, next(origins, node.meta.get("location")))

    def operand(self, argument: Any) -> Fact:
        """The fact of an argument; of a number that it is that number everywhere."""
        if isinstance(argument, (bool, int, float)):
            return constant(argument, event=False)
        found = self.facts.get(argument, DENSE) if isinstance(argument, fx.Node) else DENSE
        return found if isinstance(found, Fact) else DENSE

    def _part(self, node: fx.Node) -> Fact:
        source, index = node.args
        found = self.facts.get(source, DENSE) if isinstance(source, fx.Node) else DENSE
        if isinstance(found, Fact):
            return found
        return found[index] if isinstance(index, int) else DENSE

    def _scan(self, node: fx.Node, scan: Scan) -> tuple[Fact, ...]:
        """Derive the body's facts until no carry's changes."""
        args: Any = node.args
        inits, xs, consts = (self._given(group) for group in args[1:])
        outside = dict(zip(scan.placeholders[scan.carries :], [*xs, *consts], strict=True))
        self.summed |= find_sums(scan, outside)
        places = zip(scan.placeholders[scan.carries :], [*args[2], *args[3]], strict=True)
        self.fixed |= {place for place, argument in places if argument in self.fixed}
        carried = inits
        while True:
            known = dict(zip(scan.placeholders, [*carried, *xs, *consts], strict=True))
            self.run(scan.body.graph, known)
            results = [self.operand(result) for result in scan.results]
            joined = [_join_step(a, b) for a, b in zip(carried, results, strict=False)]
            if joined == carried:
                return (*carried, *results[scan.carries :])
            carried = joined

    def _given(self, group: Any) -> list[Fact]:
        return [self.operand(argument) for argument in group]

    def annotate(self) -> list[str]:
        """Write the facts to the nodes; returns a sentence for each event that was not known."""
        found: dict[Location | None, Fact] = {}
        for node, fact in self.facts.items():
            if isinstance(fact, tuple):
                continue
            is_new = node.meta.get("fact") != fact
            node.meta["fact"] = fact
            if is_new and fact.event and fact.payload != "zero":
                found.setdefault(fact.origin, fact)
        return [f"{origin}: {_describe(fact)}" for origin, fact in found.items()]


def find_sums(scan: Scan, outside: Mapping[fx.Node, Fact]) -> set[fx.Node]:
    """Body values that are added up over the steps: soon they are zero nowhere.

    They lie on a cycle through a carry and an addition that no threshold and no product cuts.
    ``outside`` has the facts of what comes from outside of the loop.
    """
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    choices: set[fx.Node] = set()
    for node in scan.body.graph.nodes:
        choice = chosen_by_mask(node)
        if choice is not None and _is_mask(choice[0], outside):
            choices.add(node)
            graph.add_edges_from((operand, node) for operand in choice[1:])
        elif rule_of(node.target) is not None and not _cuts(node):
            graph.add_edges_from((operand, node) for operand in _sources(node))
    carries = scan.placeholders[: scan.carries]
    graph.add_edges_from(
        (value, carry) for carry, value in zip(carries, scan.results, strict=False)
    )
    found: set[fx.Node] = set()
    for component in nx.strongly_connected_components(graph):
        is_cycle = len(component) > 1  # a carry is on every one
        if is_cycle and any(rule_of(node.target) in SUMS for node in component - choices):
            found |= component
    return found


def _is_mask(node: fx.Node, outside: Mapping[fx.Node, Fact]) -> bool:
    """True for a view of zeros and ones from outside of the loop."""
    while rule_of(node.target) is same:
        node = node.all_input_nodes[0]
    return outside.get(node, DENSE).payload == "binary"


def _cuts(node: fx.Node) -> bool:
    """A threshold decides what of the result is zero, whatever the operands were."""
    rule = rule_of(node.target)
    gated = rule in (multiply, choose, fill_masked)
    return rule in STARTS or (gated and any(map(_is_gate, node.all_input_nodes)))


def _sources(node: fx.Node) -> list[fx.Node]:
    """The operands that the value is made of: of a Function's use its value alone."""
    left = left_of_sum(node)
    if left is not None:
        return left
    return node.all_input_nodes[:1] if is_application(node) else node.all_input_nodes


def _is_gate(node: fx.Node) -> bool:
    rule = rule_of(node.target)
    follows = rule in (same, cast, negate) or (rule is multiply and len(node.all_input_nodes) == 1)
    return rule in STARTS or (follows and _is_gate(node.all_input_nodes[0]))


def _join_step(now: Fact, new: Fact) -> Fact:
    """A carry's fact: what it may start from is a matter of its first step only."""
    joined = join(now, new)
    if joined.event or not new.event or new.payload == "zero":
        return joined
    return replace(joined, event=True, origin=new.origin)


def _ended(fact: Value) -> Value:
    if isinstance(fact, tuple):
        return fact
    return fact if fact.payload == "zero" else replace(fact, event=False, origin=None)


def _describe(fact: Fact) -> str:
    if fact.payload == "constant":
        return f"events of {fact.value}"
    return {"binary": "events of 1", "integer": "events of integers"}.get(
        fact.payload, "events of real values"
    )
