"""While a model is recorded, what ``torch.compile`` made runs as the original Python.

``scan`` and its like compile what they are given, whoever calls them. A compiler does not see
through a dispatch mode, and what it skipped there, it skips for good, so that the model would raise
after that, too: they run outside of the recorder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch.overrides import _get_current_function_mode, _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from sparsify.recording.escapes import Escapes
from sparsify.recording.recorder import Recorder
from sparsify.recording.size_reads import SizeReads

_TORCH: Any = torch
HIGHER_ORDER = os.path.join(os.path.dirname(torch.__file__), "_higher_order_ops", "")
COMPILES = "{} compiles what it is given, which is not seen; write it in Python, as a loop or an if"


@contextmanager
def uncompiled(recorder: Recorder, reads: SizeReads) -> Iterator[None]:
    """See above. What other threads compile runs as they are used to."""
    compiler = torch.compile
    is_eager = "torch._dynamo" in sys.modules

    def compile_apart(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_eager
        made: Any = compiler(*args, **kwargs)
        if not any(mode is recorder for mode in _get_current_dispatch_mode_stack()):
            return made
        if not is_eager:  # torch's compiler is imported by now
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            is_eager = True
        function = _find_higher_order(sys._getframe(1))
        if function is None:
            return made

        def run(*args: Any, **kwargs: Any) -> Any:
            recorder.fail(COMPILES.format(function))
            with _unrecorded(recorder, reads):
                return made(*args, **kwargs)

        return run

    with ExitStack() as stack:
        if is_eager:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(setattr, torch, "compile", compiler)
        _TORCH.compile = compile_apart
        yield


@contextmanager
def _unrecorded(recorder: Recorder, reads: SizeReads) -> Iterator[None]:
    """Inside, nothing of the recorded run is left."""
    with ExitStack() as stack:
        if recorder.positions.pause():
            stack.callback(recorder.positions.resume)
        if isinstance(_get_current_function_mode(), Escapes):  # type: ignore[no-untyped-call]
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.compiler.set_stance("default"))
        stack.enter_context(reads.builtins_of_python())
        yield


def _find_higher_order(frame: FrameType | None) -> str | None:
    """The function of torch's, as ``scan``, that compiles what it is given at ``frame``."""
    name = None
    while frame is not None and frame.f_code.co_filename.startswith(HIGHER_ORDER):
        name, frame = frame.f_code.co_name, frame.f_back
    return name
