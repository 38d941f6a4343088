"""What is looked at once in some calls, because it takes longer than a call may."""

from __future__ import annotations

EVERY = 32  # calls after which weights are looked at: counting reads all of them once
PATIENCE = 1  # looks that find nothing new, after which each further one comes twice as late
MOST = 1024  # calls between two looks


class Seldom:
    """Counts calls; one of ``EVERY`` is due, and of more while looks find nothing new."""

    def __init__(self) -> None:
        self.left = EVERY - 1  # calls before the next one that is due
        self._quiet = 0  # looks in a row

    def is_due(self) -> bool:
        """Count a call; whether it is due."""
        self.left -= 1
        if self.left >= 0:
            return False
        self.left = min(MOST, EVERY << max(0, self._quiet - PATIENCE)) - 1
        return True

    def skip(self, most: int = MOST) -> int:
        """Count calls that are not due, as many as there are and at most so many; how many."""
        calls = min(self.left, most)
        self.left -= calls
        return calls

    def found(self, is_new: bool) -> None:
        """What the call that was due found; the first look after it comes as late as before."""
        self._quiet = 0 if is_new else self._quiet + 1
