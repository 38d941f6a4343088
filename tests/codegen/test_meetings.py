"""Where threads of a block have to meet: reads after writes, writes after reads."""

from __future__ import annotations

from sparsify.codegen.cuda.meetings import Meetings


def test_a_value_is_complete_before_it_is_read() -> None:
    meetings = Meetings()
    meetings.done((), ["mask"])
    assert meetings.conflict(["list"], ["mask"]) is None
    assert meetings.conflict(["mask"], ["list"]) == "mask is complete"
    meetings.met()
    assert meetings.conflict(["mask"], ["list"]) is None


def test_a_value_is_overwritten_when_all_have_read_it() -> None:
    meetings = Meetings()
    meetings.done(["list"], ())
    assert meetings.conflict(["list"], []) is None
    assert meetings.conflict([], ["list"]) == "all have read list"


def test_who_writes_again_waits_for_nobody() -> None:
    meetings = Meetings(written=["list"])
    assert meetings.conflict([], ["list"]) is None


def test_copies_change_places() -> None:
    meetings = Meetings(["now"], ["next"]).renamed({"now": "next", "next": "now"})
    assert meetings.conflict(["now"], []) == "now is complete"
    assert meetings.conflict([], ["next"]) == "all have read next"
    assert meetings.same(Meetings(["next"]).joined(Meetings((), ["now"])))
