"""Where bugs of sparsify end: the user's call goes on with the original operations.

This is the only file that catches every exception. ``run_bounded`` stands around everything that
is done after a recorded run, ``record_or_run`` around the run itself.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.errors import CompileError, Refusal, SparsifyError
from sparsify.recording.keep_state import Snapshot
from sparsify.recording.record import record
from sparsify.recording.recording import Args, Kwargs, Recording, Unrecorded

PACKAGE = str(Path(__file__).resolve().parents[2])
REMEDY = (
    "Please report it with the traceback, fast.compiled.failure.log (strict=True raises it); "
    "the results are those of your model."
)

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
SMALLER = "Give sparsify a smaller example, as of fewer rows: kernels serve other sizes, too."


@dataclass(frozen=True)
class Failed:
    """The recorder failed; the model alone gave ``result``."""

    result: Any
    failure: CompileError


def run_bounded(work: Callable[[], None], during: str) -> CompileError | None:
    """Run ``work``; anything that it does not raise on purpose is a bug and returned.

    A machine without enough memory is none.
    """
    try:
        work()
    except (SparsifyError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        return describe_failure(error, during)
    return None


@contextmanager
def explained_by(check: Callable[[], object]) -> Iterator[None]:
    """What goes wrong inside is what ``check`` raises, if it does; a machine's memory is none."""
    try:
        yield
    except OUT_OF_MEMORY:
        raise
    except Exception:
        check()
        raise


def record_or_run(
    model: nn.Module, args: Args, kwargs: Kwargs, before: Snapshot, restore: bool
) -> Recording | Unrecorded | Failed:
    """``record``, or the model alone where the recorder fails; what the model raises is raised.

    ``before`` was taken of the model; with ``restore`` the model is left as it was.
    """
    try:
        recorded = record(model, args, kwargs, restore=restore)
    except SparsifyError:
        raise
    except Exception as error:
        if not is_own(error):
            raise
        failure = describe_failure(error, "while recording")
    else:
        if restore:
            before.put_back()  # lists of states that others took the place of, too
        return recorded
    # What torch raises passes lines of ours too. Then the model alone raises it as well.
    before.put_back()
    result = model.forward(*args, **kwargs)
    if restore:
        before.put_back()
    return Failed(result, failure)


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


def refuse_memory(error: Exception) -> Refusal:
    """Why a call runs the original where its compilation ran out of memory."""
    reason = f"There was not enough memory to compile it: {str(error).strip() or 'MemoryError'}"
    return Refusal("backend-unavailable", f"{reason.rstrip('.')}.", SMALLER)


def is_own(error: Exception) -> bool:
    """Whether a line of sparsify raised ``error``: not the model, and nothing that they called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_of_package(frames[-1].filename)


def _own_line(error: Exception) -> str:
    """The innermost line of sparsify, ``passes/hoisting/split_time.py:88``, of ``error``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_of_package(frame.filename):
            file = os.path.relpath(os.path.realpath(frame.filename), PACKAGE)
            return f"{file}:{frame.lineno}"
    return "an unknown line"


def _is_of_package(file: str) -> bool:
    parts = os.path.relpath(os.path.realpath(file), PACKAGE).split(os.sep)
    return parts[0] in ("sparsify", "passes", "codegen")
