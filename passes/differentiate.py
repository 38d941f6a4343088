"""Being written."""

from __future__ import annotations

from collections.abc import Set

from sparsify.differentiated import Differentiated, Operand
from sparsify.errors import Refusal
from sparsify.scan import Scan


def differentiate(scan: Scan, required: Set[Operand]) -> Differentiated | Refusal:
    return Refusal("needs-grad", "Gradients are not compiled yet.")
