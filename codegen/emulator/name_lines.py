"""Reports of faults: lines of the kernel in place of addresses in its code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

_CODE = re.compile(r"<\+(0x[0-9a-f]+)>")
_LINE = re.compile(r"(?:.*/)?([^/]+:\d+)(?: \(discriminator \d+\))?$")
LOOKUP_LIMIT_S = 60.0


def name_lines(reports: str, library: Path) -> list[str]:
    """The reports of a launch, one a line, with the lines of ``library``'s source.

    ``gather.cuh:40 from run_lif.cu:88``: a line of what was called, and that of the kernel.
    """
    addresses = sorted(set(_CODE.findall(reports)))
    lines = _lines_of(addresses, library) if addresses else {}
    return [_CODE.sub(lambda code: lines[code[1]], each) for each in reports.splitlines()]


def _lines_of(addresses: Sequence[str], library: Path) -> dict[str, str]:
    command = ["addr2line", "--addresses", "--inlines", f"--exe={library}", *addresses]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=LOOKUP_LIMIT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no binutils: the address is all there is
        return {address: f"{library}+{address}" for address in addresses}
    _, *parts = re.split(r"^0x[0-9a-f]+\n", answer, flags=re.MULTILINE)
    places = (_place_of(part.splitlines()) for part in parts)
    return dict(zip(addresses, places, strict=True))


def _place_of(frames: Sequence[str]) -> str:
    """The innermost line that is not the emulator's own, and the one of the kernel it is in."""
    places = [match[1] for frame in frames if (match := _LINE.match(frame))]
    own = [place for place in places if not place.startswith("cuda_")] or places or ["?"]
    return own[0] if len(own) == 1 else f"{own[0]} from {own[-1]}"
