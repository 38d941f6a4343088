from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, cast

import pytest

from sparsify import ir
from sparsify.plan import Plan, RegionPlan

REGIONS = {"scan_0": RegionPlan("rows-per-thread", 64)}
PLAN = Plan({"fc": "event", "rec": "off"}, REGIONS, "x86", {"fc": 0.25})


def test_a_saved_plan_comes_back(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_a_plan_pickles() -> None:
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


def test_pin_returns_another_plan() -> None:
    pinned = PLAN.pin("rec", "dense")
    assert pinned.sites == {"fc": "event", "rec": "dense"}
    assert PLAN.sites["rec"] == "off"
    assert pinned.regions == PLAN.regions


def test_a_plan_prints_its_decisions() -> None:
    text = str(PLAN)
    assert text.splitlines() == [
        "fc   event",
        "rec  off",
        "scan_0: rows-per-thread, tiles of 64",
        "decided on x86",
    ]
    assert str(Plan()) == "nothing is decided yet"


def test_an_unknown_decision_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"site 'fc': 'fast' is no decision; known: 'event', 'de"):
        PLAN.pin("fc", cast(Any, "fast"))


def test_unknown_sites_are_named_with_the_known_ones() -> None:
    PLAN.check_sites(["fc", "rec", "out"])
    with pytest.raises(ValueError, match="does not have: rec; its sites are: fc, out"):
        PLAN.check_sites(["fc", "out"])


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "nonsense", '{"format": 7}', '{"format": 1, "machine": "", "sites": 3}'],
)
def test_a_file_that_holds_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no plan|is not 1|Expecting"):
        Plan.from_json(text)


def test_a_file_with_a_wrong_decision_is_refused() -> None:
    text = PLAN.to_json().replace('"off"', '"sometimes"')
    with pytest.raises(ValueError, match="'sometimes' is no decision"):
        Plan.from_json(text)


def test_layouts_are_pinned_saved_and_printed() -> None:
    layout = ir.Layout("block-rows", 16)
    pinned = PLAN.pin("fc", "event", layout)
    assert pinned.layouts == {"fc": layout}
    assert pinned.training is not None
    assert pinned.training.layouts == {"fc": layout}
    assert Plan.from_json(pinned.to_json()) == pinned
    assert str(pinned).splitlines()[0] == "fc   event, block-rows of 16"
    assert pinned.pin("fc", "dense").layouts == {"fc": layout}


def test_a_plan_of_before_layouts_is_read() -> None:
    content = json.loads(PLAN.to_json())
    del content["layouts"]
    assert Plan.from_json(json.dumps(content)) == PLAN
