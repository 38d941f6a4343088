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
from sparsify.options import Options
from sparsify.plan import Plan
from sparsify.products.report import Report, Site
from sparsify.pruning.pruner import Pruner
from sparsify.pruning.request import Pruning
from sparsify.serving.explain_model import explain
from sparsify.verification.model import verify

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
