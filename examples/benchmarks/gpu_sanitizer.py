"""NVIDIA's compute-sanitizer over the kernels that are verified.

python examples/benchmarks/gpu_sanitizer.py          # at most 150 s for each of its tools, on a GPU

It sees on the device what the emulator checks without one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

from gpu_place import find_place
from gpu_verify import check_kernels

from sparsify.errors import Refusal

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
MOST_SECONDS = 150.0
FOUND = 9  # the status with which it ends when it has found something


def main() -> None:
    """Run all tools, or the kernels alone, which is what the tools run."""
    if "--kernels" in sys.argv:
        place = find_place("cuda")
        if isinstance(place, Refusal):
            sys.exit(f"{place.reason} {place.remedy}")
        for checked in check_kernels(place):
            print(checked)
        return
    program = shutil.which("compute-sanitizer")
    if program is None:
        sys.exit("compute-sanitizer is not on the path: it comes with the CUDA toolkit.")
    failed = [tool for tool in TOOLS if not passes(program, tool)]
    sys.exit(f"objections of {', '.join(failed)}: see above" if failed else 0)


def passes(program: str, tool: str) -> bool:
    """False if the tool objects to anything, or takes too long; it says to what."""
    options = ("--tool", tool, "--error-exitcode", str(FOUND))
    print(f"== {tool}", flush=True)
    command = [program, *options, sys.executable, __file__, "--kernels"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(MOST_SECONDS) == 0
    except subprocess.TimeoutExpired:
        print(f"== {tool}: not through after {MOST_SECONDS:.0f} s")
        os.killpg(process.pid, signal.SIGKILL)  # it starts Python as a process of its own
        return False


if __name__ == "__main__":
    main()
