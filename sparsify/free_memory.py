"""Give memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys


def free_memory() -> None:
    """Let malloc give back the pages that nothing uses; does nothing without glibc.

    Recording makes small objects that live long between large tensors that do not. The holes that
    are left stay with the process: several times what the model needs, for as long as it runs.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
