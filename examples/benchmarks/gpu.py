"""All figures of the CUDA backend: verifies, then measures, in under eight minutes.

python examples/benchmarks/gpu.py                            # on a GPU: results/<device>.json
python examples/benchmarks/gpu.py --quick                    # a small cell of each section
python examples/benchmarks/gpu.py --quick --backend cuda-emulated    # that it runs, without a GPU
python examples/benchmarks/gpu.py --show FILE.json           # what a run has written, or a part

With ``SPARSIFY_CUDA_RATES=results/<device>.json`` predictions, which choose among strategies,
follow what was measured on this device; without it, what is stated of an H100.

Each section runs in a process of its own. A kernel that ends or hangs it is left out from there on,
and what it was compared with is measured all the same. The file is written anew with each row. At
the end all figures are printed, and then what to look at: what failed, and what is not as wished.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_attempts import Attempts
from gpu_place import Place, describe, find_place
from gpu_process import attempt_of, measure_cells, run_section
from gpu_sections import Row, Section, make_quick_sections, make_sections
from gpu_tables import tables
from gpu_targets import summary

from sparsify.errors import Refusal

RESULTS = Path(__file__).parent / "results"
SECONDS = 470.0


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.show:
        _show(json.loads(args.show.read_text(encoding="utf-8")))
        return
    place = find_place(args.backend)
    if isinstance(place, Refusal):
        sys.exit(f"{place.reason} {place.remedy}\n(--backend cuda-emulated runs without a GPU.)")
    if args.section:
        section = next(s for s in _sections(args) if s.name == args.section)
        attempts = Attempts(attempt_of(args.rows), json.loads(args.left_out))
        measure_cells(replace(place, attempts=attempts), section, args.first, args.rows)
        return
    _run_all(args, place)


def _run_all(args: argparse.Namespace, place: Place) -> None:
    start = time.monotonic()
    sections = [each for each in _sections(args) if not args.only or each.name in args.only]
    content: dict[str, Any] = {"environment": describe(place), "quick": args.quick, "sections": {}}
    content["cells"] = {section.name: len(section.cells) for section in sections}
    path = args.json or RESULTS / f"{_slug(content['environment']['device'])}.json"
    for section in sections:
        left = args.seconds - (time.monotonic() - start)

        def publish(rows: list[Row], name: str = section.name) -> None:
            content["sections"][name] = rows
            content["took_s"] = time.monotonic() - start
            _write(path, content)

        with tempfile.TemporaryDirectory() as folder:
            rows = run_section(
                [sys.executable, __file__, "--backend", args.backend, *["--quick"] * args.quick],
                section,
                section.budget_s if args.quick else min(section.budget_s, left),
                Path(folder) / "rows.jsonl",
                publish,
            )
        publish(rows)
        many, took = f"{len(rows)} of {len(section.cells)} rows", f"{content['took_s']:.0f} s"
        print(f"{section.name}: {many}, {took}", flush=True)
    _show(content)
    print(f"written to {path}")
    errors = [
        (n, row["error"])
        for n, rows in content["sections"].items()
        for row in rows
        if "error" in row
    ]
    if errors:
        sys.exit("\n".join(f"{name} FAILED: {error}" for name, error in errors))


def _show(content: Mapping[str, Any]) -> None:
    print("\n".join(tables(content["sections"])))
    print("\nwhat to look at:")
    print("\n".join(summary(content)) or "nothing: all was measured, and is as wished", flush=True)


def _write(path: Path, content: Any) -> None:
    """At once: who reads it, or ends this process, finds the file as it was or as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def _sections(args: argparse.Namespace) -> list[Section]:
    return make_quick_sections() if args.quick else make_sections()


def _slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small cell of each section")
    add("--backend", choices=("cuda", "cuda-emulated"), default="cuda")
    add("--only", nargs="+", help="sections to run")
    add("--seconds", type=float, default=SECONDS, help="what the sections may take, if not quick")
    add("--json", type=Path, help="where figures are written, if not to results/")
    add("--show", type=Path, help="print what such a file holds, and measure nothing")
    for name, kind in (("--section", str), ("--first", int), ("--rows", Path)):
        add(name, type=kind, help=argparse.SUPPRESS)  # of the process of one section
    add("--left-out", default="{}", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
