"""Event-driven compilation of PyTorch spiking and event-based networks.

Importing this package gives every ``torch.nn.Module`` the method ``sparsify``.
"""

from sparsify.api import sparsify
from sparsify.errors import (
    BackendUnavailable,
    CompileError,
    MismatchError,
    PruningError,
    Refusal,
    RefusedError,
    SparsifyError,
    TraceError,
)
from sparsify.explain_model import explain
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.pruning.pruner import Pruner
from sparsify.pruning.request import Pruning
from sparsify.report import Report, Site
from sparsify.verify_model import verify

__all__ = [
    "BackendUnavailable",
    "CompileError",
    "MismatchError",
    "Options",
    "Plan",
    "Pruner",
    "Pruning",
    "PruningError",
    "Refusal",
    "RefusedError",
    "Report",
    "Site",
    "SparsifyError",
    "TraceError",
    "explain",
    "sparsify",
    "verify",
]
