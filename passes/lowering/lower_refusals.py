"""Refusals that name a node of a Scan's body."""

from __future__ import annotations

from torch import fx

from sparsify.errors import Refusal, RefusalCode
from sparsify.graph_meta import Source
from sparsify.passes.nodes.classify_ops import untransposed


def refuse(code: RefusalCode, reason: str, remedy: str, node: fx.Node) -> Refusal:
    """The refusal of ``node``, with the user's line, the module that runs there, and what it reads.

    Several products may be on one line, and in one module: what is stored tells them apart.
    """
    module = str(node.meta.get("module", ""))
    sources = [untransposed(operand)[0].meta.get("source") for operand in node.all_input_nodes]
    reads = tuple(source.name for source in sources if isinstance(source, Source))
    facts = {"operation": str(node.target), "node": node.name, "module": module, "reads": reads}
    return Refusal(code, reason, remedy, node.meta.get("location"), facts)


class Refused(Exception):
    """Internal to lowering: carries a refusal to ``lower_scan``, which returns it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
