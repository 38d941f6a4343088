"""The kernels of tests/cuda, each of which is right, and wrong where BUG is defined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsify.codegen.backend import Source
from sparsify.codegen.cuda.device import Grid, Memory, Word
from sparsify.codegen.emulator.device import EmulatedDevice
from sparsify.errors import KernelFault

FOLDER = Path(__file__).parent / "cuda"
FILES = ("warps.cu", "blocks.cu", "memory.cu", "wild.cu", "grids.cu", "clusters.cu")
SIZE = 256  # elements of the operands, see planted.h
LAUNCH = re.compile(r"// <<<(\d+), (\d+)>>>(?: cluster (\d+))?( cooperative)?")
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(')
SHARED = re.compile(r"// shared (\d+)")
REPORTED = re.compile(r"// reported: ([a-z |-]+)$")


@dataclass(frozen=True)
class Planted:
    """A kernel, its grid, and what its bug must be reported as: (kind, line of the file)."""

    file: str
    name: str
    grid: Grid
    reported: frozenset[tuple[str, int]]

    def source(self) -> Source:
        return Source((FOLDER / self.file).read_text(), self.file, self.name)

    def run(self, device: EmulatedDevice, *, bug: bool) -> tuple[str, ...]:
        """Compile and launch it; the reports of its faults."""
        path = device.compile(self.source(), headers(bug=bug))
        try:
            device.load(path, self.name, torch.device("cpu")).launch(self.grid, operands())
        except KernelFault as fault:
            return fault.reports
        return ()

    def is_found(self, reports: Sequence[str]) -> bool:
        """Whether one of the reports is of an expected kind, at the line marked with it."""
        return any(
            report.startswith(f"{kind}: ") and re.search(rf"\b{self.file}:{line}\b", report)
            for report in reports
            for kind, line in self.reported
        )


def headers(*, bug: bool) -> dict[str, str]:
    """What the files include."""
    return {"planted.h": ("#define BUG\n" if bug else "") + (FOLDER / "planted.h").read_text()}


def operands() -> list[Word]:
    """The words of planted.h's Call, anew."""
    return [
        Memory(torch.arange(1.0, SIZE + 1), "in"),
        Memory(torch.arange(SIZE, dtype=torch.int32) % 16, "indices"),
        Memory(torch.empty(SIZE), "out", written=True, fresh=True),
        Memory(torch.empty(SIZE), "scratch", written=True, fresh=True),
        Memory(torch.zeros(8, dtype=torch.int32), "counters", written=True),
        200,
    ]


def read_planted(file: str) -> list[Planted]:
    """The kernels of a file. Marks outside of them, in what they call, count for all of them."""
    found: list[Planted] = []
    launch: re.Match[str] | None = None  # of the kernel that is being read
    name, shared = "", 0
    marks: set[tuple[str, int]] = set()
    marks_for_all: set[tuple[str, int]] = set()
    for number, line in enumerate((FOLDER / file).read_text().splitlines(), start=1):
        if begin := LAUNCH.match(line):
            launch, name, shared, marks = begin, "", 0, set()
        if kernel := KERNEL.match(line):
            name = kernel[1]
        if size := SHARED.search(line):
            shared = int(size[1])
        if mark := REPORTED.search(line):
            kinds = mark[1].split("|")
            (marks if launch else marks_for_all).update((kind, number) for kind in kinds)
        if line == "}" and launch:
            blocks, threads, cluster, cooperative = launch.groups()
            grid = Grid(int(blocks), int(threads), shared, int(cluster or 1), bool(cooperative))
            found.append(Planted(file, name, grid, frozenset(marks)))
            launch = None
    return [replace(each, reported=each.reported | marks_for_all) for each in found]
