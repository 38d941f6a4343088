"""The GPU as a Device: cubins through NVRTC, launched on torch's current stream.

With ``SPARSIFY_NVTX=1`` every launch is an NVTX range that names what of the model it computes.
With ``CUDA_LAUNCH_BLOCKING=1`` every launch is waited for, so that a fault is reported where it
happens.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cache import is_intact
from sparsify.codegen.cuda import driver, nvrtc
from sparsify.codegen.cuda.device import Grid, Launch, Limits, Memory, Word
from sparsify.codegen.cuda.driver import Driver, DriverError, LaunchConfig, find_driver
from sparsify.errors import BackendUnavailable, CompileError, KernelFault, Refusal

REMEMBERED = 8  # launches that a late report of a fault names
CONFIGS = 256  # of one kernel; batch and stream differ between calls
OUT_OF_MEMORY, NO_BINARY = 2, 209
FAULTS = {700, 702, 710, 714, 715, 716, 717, 718, 719}
"""What a kernel that ran earlier may have done; every later call of the process answers so."""
WORD_BYTES = 8
_nvtx: Any = torch.cuda.nvtx  # without annotations
# As torch's own compiler asks; torch.cuda.current_stream makes an object of it each time.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Gpu:
    """NVIDIA's GPUs. ``architecture`` (``sm_90``) compiles for a device that is not there."""

    name = "cuda"
    type = "cuda"

    def __init__(self, architecture: str | None = None) -> None:
        self._architecture = architecture
        self._limits: dict[int, Limits] = {}
        # Modules are never unloaded: a captured CUDA graph may launch their kernels at any time.
        self._loaded: dict[tuple[Path, str, int], GpuFunction] = {}
        self._launched: deque[str] = deque(maxlen=REMEMBERED)

    def why_unavailable(self) -> Refusal | None:
        """Why nothing runs on the current device: CuPy, NVRTC, driver or device."""
        if torch.version.cuda is None:
            reason = f"This torch ({torch.__version__}) was built without CUDA."
            return Refusal("backend-unavailable", reason, "Install a torch with CUDA.")
        if refusal := nvrtc.why_unavailable():
            return refusal
        found = find_driver()
        if isinstance(found, Refusal):
            return found
        compiler, supported = nvrtc.nvrtc_version(), found.version()
        if supported[0] < compiler[0]:
            reason = (
                f"The driver supports CUDA {_dotted(supported)}; what NVRTC {_dotted(compiler)}"
                f" compiles needs a driver for CUDA {compiler[0]}.0."
            )
            remedy = "Install a newer driver, or CuPy and NVRTC of CUDA 12: 'sparsify-fx[cuda12]'."
            return Refusal("backend-unavailable", reason, remedy)
        target = nvrtc.architecture_for(self.limits(_current()).capability)
        return target if isinstance(target, Refusal) else None

    def limits(self, device: torch.device) -> Limits:
        """What ``device`` has. Raises BackendUnavailable without a driver."""
        ordinal = _ordinal(device)
        if ordinal not in self._limits:
            self._limits[ordinal] = _require_driver().limits(ordinal)
        return self._limits[ordinal]

    def compile(self, source: Source, headers: Mapping[str, str]) -> Path:
        """The cubin for the current device, or for the architecture that was asked for.

        Registers may spill, as they do with some compiler in some kernel of a user: such a kernel
        is right, and whether it is fast is measured.
        Raises CompileError, and BackendUnavailable without NVRTC or for a device that is too old.
        """
        return nvrtc.compile_cubin(source, headers, self._target(), spills=True)

    def load(self, path: Path, entry: str, device: torch.device, title: str = "") -> GpuFunction:
        """The kernel ``entry`` of a cubin on ``device``, called ``title`` in reports.

        Raises OSError if the cubin is not what was compiled, CompileError if the driver does not
        take it and torch.OutOfMemoryError if it does not fit.
        """
        key = path, entry, _ordinal(device)
        if key not in self._loaded:
            self._loaded[key] = self._load(*key, title or entry.removeprefix("run_"))
        return self._loaded[key]

    def stream(self, device: torch.device) -> int | None:
        """torch's current stream of ``device``, None while it is captured."""
        if torch.cuda.is_current_stream_capturing():
            return None
        return current_stream(device)

    def _load(self, path: Path, entry: str, ordinal: int, title: str) -> GpuFunction:
        if not is_intact(path):
            remedy = f"it was not loaded. Delete {path.parent}."
            raise OSError(f"{path} is not what was compiled; {remedy}")
        api = _require_driver()
        limits = self.limits(torch.device("cuda", ordinal))
        try:
            context = api.primary_context(ordinal)
            with api.in_context(context):
                handle = api.find_function(api.load_module(path.read_bytes()), entry)
                _lift_limits(api, handle, limits)
        except DriverError as error:
            if error.status == OUT_OF_MEMORY:
                message = f"no memory to load kernel {entry!r} on cuda:{ordinal}: {error}"
                raise torch.OutOfMemoryError(message) from error
            if error.status in FAULTS:
                raise _earlier_fault(title, error, self._launched) from error
            message = f"{limits.name} ({limits.architecture}) does not load {path}."
            raise CompileError(message, str(error), str(path.parent)) from error
        return GpuFunction(api, context, handle, ordinal, title, self._launched)

    def _target(self) -> str:
        if self._architecture:
            return self._architecture
        found = nvrtc.architecture_for(self.limits(_current()).capability)
        if isinstance(found, Refusal):
            raise BackendUnavailable(f"{found.reason} {found.remedy}")
        return found


