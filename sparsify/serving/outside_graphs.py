"""Calls that run as they are where ``torch.compile`` compiles what is around them.

Dynamo would trace the engine, which answers that by the original operations. So it is told to break
its graph at the call, and not to look at what the call runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling, is_exporting

REASON = (
    "a sparsified module runs kernels of its own, which are no part of a graph: leave out "
    "fullgraph=True, or compile its .original, which has no kernels"
)


def is_seen_by_dynamo() -> bool:
    """True where Dynamo traces this line, or would trace the frames that are called here."""
    return is_dynamo_compiling() or get_eval_frame_callback() is not None


def is_compiled_around() -> bool:
    """True inside of ``torch.compile``, whether it traces this line or has skipped the frame.

    ``torch.export`` has no graphs to break: false.
    """
    return is_seen_by_dynamo() and not is_exporting()


def _breaks_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with what Dynamo asks before it traces one, and says under fullgraph=True."""
    marked: Any = function
    marked._torchdynamo_disable = True
    marked._torchdynamo_disable_msg = REASON
    return function


# torch.compiler.disable would import Dynamo, which takes a second, in programs that have no use of
# it; this imports it at the first call.
@_breaks_graphs
@_disable_dynamo
def call_outside(engine: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``engine(args, kwargs)``, of which Dynamo sees nothing."""
    return engine(args, kwargs)
