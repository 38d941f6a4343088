"""What is said when sparsify itself fails: which of its lines, and how to report it."""

from __future__ import annotations

import os
import traceback

from sparsify.errors import CompileError, Refusal

PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
REMEDY = (
    "Please report it with the traceback, fast.compiled.failure.log (strict=True raises it); "
    "the results are those of your model."
)


def describe_failure(error: Exception, during: str) -> CompileError:
    """The failure as an error that carries the traceback as its log, and our line."""
    path = _own_line(error)
    kind = type(error).__name__
    message = f"sparsify failed {during}, in {path} ({kind}: {error}); this is a bug of sparsify"
    failure = CompileError(message, "".join(traceback.format_exception(error)), path)
    failure.__cause__ = error
    return failure


def refuse_failure(failure: CompileError) -> Refusal:
    """Why a model runs its original operations after ``failure``."""
    reason = str(failure).partition("\n")[0]
    return Refusal("bug", f"{reason}.", REMEDY, None, {"source": failure.source_path})


def is_own(error: Exception) -> bool:
    """Whether a line of sparsify raised ``error``: not the model, and nothing that they called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_of_package(frames[-1].filename)


def _own_line(error: Exception) -> str:
    """The innermost line of sparsify, ``passes/split_time.py:88``, that ``error`` went through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_of_package(frame.filename):
            file = os.path.relpath(os.path.realpath(frame.filename), PACKAGE)
            return f"{file}:{frame.lineno}"
    return "an unknown line"


def _is_of_package(file: str) -> bool:
    parts = os.path.relpath(os.path.realpath(file), PACKAGE).split(os.sep)
    return parts[0] in ("sparsify", "passes", "codegen")
