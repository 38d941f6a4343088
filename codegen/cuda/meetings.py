"""Where the threads of a block have to meet, found from what they read and write together."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Meetings:
    """What has been read and written since the threads last met; things are strings.

    What follows needs a barrier in front if it reads what another thread may not have written yet,
    or overwrites what another may still read. Who writes a thing is always the same thread.
    """

    def __init__(self, read: Iterable[str] = (), written: Iterable[str] = ()) -> None:
        self.read, self.written = set(read), set(written)

    def conflict(self, reads: Collection[str], writes: Collection[str]) -> str | None:
        """What needs a barrier before this is done, or None."""
        incomplete = sorted(self.written.intersection(reads))
        if incomplete:
            return f"{incomplete[0]} is complete"
        taken = sorted(self.read.intersection(writes))
        return f"all have read {taken[0]}" if taken else None

    def done(self, reads: Collection[str], writes: Collection[str]) -> None:
        self.read.update(reads)
        self.written.update(writes)

    def met(self) -> None:
        self.read.clear()
        self.written.clear()

    def renamed(self, names: dict[str, str]) -> Meetings:
        """The same after things have changed their names."""
        return Meetings(
            (names.get(name, name) for name in self.read),
            (names.get(name, name) for name in self.written),
        )

    def joined(self, other: Meetings) -> Meetings:
        return Meetings(self.read | other.read, self.written | other.written)

    def same(self, other: Meetings) -> bool:
        return (self.read, self.written) == (other.read, other.written)
