"""Refusals that name a node of a Scan's body."""

from __future__ import annotations

from torch import fx

from sparsify.errors import Refusal, RefusalCode


def refuse(code: RefusalCode, reason: str, remedy: str, node: fx.Node) -> Refusal:
    """The refusal of ``node``, with the user's line and the module that runs there."""
    module = str(node.meta.get("module", ""))
    facts = {"operation": str(node.target), "node": node.name, "module": module}
    return Refusal(code, reason, remedy, node.meta.get("location"), facts)


class Refused(Exception):
    """Internal to lowering: carries a refusal to ``lower_scan``, which returns it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
