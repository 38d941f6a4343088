"""The machine in words, for plans and records."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def describe_machine(tensors: Iterable[Tensor] = ()) -> str:
    """Processor, cores and torch's threads: ``"Intel Xeon ..., 8 cores, 4 threads"``.

    Of tensors on a GPU, the GPU: ``"NVIDIA H100 ..., CUDA 13.0"``.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            return f"{torch.cuda.get_device_name(tensor.device)}, CUDA {torch.version.cuda}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
