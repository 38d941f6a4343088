"""The command line of the benchmarks of inference."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import Size, measure
from networks import Network

Build = Callable[[int, int], Network]


def run(
    description: str, build: Build, sizes: Sequence[Size], argv: Sequence[str] | None = None
) -> None:
    """Measure ``sizes``, or those that the arguments give."""
    args = _parser(description).parse_args(argv)
    if args.quick:
        args.rounds, args.compile_steps = 3, 0
        sizes = [Size(hidden=256, batch=2, steps=20)]
    elif args.hidden or args.batch or args.activity:
        sizes = [
            Size(hidden, batch, activity)
            for hidden in args.hidden or [1024]
            for batch in args.batch or [1]
            for activity in args.activity or [0.075]
        ]
    if args.steps is not None:
        sizes = [replace(size, steps=args.steps) for size in sizes]
    with torch.no_grad():
        figures = list(_measure_all(build, sizes, args))
    save(args.json, figures=figures)


def _measure_all(
    build: Build, sizes: Sequence[Size], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Every size; torch.compile takes part in all its steps, or in a second, shorter run of all."""
    for size in sizes:
        short = args.compile_steps if args.compile_steps is not None else size.steps
        compiled = short >= size.steps and not args.no_compile
        memory = not args.no_memory
        yield measure(build, size, rounds=args.rounds, compiled=compiled, memory=memory)
        if 0 < short < size.steps and not args.no_compile:
            shorter = replace(size, steps=short)
            yield measure(build, shorter, rounds=args.rounds, compiled=True, memory=False)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one small size, to see that it runs")
    add("--hidden", type=int, nargs="+", help="neurons a layer")
    add("--batch", type=int, nargs="+", help="samples a call")
    add("--activity", type=float, nargs="+", help="share that fires, 0.05 is 5 %%")
    add("--steps", type=int, help="time steps, 100 if not given")
    add("--rounds", type=int, default=30, help="interleaved rounds")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add(
        "--compile-steps",
        type=int,
        metavar="N",
        help="torch.compile unrolls the loop and takes minutes for a hundred steps: leave it out "
        "there, and compare it in a second run of N steps, in which everything has N steps",
    )
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", type=Path, help="write all figures to this file")
    return parser


def save(path: Path | None, **content: Any) -> None:
    """Write ``content``, and what it was measured on, to the file if one was asked for."""
    if path:
        content = {"machine": machine(), **content}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
