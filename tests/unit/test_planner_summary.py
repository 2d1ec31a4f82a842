"""The table of a planner evaluation: the gap to the perfect model, over the scenes that both finished."""

from __future__ import annotations

from typing import Any

import pytest

from physisforcing.core.paired_stats import paired_proportions
from physisforcing.planner.measurements import from_summary
from physisforcing.planner.summary import markdown, summarise


def rows(policy: str, statuses: str, first: int = 100_000) -> list[dict[str, Any]]:
    """One a character: s succeeded, f failed, e crashed."""
    words = {"s": "success", "f": "failure", "e": "error"}
    return [{"task": "t", "policy": policy, "seed": first + k, "status": words[c]} for k, c in enumerate(statuses)]


def test_the_gap_is_over_the_scenes_that_both_finished() -> None:
    summary = summarise([*rows("model", "sffse"), *rows("perfect", "ssfes"), *rows("noop", "fffff")])
    gap = summary["tasks"]["t"]["model"]["gap"]
    assert (gap["n"], gap["only_perfect"], gap["only_model"], gap["seeds"]) == (3, 1, 0, [100_000, 100_001, 100_002])
    assert (gap["difference"], gap["low"], gap["high"]) == pytest.approx(paired_proportions(1, 1, 0, 1))
    text = markdown(summary, title="x")
    assert "Perfect model minus model in the 3 scenes that both finished: +33 points" in text
    about = {"command": "c", "provenance": {"commit": "c", "hardware": "h", "versions": {}, "date": "d"}}
    lines = {x["claim"]: x for x in from_summary(summary | about, protocol="topp", manifests={"t": "test_t@1"})}
    line = lines["planner/topp/perfect-minus-model/t/success_difference"]
    assert (line["n"], line["seeds"]) == (3, "100000-100002") and line["against"]["scenes"] == "test_t@1"
    assert sum(claim.endswith("/success") for claim in lines) == 3, "a difference is no success rate"


@pytest.mark.parametrize(("model", "perfect"), [("ee", "ss"), ("ss", ""), ("", "ss")])
def test_without_a_scene_that_both_finished_there_is_no_gap(model: str, perfect: str) -> None:
    summary = summarise([*rows("model", model), *rows("perfect", perfect), *rows("noop", "f")])
    assert "gap" not in summary["tasks"]["t"].get("model", {})
    assert "Perfect model minus" not in markdown(summary, title="x")


def test_other_scenes_are_no_pairs() -> None:
    summary = summarise([*rows("model", "ss"), *rows("perfect", "ss", first=200_000)])
    assert "gap" not in summary["tasks"]["t"]["model"]
