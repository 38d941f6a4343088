from __future__ import annotations

from dataclasses import replace

import pytest

from sparsify.errors import Location
from sparsify.plan import Plan
from sparsify.products.report import Report, Site

EVENT = Site(
    "rec",
    Location("/home/me/model.py", 41, "self.rec(s)"),
    "event",
    activity=0.05,
    dense_operations=2_000_000,
    event_operations=100_000,
    took_ms={"original": 8.0, "dense": 2.0, "event": 0.5},
    fusion_gain=4.0,
    sparsity_gain=4.0,
    break_even=0.2,
)
KEPT = Site("fc", Location("model.py", 40), "kept", "no-event", "It reads x.", "Encode x.")


def test_the_table_has_one_row_a_site() -> None:
    lines = str(Report((EVENT, KEPT), ("2 recordings",))).splitlines()
    assert lines[0].split() == [
        *("site", "line", "decision", "activity", "operations", "time", "fusion", "sparsity")
    ]
    assert lines[2].split()[:4] == ["rec", "model.py:41", "event", "5.0%"]
    assert "100k of 2M" in lines[2]
    assert "original 8 ms, dense 2 ms, event 0.5 ms" in lines[2]
    assert lines[3].split() == ["fc", "model.py:40", "kept"]
    assert lines[4] == "  fc: [no-event] It reads x. Encode x."
    assert lines[5] == "  2 recordings"


def test_a_reason_that_all_sites_share_is_told_once() -> None:
    other = Site("out", None, "kept", "no-event", "It reads x.", "Encode x.")
    assert str(Report((KEPT, other))).count("It reads x.") == 1


def test_sites_of_one_reason_share_a_line() -> None:
    others = [replace(KEPT, name=f"fc{i}") for i in range(5)]
    told = str(Report((EVENT, KEPT, *others[:2])))
    assert "\n  fc, fc0, fc1: [no-event] It reads x. Encode x." in told
    told = str(Report((EVENT, KEPT, *others, replace(KEPT, name="last", reason="It is last."))))
    assert "\n  fc, fc0, fc1, fc2 and 2 more: [no-event] It reads x. Encode x." in told
    assert "\n  last: [no-event] It is last. Encode x." in told


def test_what_is_refused_of_the_whole_model_is_told_once() -> None:
    notes = ("2 recordings", "[no-event] It reads x. Encode x.", "[random] Another reason.")
    told = str(Report((KEPT, replace(KEPT, name="out")), notes))
    assert told.splitlines()[-3:] == [
        "  fc, out: [no-event] It reads x. Encode x.",
        "  2 recordings",
        "  [random] Another reason.",
    ]
    without_sites = Report((), notes)
    assert str(without_sites).count("[no-event] It reads x. Encode x.") == 1


def test_a_session_shows_the_table() -> None:
    report = Report((EVENT, KEPT), ("2 recordings",))
    assert repr(report) == str(report)


def test_an_empty_report_prints_its_notes() -> None:
    assert str(Report((), ("nothing was recorded yet",))) == "  nothing was recorded yet"


def test_sites_are_found_by_name() -> None:
    report = Report((EVENT, KEPT))
    assert report["fc"] is KEPT
    with pytest.raises(KeyError, match="no site 'gc'; known: rec, fc"):
        report["gc"]


def test_drift_is_told_when_activity_crosses_the_break_even() -> None:
    assert Report((EVENT,), (), {"rec": 0.19}).drift() == ()
    told = Report((EVENT, KEPT), (), {"rec": 0.31})
    assert len(told.drift()) == 1
    assert "rec: 31.0% of its inputs are active now, 5.0% were" in told.drift()[0]
    assert "dense is predicted to be faster above 20.0%" in str(told)


def test_the_advice_on_drift_of_a_gradient_is_one_that_can_be_followed() -> None:
    backward = replace(EVENT, name="rec.backward#2")
    live = {"rec": 0.31, "rec.backward#2": 0.31}
    forward_told, told = Report((EVENT, backward), (), live, gradients=True).drift()
    assert forward_told.endswith("let its first training step be a typical one.")
    assert told.endswith('model.sparsify(plan=fast.plan.pin("rec.backward#2", "dense")).')
    pinned = Plan().pin("rec.backward#2", "dense")
    assert pinned.training is not None and pinned.training.sites == {"rec.backward#2": "dense"}


def test_a_loss_that_is_zero_tells_no_drift() -> None:
    backward = replace(EVENT, name="rec.backward", decision="dense", activity=0.4)
    assert Report((backward,), (), {"rec.backward": 0.1}, gradients=True).drift() != ()
    assert Report((backward,), (), {"rec.backward": 0.0}, gradients=True).drift() == ()


PRUNED = replace(
    EVENT,
    layout="compressed-rows",
    weight_density=0.1,
    both_operations=10_000,
    parameter_gain=3.0,
    took_ms={"event": 0.5, "both": 0.2},
)


def test_a_pruned_site_tells_its_layout_density_operations_and_gain() -> None:
    head, _, row, *_ = str(Report((PRUNED,))).splitlines()
    assert head.split() == [
        *("site", "line", "decision", "layout", "activity", "density", "operations", "time"),
        *("fusion", "sparsity", "parameters"),
    ]
    assert row.split()[3:6] == ["compressed-rows", "5.0%", "10.0%"]
    assert "10k of 2M" in row
    assert row.endswith("4.0x    4.0x      3.0x")


def test_drift_is_told_when_weights_have_other_zeros() -> None:
    assert Report((PRUNED,), live_density={"rec": 0.14}).drift() == ()
    (told,) = Report((PRUNED,), live_density={"rec": 0.5}).drift()
    assert told.startswith("rec: 50.0% of its weights are not zero now, 10.0% were when compressed")
