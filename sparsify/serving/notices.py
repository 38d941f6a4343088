"""What the engine tells about its calls: in the report, and what was refused also as a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from sparsify.errors import Refusal
from sparsify.options import is_disabled
from sparsify.products.report import NO_SITE
from sparsify.products.tell_gradients import tell_gradients
from sparsify.serving.entry import Entry, newest, stand_ins

WAITS = "nothing is recorded yet: the first call will be"
WAITS_AGAIN = "nothing is recorded yet: the first call set something up, the next one will be"
OFF = "SPARSIFY=0 is set: everything runs as the original"
MOST_MISSES = 8  # recordings for one and the same reason, after which the original runs


class Notices:
    """Each is told once. ``name`` is that of the model's class."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told: dict[str, None] = {}

    def note(self, text: str) -> bool:
        """For the report; True if it is new."""
        if text in self._told:
            return False
        self._told[text] = None
        return True

    def say(self, refusal: Refusal) -> None:
        """In the report, and as a warning."""
        if self.note(f"[{refusal.code}] {refusal.reason} {refusal.remedy}".rstrip()):
            told = f"{self._name} runs its original operations: {refusal}"
            warnings.warn(told, stacklevel=_frames_to_caller())

    def of(
        self,
        recordings: int,
        entries: Sequence[Entry],
        before: Sequence[str] = (),
        was_called: bool = False,
    ) -> tuple[str, ...]:
        """All of them, behind those of ``before`` and what the newest of ``entries`` has to say.

        ``was_called`` says that a call was left to the original, for what only a first one does.
        """
        if not recordings and not self._told:
            waits = WAITS_AGAIN if was_called else WAITS
            return (*before, OFF if is_disabled() else waits)
        plural = "recording" if recordings == 1 else "recordings"
        notes = [f"{recordings} {plural}, {len(entries)} compiled"] if recordings else []
        notes += before
        for entry in [newest(entries)] if entries else []:
            if not entry.compiled.runs_original:
                notes.append(f"kernels of the backend {entry.backend.name} on {entry.device}")
            notes += [] if entry.compiled.sites else [NO_SITE]
            notes += stand_ins(entry)
            notes += ["calls with gradients: forward and backward"] if entry.required else []
            notes += [] if entry.compiled.runs_original else tell_gradients(entry.compiled.graph)
            notes += entry.compiled.notes
        return (*notes, *self._told)


def _frames_to_caller() -> int:
    """The ``stacklevel`` of the line that called the module: past frames of ours and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _is_passed(frame):
        frame, level = frame.f_back, level + 1
    return level


def _is_passed(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in ("sparsify", "torch")


class Misses:
    """Counts why calls had to be recorded again."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def why_too_many(self, reason: str) -> Refusal | None:
        """Count a recording for ``reason``; why it is the last one."""
        kind = reason.split(" was ")[0].split(" has ")[0].split(" is ")[0]
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] <= MOST_MISSES:
            return None
        told = f"{MOST_MISSES} recordings did not settle it: {reason}."
        remedy = "Keep it constant between calls, or pass it as a tensor."
        return Refusal("unsupported-op", told, remedy)
