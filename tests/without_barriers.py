"""Kernels without one of their barriers: the emulator must object, or the barrier is not needed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

ORDERING = (
    "__syncthreads",
    "__syncwarp",
    "__threadfence",
    "__threadfence_block",
    "__barrier_sync_count",
    "__cluster_barrier_arrive",
    "__cluster_barrier_wait",
)
VOTES = re.compile(r"\b__syncthreads_(?:or|and|count)\s*(?=\()")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class Mutant:
    """Texts in which one statement is missing; the lines keep their numbers."""

    texts: Mapping[str, str]
    file: str
    line: int
    statement: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} without {self.statement}"


def without_each_barrier(
    texts: Mapping[str, str], names: Sequence[str] = ORDERING
) -> Iterator[Mutant]:
    """The files ``texts`` (name to text), with each barrier or fence in turn taken away.

    ``names`` are the functions whose calls, as whole statements, are taken away; methods by their
    bare name. Of __syncthreads_or(p) and its like, whose value is used, p is left.
    """
    called = "|".join(re.escape(name) for name in names)
    statement = re.compile(rf"\b(?:\w+(?:\.|->|::))*(?:{called})\s*\([^;{{}}]*\)\s*;")
    for file, text in texts.items():
        code = COMMENT.sub(_blank, text)  # of the same length
        for match in statement.finditer(code):
            if _begins_statement(code[: match.start()]):
                yield _mutant(texts, file, match.start(), match.end(), ";")
        if "__syncthreads" in names:
            for match in VOTES.finditer(code):
                yield _mutant(texts, file, match.start(), match.end(), "")


def _mutant(texts: Mapping[str, str], file: str, begin: int, end: int, instead: str) -> Mutant:
    text = texts[file]
    removed = text[begin:end]
    shorter = text[:begin] + instead + "\n" * removed.count("\n") + text[end:]
    line = text.count("\n", 0, begin) + 1
    return Mutant({**texts, file: shorter}, file, line, removed.strip())


def _begins_statement(before: str) -> bool:
    """Not in the declaration of a function, or in the middle of an expression."""
    before = re.sub(r"^\s*#[^\n]*$", "", before, flags=re.MULTILINE).rstrip()
    return before == "" or before[-1] in ";{})" or before.endswith(("else", "do"))


def _blank(comment: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", comment[0])
