"""A section of the benchmark in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_place import Place
from gpu_sections import Row, Section

from sparsify.errors import KernelFault, SparsifyError

POLL_S = 0.05
FAULT = 3  # the status of a process that has written why it ends
ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, KeyError, SparsifyError)


def measure_cells(place: Place, section: Section, first: int, rows: Path) -> None:
    """In the process: append the row of each cell from ``first`` on, or why it failed.

    After a fault of the device, nothing works in this process any more: it ends.
    """
    for cell in section.cells[first:]:
        start = time.monotonic()
        try:
            row = section.measure(place, cell)
        except ERRORS as error:
            append(rows, {**described(cell), "error": f"{type(error).__name__}: {error}"[:2000]})
            if isinstance(error, (KernelFault, torch.AcceleratorError)):
                sys.exit(FAULT)
            continue
        append(rows, {**row, "took_s": time.monotonic() - start})


def run_section(command: Sequence[str], section: Section, budget_s: float, rows: Path) -> list[Row]:
    """Run the section for at most ``budget_s``, again after each crash or hang; its rows."""
    end = time.monotonic() + budget_s
    rows.touch()
    while (first := len(read(rows))) < len(section.cells) and time.monotonic() < end:
        arguments = ("--section", section.name, "--first", str(first), "--rows", str(rows))
        process = subprocess.Popen([*command, *arguments])
        why = _watch(process, section, rows, end)
        if why is None:
            break
        done = len(read(rows))
        if why and done < len(section.cells):
            append(rows, {**described(section.cells[done]), "error": why})
    return read(rows)


def _watch(
    process: subprocess.Popen[bytes], section: Section, rows: Path, end: float
) -> str | None:
    """Wait for the process; why the cell that it was in has failed, "" if it has said so itself.

    None if the section is through, or its time is over.
    """
    done, since = len(read(rows)), time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        if len(read(rows)) > done:
            done, since = len(read(rows)), now
        hangs = now - since > section.cell_s
        if hangs or now > end:
            process.kill()
            process.wait()
            return f"no row within {section.cell_s:.0f} s" if hangs else None
    if process.returncode == FAULT:
        return ""
    return f"the process ended with status {process.returncode}" if process.returncode else None


def read(rows: Path) -> list[Row]:
    lines = rows.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # the last one may be half written


def append(rows: Path, row: Row) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def described(cell: Any) -> dict[str, Any]:
    return asdict(cell) if is_dataclass(cell) and not isinstance(cell, type) else {}
