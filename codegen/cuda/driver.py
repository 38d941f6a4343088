"""The calls of NVIDIA's driver that loading and launching a cubin need, through ctypes.

``cuLaunchKernelEx`` is the one launch that takes clusters; CuPy does not offer it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sparsify.codegen.cuda.device import Grid, Limits
from sparsify.errors import Refusal

LIBRARY = "libcuda.so.1"
OLDEST = (12, 0)
"""The first driver with clusters, and with cubins of every CUDA 12 toolkit."""

INT, UINT, POINTER, SIZE = ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
OUT = ctypes.POINTER
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (UINT,),
    "cuDriverGetVersion": (OUT(INT),),
    "cuGetErrorName": (INT, OUT(ctypes.c_char_p)),
    "cuGetErrorString": (INT, OUT(ctypes.c_char_p)),
    "cuDeviceGetCount": (OUT(INT),),
    "cuDeviceGet": (OUT(INT), INT),
    "cuDeviceGetName": (ctypes.c_char_p, INT, INT),
    "cuDeviceGetAttribute": (OUT(INT), INT, INT),
    "cuDevicePrimaryCtxRetain": (OUT(POINTER), INT),
    "cuCtxGetCurrent": (OUT(POINTER),),
    "cuCtxSetCurrent": (POINTER,),
    "cuModuleLoadData": (OUT(POINTER), ctypes.c_char_p),
    "cuModuleGetFunction": (OUT(POINTER), POINTER, ctypes.c_char_p),
    "cuFuncGetAttribute": (OUT(INT), INT, POINTER),
    "cuFuncSetAttribute": (POINTER, INT, INT),
    "cuOccupancyMaxActiveBlocksPerMultiprocessor": (OUT(INT), POINTER, INT, SIZE),
    "cuLaunchKernelEx": (POINTER, POINTER, POINTER, POINTER),
    "cuStreamSynchronize": (POINTER,),
}

# CUdevice_attribute
MULTIPROCESSORS, L2_BYTES, THREADS_PER_MULTIPROCESSOR = 16, 38, 39
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
SHARED_PER_MULTIPROCESSOR, REGISTERS_PER_MULTIPROCESSOR, SHARED_PER_BLOCK = 81, 82, 97
BLOCKS_PER_MULTIPROCESSOR, CLUSTER_LAUNCH = 106, 120
# CUfunction_attribute
STATIC_SHARED, MAX_DYNAMIC_SHARED, LARGE_CLUSTERS = 1, 8, 14
# CUlaunchAttributeID
COOPERATIVE, CLUSTER_DIMENSION = 2, 4
PORTABLE_CLUSTER = 8


class DriverError(Exception):
    """A call that failed. ``status`` is its CUresult."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``; its value is a union of 64 bytes, of which at most 12 are used."""

    _fields_ = (("id", UINT), ("pad", UINT), ("value", UINT * 16))


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``. ``address`` is where it lies."""

    address: int

    _fields_ = (
        ("blocks", UINT * 3),
        ("threads", UINT * 3),
        ("shared_bytes", UINT),
        ("stream", POINTER),
        ("attributes", OUT(LaunchAttribute)),
        ("attribute_count", UINT),
    )


class Driver:
    """A library with the driver's functions, initialised. Raises DriverError, also later."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {name: library[name] for name in SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = SIGNATURES[name], INT
        self._contexts: dict[int, int] = {}
        # Takes the address of a LaunchConfig, a function, the address of the address of its one
        # argument, which is copied, and None. Returns a status for ``check``.
        self.launch_kernel: Callable[..., int] = self._functions["cuLaunchKernelEx"]
        self._call("cuInit", 0)

    def version(self) -> tuple[int, int]:
        """The CUDA version that the driver supports."""
        number = self._int("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def device_count(self) -> int:
        return self._int("cuDeviceGetCount")

    def limits(self, ordinal: int) -> Limits:
        device = self._int("cuDeviceGet", ordinal)
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), device)

        def get(attribute: int) -> int:
            return self._int("cuDeviceGetAttribute", attribute, device)

        return Limits(
            name=name.value.decode(errors="replace"),
            capability=(get(CAPABILITY_MAJOR), get(CAPABILITY_MINOR)),
            multiprocessors=get(MULTIPROCESSORS),
            shared_per_block=get(SHARED_PER_BLOCK),
            shared_per_multiprocessor=get(SHARED_PER_MULTIPROCESSOR),
            registers_per_multiprocessor=get(REGISTERS_PER_MULTIPROCESSOR),
            threads_per_multiprocessor=get(THREADS_PER_MULTIPROCESSOR),
            l2_bytes=get(L2_BYTES),
            cluster=PORTABLE_CLUSTER if get(CLUSTER_LAUNCH) else 1,
            blocks_per_multiprocessor=get(BLOCKS_PER_MULTIPROCESSOR),
        )

    def primary_context(self, ordinal: int) -> int:
        """The context that torch uses on that device."""
        if ordinal not in self._contexts:
            device = self._int("cuDeviceGet", ordinal)
            self._contexts[ordinal] = self._pointer("cuDevicePrimaryCtxRetain", device)
        return self._contexts[ordinal]

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        """Make ``context`` current in this thread; another one comes back afterwards."""
        before = self.current_context()
        if before == context:
            yield
            return
        self._call("cuCtxSetCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxSetCurrent", before)

    def current_context(self) -> int:
        """The context of this thread, 0 if it has none."""
        return self._pointer("cuCtxGetCurrent")

    def load_module(self, cubin: bytes) -> int:
        return self._pointer("cuModuleLoadData", cubin)

    def find_function(self, module: int, name: str) -> int:
        return self._pointer("cuModuleGetFunction", module, name.encode())

    def function_attribute(self, function: int, attribute: int) -> int:
        return self._int("cuFuncGetAttribute", attribute, function)

    def set_function_attribute(self, function: int, attribute: int, value: int) -> None:
        self._call("cuFuncSetAttribute", function, attribute, value)

    def resident_blocks(self, function: int, threads: int, shared_bytes: int) -> int:
        name = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        return self._int(name, function, threads, shared_bytes)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def _call(self, name: str, *arguments: object) -> None:
        self.check(self._functions[name](*arguments))

    def _int(self, name: str, *arguments: object) -> int:
        result = INT()
        self._call(name, ctypes.byref(result), *arguments)
        return result.value

    def _pointer(self, name: str, *arguments: object) -> int:
        result = POINTER()
        self._call(name, ctypes.byref(result), *arguments)
        return result.value or 0

    def check(self, status: int) -> None:
        """Raises DriverError if a call has failed."""
        if status:
            raise DriverError(status, self._describe(status))

    def _describe(self, status: int) -> str:
        said = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self._functions[name](status, ctypes.byref(text))
            said.append((text.value or b"unknown error").decode(errors="replace"))
        return f"{said[0]} ({status}): {said[1]}"


