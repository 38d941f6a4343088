"""Measure the machine's limits: bytes read per second from an array, floats added per second."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("roofline.cpp")
IN_FIRST_CACHE = 4096  # floats: 16 KiB
SECONDS = 0.03


@dataclass(frozen=True)
class Roofline:
    """Limits of this machine with torch's number of threads.

    ``bytes_per_second`` is for an array of the size that was asked for, so of the cache level that
    would hold it; ``adds_per_second`` for one that stays in each core's first cache.
    """

    bytes_per_second: float
    adds_per_second: float

    def least_ms(self, touched_bytes: float, adds: float) -> float:
        """No call that reads and adds so much can be faster than this."""
        seconds = max(touched_bytes / self.bytes_per_second, adds / self.adds_per_second)
        return seconds * 1e3


def measure_roofline(array_bytes: int) -> Roofline:
    """Compile and run the loops of ``roofline.cpp``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roofline.so"
        flags = ["-O3", "-ffast-math", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["c++", *flags, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    library.read_all.restype = ctypes.c_float
    library.read_all.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    floats_read = _rate(library, max(array_bytes // 4, IN_FIRST_CACHE))
    return Roofline(4 * floats_read, _rate(library, IN_FIRST_CACHE * torch.get_num_threads()))


def _rate(library: ctypes.CDLL, floats: int) -> float:
    """Floats per second: the best of five runs, each long enough for the clock."""
    data = torch.zeros(floats // 64 * 64)
    repeats = 1
    while _time(library, data, repeats) < SECONDS:
        repeats *= 2
    best = min(_time(library, data, repeats) for _ in range(5))
    return data.numel() * repeats / best


def _time(library: ctypes.CDLL, data: torch.Tensor, repeats: int) -> float:
    start = time.perf_counter()
    library.read_all(data.data_ptr(), data.numel(), repeats)
    return time.perf_counter() - start


if __name__ == "__main__":
    for kib in (64, 1024, 4096, 16384, 262144):
        measured = measure_roofline(kib * 1024)
        print(
            f"{kib:>7} KiB: {measured.bytes_per_second / 1e9:6.1f} GB/s; "
            f"{measured.adds_per_second / 1e9:.1f} G adds/s"
        )