class GpuFunction:
    """A kernel on one device. ``title`` is what profilers and reports of faults call it."""

    def __init__(
        self,
        api: Driver,
        context: int,
        handle: int,
        ordinal: int,
        title: str,
        launched: deque[str],
    ) -> None:
        self._api, self._context, self._handle = api, context, handle
        self._launch_kernel = api.launch_kernel
        self._device = torch.device("cuda", ordinal)
        self._title, self._launched = title, launched
        # Never changed once they are made: launches of other threads read them.
        self._configs: dict[tuple[Grid, int], LaunchConfig] = {}
        self._waits = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        self._marks = os.environ.get("SPARSIFY_NVTX") == "1"

    def launch(self, grid: Grid, words: Sequence[Word]) -> None:
        """Start the kernel on torch's current stream of its device.

        Raises KernelFault if it cannot be started, or if one that ran before has failed.
        """
        stream = current_stream(self._device)
        self._start(grid, self._config(grid, stream), stream, _argument(words))

    def prepare(
        self, grid: Grid, words: Sequence[Word], places: Sequence[int], stream: int
    ) -> Launch:
        """See ``Function.prepare``. Raises what ``launch`` raises."""
        template, config, start = _argument(words), self._config(grid, stream), self._start
        pairs = [(i, 1 + place) for i, place in enumerate(places)]
        changing = set(places)
        kept = [w for i, w in enumerate(words) if i not in changing and isinstance(w, Memory)]

        # So that a launch is a few instructions: this is most of what a call takes.
        def launch(tensors: Sequence[torch.Tensor], kept: Sequence[Memory] = kept) -> None:
            argument = template[:]
            for i, place in pairs:
                argument[place] = tensors[i].data_ptr()
            start(grid, config, stream, argument)

        return launch

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` with that much dynamic memory a multiprocessor holds."""
        with self._api.in_context(self._context):
            return self._api.resident_blocks(self._handle, threads, shared_bytes)

    def _start(self, grid: Grid, config: LaunchConfig, stream: int, argument: array[int]) -> None:
        """``argument`` is a place for its own address, and the struct behind that."""
        address, _ = argument.buffer_info()
        argument[0] = address + WORD_BYTES
        if self._marks:
            _nvtx.range_push(self._title)
        try:
            status = self._launch_kernel(config.address, self._handle, address, None)
            if status:
                self._start_in_context(status, config.address, address)
        except DriverError as error:
            raise self._fault(error, grid) from error
        finally:
            if self._marks:
                _nvtx.range_pop()
        self._launched.append(self._title)
        if self._waits:
            self._wait(stream)

    def _start_in_context(self, status: int, config: int, argument: int) -> None:
        """Again, where it failed because this thread has another context, or none yet."""
        if self._api.current_context() == self._context:
            self._api.check(status)
        with self._api.in_context(self._context):
            self._api.check(self._launch_kernel(config, self._handle, argument, None))

    def _config(self, grid: Grid, stream: int) -> LaunchConfig:
        config = self._configs.get((grid, stream))
        if config is None:
            if len(self._configs) >= CONFIGS:
                self._configs = {}
            config = self._configs[grid, stream] = driver.launch_config(grid, stream)
        return config

    def _wait(self, stream: int) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        try:
            self._api.synchronize(stream)
        except DriverError as error:
            said = f"It ran, and then the device said {error}."
            raise KernelFault(self._title, [said]) from error

    def _fault(self, error: DriverError, grid: Grid) -> KernelFault:
        if error.status in FAULTS:
            return _earlier_fault(self._title, error, self._launched)
        said = f"It was not started: {error}. It was launched as {grid}."
        return KernelFault(self._title, [said])


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream of ``device``."""
    if _raw_stream is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(_raw_stream(_ordinal(device)))


def _argument(words: Sequence[Word]) -> array[int]:
    """A place for an address, and the struct of ``words``.

    Integers are in two's complement; an array of ctypes would be far slower.
    """
    return array("q", [0, *(w if isinstance(w, int) else w.tensor.data_ptr() for w in words)])


def _earlier_fault(name: str, error: DriverError, launched: Sequence[str]) -> KernelFault:
    """The device reports what a kernel did long after it was launched."""
    reports = [f"A kernel that ran before it has failed: {error}."]
    if launched:
        reports.append(f"Of sparsify, these were launched last: {', '.join(launched)}.")
    reports.append("Run it again with CUDA_LAUNCH_BLOCKING=1 to see which one it is.")
    return KernelFault(name, reports)


def _lift_limits(api: Driver, handle: int, limits: Limits) -> None:
    """Allow all dynamic shared memory of a block, and clusters of more than 8 blocks."""
    static = api.function_attribute(handle, driver.STATIC_SHARED)
    allowed = limits.shared_per_block - static
    api.set_function_attribute(handle, driver.MAX_DYNAMIC_SHARED, allowed)
    if limits.cluster > 1:
        api.set_function_attribute(handle, driver.LARGE_CLUSTERS, 1)


def _require_driver() -> Driver:
    found = find_driver()
    if isinstance(found, Refusal):
        raise BackendUnavailable(f"{found.reason} {found.remedy}")
    return found


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _ordinal(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
