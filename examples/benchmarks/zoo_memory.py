"""Bytes of tensors that a call has alive at once: of every network of the tests' zoo, and eager's.

python examples/benchmarks/zoo_memory.py
python examples/benchmarks/zoo_memory.py --steps 100 --batch 16 --only "recurrent" "LISTA"
python examples/benchmarks/zoo_memory.py --values 1                  # chunks of a single step

Beside the ratio stands what one chunk of time of the values that kernels hand to one another may
take, above which calls run in several: by so much ours may be more than eager's. Calls are those
after the first ones, which record.
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
from sparsify.graphs import time_chunks
from sparsify.graphs.time_chunks import TimeChunks

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.live_bytes import peak_of
from tests.models.zoo import BATCH, ENTRIES

KIB = 2**10
FIRST_CALLS = 3  # of which each may be recorded: a state that is left behind has other sizes then


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each network of which something is replaced: eager, ours, the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--values", type=int, help="that kernels hand on in a chunk of time")
    parser.add_argument("--only", nargs="+", help="names of networks")
    args = parser.parse_args(argv)
    if args.values:
        time_chunks.CHUNK_VALUES, time_chunks.OF_WEIGHTS = args.values, 0
    for entry in ENTRIES:
        if args.only and entry.name not in args.only:
            continue
        model, x = entry.model(), entry.inputs(args.steps, args.batch)
        fast: Any = sparsify.sparsify(model, x, timing=False)
        if not fast.compiled.binaries:
            continue
        for _ in range(FIRST_CALLS):
            model(x)
            fast(x)
        eager, ours = peak_of(partial(model, x)), peak_of(partial(fast, x))
        chunks = [m for m in fast.compiled.graph.children() if isinstance(m, TimeChunks)]
        allowed = sum(each.handed.most_bytes() for each in chunks)
        sizes = f"eager {eager / KIB:8.0f} KiB, ours {ours / KIB:8.0f} KiB, {ours / eager:5.2f}x"
        chunk = f"a chunk {allowed / KIB:5.0f} KiB" if chunks else ""
        print(f"{entry.name:<26} {sizes} {chunk}".rstrip(), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
