"""Where the GPU benchmark runs: on a GPU, or on its emulator, where figures mean nothing."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_attempts import Attempts

from sparsify.codegen.backend import Backend
from sparsify.codegen.cuda.backend import CudaBackend
from sparsify.codegen.cuda.device import Device, Limits
from sparsify.codegen.cuda.driver import Driver, find_driver
from sparsify.codegen.cuda.gpu import Gpu
from sparsify.codegen.cuda.nvrtc import find_nvrtc, nvrtc_version
from sparsify.errors import Refusal
from sparsify.serving.emulation import emulated_device

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """``kernels`` compiles CUDA text, ``backend`` whole kernels; both run on ``device``.

    ``options`` are what ``sparsify`` is told so that it takes this backend. ``attempts`` are told
    what may end the process.
    """

    device: torch.device
    kernels: Device
    backend: Backend
    options: Mapping[str, Any]
    attempts: Attempts = field(default_factory=Attempts)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def limits(self) -> Limits:
        return self.kernels.limits(self.device)


def find_place(backend: str) -> Place | Refusal:
    """The place for ``cuda`` or ``cuda-emulated``, or why it is not here and what to install."""
    emulated = backend == "cuda-emulated"
    kernels: Device = emulated_device() if emulated else Gpu()
    if refusal := kernels.why_unavailable():
        return refusal
    device = torch.device("cpu") if emulated else torch.device("cuda", torch.cuda.current_device())
    options = {"backend": backend} if emulated else {}
    return Place(device, kernels, CudaBackend(kernels), options)


def describe(place: Place) -> dict[str, Any]:
    """Device, driver, versions and commit: what figures depend on."""
    driver = find_driver()
    cudnn: Any = torch.backends.cudnn  # without annotations
    return {
        "device": place.limits.name if place.is_gpu else "emulated",
        "capability": list(place.limits.capability),
        "multiprocessors": place.limits.multiprocessors,
        "driver_cuda": list(driver.version()) if isinstance(driver, Driver) else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvrtc": None if isinstance(find_nvrtc(), Refusal) else list(nvrtc_version()),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": cudnn.version() if place.is_gpu else None,
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "-uno")),
    }


def _output(*command: str) -> str | None:
    """The first line of what a command says; None if it is not here or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0]
