"""What ``physis eval policy`` counts, compares and reports; the protocol of Table 2."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.paired_stats import welch_t
from physisforcing.core.stats import wilson
from physisforcing.envs.manifest import load_manifest
from physisforcing.eval_policy import EvalPolicyConfig, PolicyPlan, spelled_out, write_summary
from physisforcing.plan_scenes import plan_scenes
from physisforcing.policies import (
    ActingPolicy,
    PolicySettings,
    acting_policies,
)
from physisforcing.policy_protocols import PUBLISHED, TASKS, Table2Settings, published
from physisforcing.policy_report import compare_policies, crossed_interval

SWAYING = "toy_policies:swaying"


def settings(**changes: Any) -> EvalPolicyConfig:
    values: dict[str, Any] = {"episodes": 2, "baselines": ["noop"], "threads": 1}
    return EvalPolicyConfig(**(values | changes))


def planned(config: EvalPolicyConfig) -> PolicyPlan:
    return PolicyPlan(config, config.check())


# --------------------------------------------------------------------------------------------------------- comparisons


def rows_of(name: str, wins: str, task: str = "click_bell") -> list[dict[str, Any]]:
    """``wins``: one letter an episode, 1 success, 0 failure, e crash."""
    status = {"1": "success", "0": "failure", "e": "error"}
    return [{"task": task, "policy": name, "seed": 100_000 + k, "status": status[w]} for k, w in enumerate(wins)]


def test_two_policies_are_paired_by_scene() -> None:
    rows = [*rows_of("a", "1111111100"), *rows_of("b", "110000001e"), *rows_of("noop", "0000000000")]
    rows += [*rows_of("retrieval", "1111100000"), *rows_of("expert", "1111111111")]
    policies = {name: ActingPolicy(recipe=name, training_seed=0) for name in ("a", "b")}
    found = compare_policies(rows, policies)
    (pair,) = found.checkpoints.paired
    assert (pair.a, pair.b, pair.n, pair.dropped, pair.only_a, pair.only_b) == ("a", "b", 9, 1, 6, 1)
    assert pair.p == pytest.approx(scipy.stats.binomtest(1, 7).pvalue) and pair.difference == pytest.approx(5 / 9)
    assert found.recipes is None and not found.crossed, "one training seed says nothing about recipes"
    assert found.checkpoints.notes == [
        "Differences between checkpoints hold for these checkpoints alone: another training seed of the same recipe may turn them round."
    ]
    assert {gap.a for gap in found.checkpoints.gaps} == {"retrieval"}, "the expert is no rival"


def test_recipes_over_scenes_and_training_seeds() -> None:
    wins = {"a0": "111110", "a1": "111000", "b0": "100000", "b1": "000000", "b2": "11000e"}
    policies = {name: ActingPolicy(recipe=name[0], training_seed=int(name[1])) for name in wins}
    rows = [row for name, word in wins.items() for row in rows_of(name, word)]
    found = compare_policies(rows, policies)
    (row,) = found.crossed
    assert (row.a, row.b, row.seeds_a, row.seeds_b, row.n, row.dropped) == ("a", "b", 2, 3, 5, 1)
    assert row.difference == pytest.approx((5 + 3) / 10 - (1 + 0 + 2) / 15) and row.low <= row.difference <= row.high
    assert len(found.checkpoints.paired) == 10, "every two policies"
    assert found.recipes is not None and [line.measure for line in found.recipes.seeds] == ["success"]
    assert found.recipes.seeds[0].difference == pytest.approx((5 / 6 + 3 / 6) / 2 - (1 / 6 + 0 + 2 / 5) / 3)
    assert compare_policies(rows[::-1], policies).crossed == [dataclasses.replace(row)], "whatever the order of rows"
    policies["b1"].training_seed = 0
    with pytest.raises(UserError, match="one checkpoint a recipe and seed"):
        compare_policies(rows, policies)


def test_the_crossed_interval_equals_one_counted_out() -> None:
    """Two seeds and three scenes have 4 x 4 x 27 equally likely draws: the quantiles of all of them, reached by drawing."""
    a = np.array([[1, 1, 0], [1, 0, 0]], dtype=bool)
    b = np.array([[0, 1, 0], [0, 0, 0]], dtype=bool)
    draws = []
    for scenes in itertools.product(range(3), repeat=3):
        means = [
            [rows[list(seeds)][:, list(scenes)].mean() for seeds in itertools.product(range(2), repeat=2)]
            for rows in (a, b)
        ]
        draws += [x - y for x in means[0] for y in means[1]]
    difference, low, high = crossed_interval(a, b, np.random.default_rng(0), resamples=40_000)
    assert difference == pytest.approx(np.mean(draws)) == pytest.approx(2 / 6)
    assert (low, high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=1e-9)
    same = crossed_interval(a, a, np.random.default_rng(0), paired_seeds=True)
    assert same == (0.0, 0.0, 0.0), "the same seeds and the same scenes differ nowhere"
    assert crossed_interval(a, a, np.random.default_rng(0))[2] > 0


# ----------------------------------------------------------------------------------------------------- report, Table 2


def test_the_report_of_two_policies(tmp_path: Path) -> None:
    names = {"swaying": SWAYING, "standing": "toy_policies:standing"}
    policies = {
        name: {"source": source, "recipe": "toy", "training_seed": k} for k, (name, source) in enumerate(names.items())
    }
    config = settings(policies=policies, tasks=["click_bell", "press_stapler"], episodes=4, output=str(tmp_path))
    plan = planned(config)
    rows = []
    for task, wins in (("click_bell", ("1110", "1000", "0000")), ("press_stapler", ("1111", "11ee", "0000"))):
        rows += [row for name, word in zip(plan.rows, wins, strict=True) for row in rows_of(name, word, task)]
    summary = write_summary(config, plan, rows, "physis eval policy policies=...")
    lines = {line["claim"]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
    line = lines["policy/swaying/click_bell/success"]
    assert (line["value"], line["n"], line["low"], line["high"]) == (0.75, 4, *wilson(3, 4))
    assert line["against"]["recipe"] == "toy" and line["against"]["training_seed"] == 0 and "noop_p" in line["against"]
    assert line["against"]["scenes"] == plan.scenes.manifests["click_bell"]
    assert lines["policy/swaying/mean/success"]["value"] == pytest.approx((0.75 + 1) / 2)
    assert (
        lines["policy/noop/mean/success"]["value"] == 0 and "recipe" not in lines["policy/noop/mean/success"]["against"]
    )
    difference = lines["policy/swaying-minus-standing/press_stapler/success_difference"]
    assert (difference["value"], difference["n"], difference["against"]["dropped"]) == (0.0, 2, 2)
    assert lines["policy/swaying-minus-standing/all_tasks/success_difference"]["against"]["p"] == pytest.approx(
        scipy.stats.binomtest(0, 2).pvalue
    )
    text = (tmp_path / "summary.md").read_text()
    assert "## Mean over tasks" in text and "| swaying | 87.5 % |" in text and "## Paired success" in text
    assert summary["tasks"]["press_stapler"]["standing"]["errors"] == 2


def test_the_protocol_of_table_2(tmp_path: Path) -> None:
    config = compose("eval_policy", spelled_out(["protocol=table2", f"policy={SWAYING}"]), EvalPolicyConfig)
    assert (tuple(config.tasks), config.episodes, config.control, config.policy.execute) == (TASKS, 200, "topp", 24)
    assert config.claims == "table2" and Table2Settings.of(config).deviations() == []
    config.control = "interpolated"
    assert config.claims == "table2-interpolated" and Table2Settings.of(config).deviations() == [], "its second run"
    other = dataclasses.replace(config, tasks=list(TASKS[1:]), episodes=20, manifest="test", output=str(tmp_path))
    assert Table2Settings.of(other).deviations() == [
        "without place_empty_cup", "episodes 20, not 200", "scenes of test, not of table2",
    ]  # fmt: skip
    assert [round(float(np.mean(values[:-1])), 1) for values in PUBLISHED.values()] == [68.2, 72.8], "as printed"
    base, forced = published()
    assert forced["intervals"]["place_empty_cup"] == wilson(126, 200) and base["tasks"]["stack_bowls_two"] == 69.5
    other.baselines = ["noop"]
    plan = planned(other)
    rows = [row for task in other.tasks for name in plan.rows for row in rows_of(name, "10" * 10, task)]
    write_summary(other, plan, rows, "physis eval policy protocol=table2")
    text = (tmp_path / "summary.md").read_text()
    assert (
        "not measured here, not comparable" in text
        and "| Fast-WAM on Wan2.2-TI2V-5B + PhysisForcing | 63.0 % |" in text
    )
    lines = json.loads((tmp_path / "measurements.json").read_text())
    claims = {line["claim"] for line in lines}
    assert "policy/table2-interpolated-swaying/press_stapler/success" in claims and not any(
        "Fast" in claim for claim in claims
    )
    assert all("without place_empty_cup" in line["against"]["deviations"] for line in lines)


def test_measurements_of_recipes_stand_apart_from_those_of_policies(tmp_path: Path) -> None:
    """A recipe may be called as a policy is; its difference has the training seed as unit, and a second interval that says what it is."""
    wins = {"forced": "1110", "forced_1": "1100", "plain": "1000", "plain_1": "0000"}
    sources = {name: {"source": SWAYING, "execute": 2 + k} for k, name in enumerate(wins)}
    policies = {
        name: own | {"recipe": name.partition("_")[0], "training_seed": int(name.endswith("_1"))}
        for name, own in sources.items()
    }
    config = settings(policies=policies, tasks=["click_bell", "press_stapler"], episodes=4, output=str(tmp_path))
    config.baselines = []
    rows = [row for task in config.tasks for name, word in wins.items() for row in rows_of(name, word, task)]
    write_summary(config, planned(config), rows, "physis eval policy policies=...")
    told = json.loads((tmp_path / "measurements.json").read_text())
    lines = {line["claim"]: line for line in told}
    assert len(lines) == len(told), "no claim is made twice"
    policy = lines["policy/forced-minus-plain/click_bell/success_difference"]
    assert policy["value"] == pytest.approx(2 / 4) and policy["n"] == 4
    seeds = lines["policy/recipe/forced-minus-plain/click_bell/success_difference"]
    difference, low, high = welch_t([3 / 4, 2 / 4], [1 / 4, 0])
    assert (seeds["value"], seeds["low"], seeds["high"], seeds["n"]) == (pytest.approx(difference), low, high, 16)
    about = seeds["against"]
    assert about["method"].startswith("seeds not paired") and (about["seeds_a"], about["seeds_b"]) == (2, 2)
    assert about["p_smallest"] == pytest.approx(1 / 3) and "interval" not in about
    crossed = lines["policy/recipe/forced-minus-plain/press_stapler/success_difference_over_scenes_and_seeds"]
    assert crossed["value"] == pytest.approx(difference) and "too narrow" in crossed["against"]["interval"]
    assert lines["policy/recipe/forced-minus-plain/mean/success_difference"]["n"] == 32
    assert lines["policy/forced-minus-plain/all_tasks/success_difference"]["n"] == 8
    with pytest.raises(UserError, match=r"policies\.a\.recipe: got 'with/slash'.*recipe:with_slash"):
        acting_policies(PolicySettings(), {"a": {"source": SWAYING, "recipe": "with/slash"}})


def test_what_a_row_does_differently_from_table_2_stands_in_its_own_lines(tmp_path: Path) -> None:
    policies = {
        "usual": SWAYING,
        "short": {"source": "toy_policies:standing", "execute": 4, "steps": 3},
        "early": {"source": "toy_policies:falling", "execution": "async"},
        "planner": "planner",
    }
    words = ["protocol=table2", "control=interpolated", "baselines=[noop]", f"output={tmp_path}"]
    config = compose("eval_policy", words, EvalPolicyConfig)
    config.policies = policies
    plan = planned(config)
    rows = [row for task in config.tasks for name in plan.rows for row in rows_of(name, "10", task)]
    summary = write_summary(config, plan, rows, "physis eval policy protocol=table2 policies=...")
    wanted = {
        "usual": "none",
        "short": "execute 4, not 24; steps 3, not 10",
        "early": "execution async with delay 4, not receding",
        "planner": "planner.execute_horizon 32, not 24",
        "noop": "none",
        "usual-minus-short": "short: execute 4, not 24; short: steps 3, not 10",
    }
    said = {
        line["claim"]: line["against"]["deviations"]
        for line in json.loads((tmp_path / "measurements.json").read_text())
    }
    for name, text in wanted.items():
        kind = "success_difference" if "minus" in name else "success"
        for task in ("grab_roller", "all_tasks" if "minus" in name else "mean"):
            assert said[f"policy/table2-interpolated-{name}/{task}/{kind}"] == text
    assert summary["table2"]["deviations"] == []
    told = (tmp_path / "summary.md").read_text()
    assert "- short: 4 executed rows a plan, 3 denoising steps, receding; differs from the protocol: execute 4" in told
    assert "- usual: 24 executed rows a plan, 10 denoising steps, receding; differs from the protocol: nothing" in told


def test_table_2_has_200_frozen_scenes_a_task_the_test_set_among_them() -> None:
    scenes = plan_scenes(TASKS, 200, "table2")
    for task in TASKS:
        manifest, test = (load_manifest(f"{kind}_{task}") for kind in ("table2", "test"))
        assert len(scenes.seeds[task]) == 200 == len(set(scenes.seeds[task]))
        assert manifest.entries[:100] == test.entries and manifest.environment() == test.environment()
