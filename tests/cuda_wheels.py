"""What tests of CUDA text need besides a compiler: wheels of the test extra."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest

from sparsify.codegen.cuda import nvrtc


@cache
def cuda_include() -> Path | None:
    """The folder with cuda.h of the wheel ``nvidia-cuda-runtime``, if that is installed."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    headers = [h for place in places or () for h in sorted(Path(place).glob("*/include/cuda.h"))]
    return headers[0].parent if headers else None


needs_nvrtc = pytest.mark.skipif(
    nvrtc.why_unavailable() is not None,
    reason=f"nothing compiles for a GPU here: {nvrtc.why_unavailable()}",
)
needs_cuda_headers = pytest.mark.skipif(
    cuda_include() is None, reason="no cuda.h: install nvidia-cuda-runtime of the test extra"
)
