"""A section of the benchmark in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from gpu_attempts import FAULTS, read_attempt
from gpu_place import Place
from gpu_sections import Row, Section

from sparsify.errors import SparsifyError

POLL_S = 0.05
KILLED_S = 10.0  # in which a process that is killed should be gone
FAULT = 3  # the status of a process that has written why it ends
MOST_FAILURES = 3  # cells in a row that end their process, until a section is given up
ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, KeyError, SparsifyError)
Publish = Callable[[list[Row]], object]


def measure_cells(place: Place, section: Section, first: int, rows: Path) -> None:
    """In the process: append the row of each cell from ``first`` on, or why it failed.

    After a fault of the device, nothing works in this process any more: it ends.
    """
    for cell in section.cells[first:]:
        start = time.monotonic()
        place.attempts.end()
        try:
            row = section.measure(place, cell)
        except ERRORS as error:
            why, is_fault = f"{type(error).__name__}: {error}"[:2000], isinstance(error, FAULTS)
            if not (is_fault and place.attempts.fail(why)):
                append(rows, {**described(cell), "error": why})
            if is_fault:
                sys.exit(FAULT)
            continue
        append(rows, {**row, "took_s": time.monotonic() - start})


def run_section(
    command: Sequence[str],
    section: Section,
    budget_s: float,
    rows: Path,
    publish: Publish = lambda rows: None,
) -> list[Row]:
    """Run the section for at most ``budget_s``, again after each crash or hang; its rows.

    What was being tried then is left out from there on, and its cell is measured again without it.
    ``publish`` is given the rows whenever there is a new one.
    """
    end, failures = time.monotonic() + budget_s, 0
    left_out: dict[str, str] = {}
    attempt = attempt_of(rows)
    rows.touch()
    while (first := len(read(rows))) < len(section.cells) and time.monotonic() < end:
        attempt.unlink(missing_ok=True)
        arguments = ("--section", section.name, "--first", str(first), "--rows", str(rows))
        without = ("--left-out", json.dumps(left_out)) if left_out else ()
        process = subprocess.Popen([*command, *arguments, *without])
        why = _watch(process, section, rows, end, publish)
        if why is None:
            break
        name, said = read_attempt(attempt)
        if name and name not in left_out:
            left_out[name] = said or why
            continue
        done = len(read(rows))
        if why and done < len(section.cells):
            append(rows, {**described(section.cells[done]), "error": why})
            publish(read(rows))
        failures = failures + 1 if done == first else 0
        if failures == MOST_FAILURES:
            break
    return read(rows)


def attempt_of(rows: Path) -> Path:
    """Beside the rows: what the process is trying."""
    return rows.with_suffix(".attempt")


def _watch(
    process: subprocess.Popen[bytes], section: Section, rows: Path, end: float, publish: Publish
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
            publish(read(rows))
        hangs = now - since > section.cell_s
        if hangs or now > end:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a device may hold it for longer
                process.wait(KILLED_S)
            return f"no row within {section.cell_s:.0f} s" if hangs else None
    publish(read(rows))
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