def launch_config(grid: Grid, stream: int) -> LaunchConfig:
    """``grid`` as the driver takes it."""
    attributes = []
    if grid.cooperative:
        attributes.append(_attribute(COOPERATIVE, 1))
    if grid.cluster > 1:
        attributes.append(_attribute(CLUSTER_DIMENSION, grid.cluster, 1, 1))
    kept = (LaunchAttribute * len(attributes))(*attributes)
    config = LaunchConfig(
        blocks=(grid.blocks, 1, 1),
        threads=(grid.threads, 1, 1),
        shared_bytes=grid.shared_bytes,
        stream=stream,
        attributes=kept,
        attribute_count=len(attributes),
    )
    config.address = ctypes.addressof(config)
    return config


@cache
def find_driver() -> Driver | Refusal:
    """The driver of this machine, or why there is none with a GPU."""
    install = "Install NVIDIA's driver (`nvidia-smi` shows it), or use the CPU."
    try:
        driver = Driver(ctypes.CDLL(LIBRARY))
        if driver.version() < OLDEST:
            found, needed = (".".join(map(str, v)) for v in (driver.version(), OLDEST))
            reason = f"The driver supports CUDA {found}; kernels need {needed}."
            return Refusal("backend-unavailable", reason, "Install a newer driver of NVIDIA.")
        if not driver.device_count():
            return Refusal("backend-unavailable", "There is no NVIDIA GPU.", "Use the CPU.")
    except OSError as error:
        return Refusal("backend-unavailable", f"There is no NVIDIA driver ({error}).", install)
    except AttributeError as error:  # a function is missing
        reason = f"The driver is too old ({error}); kernels need one for CUDA 12.0."
        return Refusal("backend-unavailable", reason, "Install a newer driver of NVIDIA.")
    except DriverError as error:
        return Refusal("backend-unavailable", f"The driver does not start: {error}.", install)
    return driver


def _attribute(kind: int, *value: int) -> LaunchAttribute:
    return LaunchAttribute(id=kind, value=(UINT * 16)(*value))
