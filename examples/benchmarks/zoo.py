"""Every network of the tests' zoo against eager: none may be slower by more than 5 % or 20 us.

python examples/benchmarks/zoo.py
python examples/benchmarks/zoo.py --steps 100 --batch 1 --only "recurrent" "LISTA"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import sparsify
from sparsify.bench import measure_pairs

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.zoo import BATCH, ENTRIES

MOST_SLOWER = 1.05
MOST_ADDED_MS = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", help="names of networks")
    args = parser.parse_args()
    slower = []
    for entry in ENTRIES:
        if args.only and entry.name not in args.only:
            continue
        model, x = entry.model(), entry.inputs(args.steps, args.batch)
        with torch.no_grad():
            fast: Any = sparsify.sparsify(model, x)
            timings = measure_pairs({"eager": model, "sparsify": fast}, args.rounds, inputs=[x])
        eager, ours = timings.median_ms("eager"), timings.median_ms("sparsify")
        ratio = timings.ratio("eager", "sparsify")
        decisions = [site.decision for site in fast.report.sites]
        counts = ", ".join(f"{decisions.count(d)} {d}" for d in sorted(set(decisions)))
        print(f"{entry.name:<26} {eager:9.3f} ms {ours:9.3f} ms   {ratio}   {counts}")
        if timings.why_contended:
            print(f"  NOT VALID: {timings.why_contended}")
        elif ours > MOST_SLOWER * eager and ours > eager + MOST_ADDED_MS:
            slower.append(entry.name)
    if slower:
        print(f"slower than eager: {', '.join(slower)}")
    return len(slower)


if __name__ == "__main__":
    raise SystemExit(main())
