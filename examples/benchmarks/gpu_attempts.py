"""What a process of a section is about to try: should it end, it is not tried again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sparsify.errors import KernelFault

FAULTS = (KernelFault, torch.AcceleratorError)
"""After these, nothing works in a process any more."""


@dataclass(frozen=True)
class Attempts:
    """``file`` names what is tried now; ``left_out`` is what has ended a process, and how."""

    file: Path | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """Raises RuntimeError if it is left out."""
        self.end()
        if name in self.left_out:
            raise RuntimeError(f"left out, because {self.left_out[name]}")
        self._write(name, "")

    def end(self) -> None:
        """What follows is nobody's in particular."""
        self._write("", "")

    def fail(self, why: str) -> bool:
        """Say why the process ends; False if nothing is being tried."""
        name, _ = read_attempt(self.file)
        self._write(name, why)
        return bool(name)

    def _write(self, name: str, why: str) -> None:
        if self.file is not None:
            self.file.write_text(json.dumps([name, why]), encoding="utf-8")


def read_attempt(file: Path | None) -> tuple[str, str]:
    """What is tried, and why it has failed; "" where that is not known."""
    try:
        name, why = json.loads(file.read_text(encoding="utf-8")) if file else ("", "")
    except (OSError, ValueError):
        return "", ""
    return name, why
