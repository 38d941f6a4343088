"""Bytes of tensors that a call has alive at once: of every network of the tests' zoo, and eager's.

python examples/benchmarks/zoo_memory.py
python examples/benchmarks/zoo_memory.py --steps 100 --batch 16 --only "recurrent" "LISTA"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsify

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.live_bytes import peak_of
from tests.zoo import BATCH, ENTRIES

KIB = 2**10


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each network of which something is replaced: eager, ours, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--only", nargs="+", help="names of networks")
    args = parser.parse_args(argv)
    for entry in ENTRIES:
        if args.only and entry.name not in args.only:
            continue
        model, x = entry.model(), entry.inputs(args.steps, args.batch)
        fast: Any = sparsify.sparsify(model, x, timing=False)
        if not fast.compiled.binaries:
            continue
        eager, ours = peak_of(partial(model, x)), peak_of(partial(fast, x))
        sizes = f"{eager / KIB:10.0f} KiB {ours / KIB:10.0f} KiB"
        print(f"{entry.name:<26} {sizes} {ours / eager:6.2f}x", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
