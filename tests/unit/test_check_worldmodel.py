"""The contract suite: a model that keeps the contract passes all of it, what cannot be checked is skipped, and no fault ends it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from good_model import HORIZONS, Good, failed, run, variant
from physisforcing.core.errors import UserError
from physisforcing.core.types import ViewLayout
from physisforcing.planner.check_worldmodel import CHECKS, check_names, check_world_model, summary
from physisforcing.planner.contract_probe import CheckSettings, Probe, scene
from physisforcing.world_models import load_any


def test_a_model_that_keeps_the_contract_passes_everything():
    results = run(Good)
    assert not failed(results), [r.line() for r in results.values() if r.status == "fail"]
    skipped = {name: r.detail for name, r in results.items() if r.status == "skipped"}
    assert skipped == {
        "refuses-actions": "a model without actions",
        "refuses-goal": "a model without goal",
        "refuses-other-return": "a model that does not return everything",
    }
    assert list(results) == ["load", *CHECKS]
    assert results["first-frame"].measured["mean_to_context"] == 0
    assert results["batch-invariance"].measured == {"greatest": 0, "mean": 0}
    assert results["seeds"].measured["mean"] == pytest.approx(
        1.7, abs=0.4
    )  # two uniform integers of -3..3, 4 of 5 frames
    assert results["max-batch"].detail == "4 at once; one more is refused"
    assert results["spec"].measured["control_steps_a_frame"] == 2


def test_a_model_that_raises_fails_and_says_where():
    def angry(self, request, b, s):
        raise ZeroDivisionError("no bell")

    results = run(variant(video=angry))
    assert {"shapes", "times", "determinism", "batch-invariance", "fingerprint"} <= failed(results)
    assert results["shapes"].detail.startswith("raised ZeroDivisionError: no bell at ")
    assert results["refuses-horizon"].status == "pass" and results["spec"].status == "pass"
    leaves = variant(video=lambda self, request, b, s: (_ for _ in ()).throw(SystemExit(3)))
    assert "SystemExit" in run(leaves, "shapes")["shapes"].detail
    wrong = variant(refuse=lambda self, request: 1 / (request.horizon in HORIZONS))
    assert "ZeroDivisionError" in run(wrong, "refuses-horizon")["refuses-horizon"].detail


def test_a_model_that_does_not_load_skips_the_rest():
    def load():
        raise RuntimeError("no weights")

    results = run(load)
    assert results["load"].status == "fail" and "no weights" in results["load"].detail
    assert summary(list(results.values())) == {"pass": 0, "fail": 1, "skipped": len(CHECKS)}
    assert run(lambda: object())["load"].status == "fail"
    with pytest.raises(UserError):
        run(lambda: load_any("nowhere/at/all"))


def test_what_a_model_cannot_do_is_skipped_with_what_it_needs():
    class Plain(Good):
        changes: ClassVar[dict] = {
            "conditions": frozenset({"text"}),
            "returns": frozenset({"frames"}),
            "proprioception_lags": (),
            "action_spec": None,
            "max_batch": 1,
            "deterministic": False,
            "views": ViewLayout(height=12, width=16),
        }

    model = Plain()
    results = run(lambda: model)
    assert not failed(results)
    needs = {name: r.detail for name, r in results.items() if r.status == "skipped"}
    assert needs["actions-sensitivity"] == "conditions with actions" and needs["features"] == "returns with features"
    assert needs["fingerprint"].startswith("a factory that makes a new model")
    assert needs["determinism"].startswith("a spec that says deterministic; the same request twice differs by 0")
    assert needs["batch-invariance"].startswith("max_batch of 2 or more")
    assert results["refuses-actions"].status == results["refuses-goal"].status == "pass"
    assert "max_samples=5" in run(Good, "max-batch", max_samples=4)["max-batch"].detail


def test_pictures_and_examples_stand_in_for_made_up_ones():
    seen = []

    class Watched(Good):
        def refuse(self, request):
            seen.append(request)
            super().refuse(request)

    picture = scene(3, 24, 32)
    check_world_model(Watched, pictures=[picture], only=["shapes"])
    assert seen[-1].context_BVTHWC.shape == (1, 2, 2, 12, 16, 3)
    wanted = picture.reshape(12, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(seen[-1].context_BVTHWC[0, 1, 1] - wanted).max() <= 1

    class Offers(Watched):
        def examples(self):
            rows = [
                Probe(Good(), CheckSettings()).request([Probe(Good(), CheckSettings()).row(i)], [[0]]) for i in (2, 3)
            ]
            return [dataclasses.replace(row, ids=[("task", 100 + i, 0)]) for i, row in enumerate(rows)]

    seen.clear()
    assert not failed(run(Offers))
    assert {name for request in seen for name in request.ids} == {("task", 100, 0), ("task", 101, 0)}


def test_unknown_names_are_refused():
    assert check_names(["times", "spec"]) == ["load", "spec", "times"]
    with pytest.raises(UserError, match="batch-invariance"):
        check_names(["batch-invarance"])
