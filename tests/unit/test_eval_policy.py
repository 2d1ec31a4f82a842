"""``physis eval policy`` before and after the simulator: which policies, under which keys, and what is counted and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.stats
import torch

import toy_policies
from acting_policy import acting_policy
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.message_server import MessageServerConfig
from physisforcing.core.paired_stats import welch_t
from physisforcing.core.results import ResultKey, ResultsFile
from physisforcing.core.stats import wilson
from physisforcing.core.types import Observation
from physisforcing.deploy import make_policy
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.seeds import Job
from physisforcing.episode_jobs import run_jobs
from physisforcing.eval_plan import EvalPlanConfig, _Plan
from physisforcing.eval_policy import EvalPolicyConfig, PolicyPlan, evaluate, main, spelled_out, write_summary
from physisforcing.model_process import ServerAddress, given_server
from physisforcing.plan_scenes import plan_scenes
from physisforcing.policies import (
    ActingPolicy,
    PolicySettings,
    acting_policies,
    check_source,
    named,
    require_devices,
)
from physisforcing.policy.checkpoint import PolicyInfo, save_policy
from physisforcing.policy.remote import PolicyServer
from physisforcing.policy.requests import PolicySpec
from physisforcing.policy_episodes import PolicyRunner
from physisforcing.policy_opening import close_policy, identify_policy, open_policy, policy_server
from physisforcing.policy_protocols import PUBLISHED, TASKS, Table2Settings, published
from physisforcing.policy_report import compare_policies, crossed_interval
from tiny_policy import tiny_policy

SWAYING = "toy_policies:swaying"


def settings(**changes: Any) -> EvalPolicyConfig:
    values: dict[str, Any] = {"episodes": 2, "baselines": ["noop"], "threads": 1}
    return EvalPolicyConfig(**(values | changes))


def planned(config: EvalPolicyConfig) -> PolicyPlan:
    return PolicyPlan(config, config.check())


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Writes a tiny policy's folder."""

    def write(mode: str = "first_frame", *, seed: int = 0, canvas: str = "head") -> str:
        place = tmp_path / f"{mode}_{seed}_{canvas}" / "export"
        place.mkdir(parents=True)
        save_policy(place, tiny_policy(mode, seed=seed), PolicyInfo(canvas=canvas, tasks=("click_bell",)))
        return str(place)

    return write


# ------------------------------------------------------------------------------------------------------------ settings


def test_what_people_type_is_composed() -> None:
    config = compose(
        "eval_policy", spelled_out([f"policy={SWAYING}", "task=click_bell", "policy.steps=4"]), EvalPolicyConfig
    )
    assert config.policy == PolicySettings(source=SWAYING, steps=4) and config.tasks == ["click_bell"]
    several = "policies={a_0:{source:runs/a/export,recipe:a,training_seed:0},b:planner}"
    config = compose("eval_policy", spelled_out([several]), EvalPolicyConfig)
    found = acting_policies(config.policy, config.policies)
    assert found["a_0"].recipe == "a" and found["a_0"].training_seed == 0 and found["b"].is_planner
    with pytest.raises(UserError, match=r"policy\.exectue.*did you mean.*execute"):
        compose("eval_policy", ["policy.exectue=3"], EvalPolicyConfig)


def test_policies_have_names_of_their_own() -> None:
    assert named("runs/forced/export") == "forced" == named("/somewhere/runs/forced")
    assert named(SWAYING) == "swaying" and named("runs/2026-11/noop") == "noop_policy"
    common = PolicySettings(execute=5)
    found = acting_policies(common, ["runs/a/export", "runs/b/export", "planner"])
    assert list(found) == ["a", "b", "planner"] and found["b"].settings.execute == 5
    own = acting_policies(common, {"slow": {"source": "runs/a", "steps": 20, "recipe": "x", "training_seed": 3}})[
        "slow"
    ]
    assert own == ActingPolicy(
        settings=PolicySettings(source="runs/a", execute=5, steps=20), recipe="x", training_seed=3
    )
    for several, what in (
        (["runs/a/export", "other/a/export"], "different names"),
        ({"noop": "runs/a"}, "no baseline is called"),
        ({"planner": "runs/a"}, "no baseline is called"),
        ({"a": {"source": "runs/a", "sead": 1}}, "sead"),
        ({"a": {"recipe": "x"}}, "a source"),
        ([{"source": "runs/a"}], "sources in a list"),
        ({"a": {"source": "runs/a", "execute": 3.5}}, r"policies\.a\.execute: got 3\.5, wanted int"),
        ({"a": {"source": "runs/a", "training_seed": "first"}}, r"policies\.a\.training_seed: got 'first'"),
        ({"p": {"source": "planner", "execute": 3}}, r"policies\.p\.execute: got 3, wanted nothing for the planner"),
        (
            {n: {"source": "runs/a", "mode": n, "recipe": "x", "training_seed": 0} for n in ("idm", "first_frame")},
            "idm and first_frame, both x with training seed 0",
        ),
    ):
        with pytest.raises(UserError, match=what):
            acting_policies(PolicySettings(), several)
    with pytest.raises(UserError, match="nothing beside policies"):
        acting_policies(PolicySettings(source="runs/a"), ["runs/b"])
    with pytest.raises(UserError, match=r"policy: got ''"):
        main(["episodes=1"])


def test_a_device_that_is_not_there_is_refused_under_its_own_name(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    ours, planner = (ActingPolicy(settings=PolicySettings(source=name)) for name in ("runs/a", "planner"))
    require_devices([ours, planner], "cpu", str(tmp_path))
    for policies, device, what in (
        ([planner], "cuda", r"planner\.device"),
        ([ours, planner], "cuda", r"planner\.device"),
    ):
        with pytest.raises(UserError, match=what):
            require_devices(policies, device, str(tmp_path))
    ours.settings.device = "cuda"
    with pytest.raises(UserError, match=r"policy\.device"):
        require_devices([ours], "cpu", str(tmp_path))
    ours.settings.server = "gpu-box:7100"
    require_devices([ours], "cpu", str(tmp_path))


def test_a_policy_that_is_not_there_is_refused_before_the_simulator(tmp_path: Path, folder: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"policy: got 'policy_pcio'.*shipped: "):
        evaluate(settings(policy=PolicySettings(source="policy_pcio"), output=str(tmp_path / "run")), progress=False)
    first, both = folder(), folder("optional_idm")
    check_source(PolicySettings(source=both, mode="idm", execute=8))
    for changes, what in (
        ({"source": first, "execute": 9}, r"policy\.execute: got 9, wanted 1 to 8"),
        ({"source": first, "execute": 8, "mode": "idm"}, r"policy\.mode.*first_frame, as it was trained"),
        ({"source": first, "execute": 8, "mode": "joint"}, r"policy\.mode"),
        ({"source": first, "execute": 6, "execution": "async", "delay": 3}, r"policy\.delay: got 3, wanted 0 to 2"),
        ({"source": first, "execute": 8, "execution": "asinc"}, "did you mean 'async'"),
        ({"source": first, "execute": 8, "server": "nowhere"}, r"policy\.server.*HOST:PORT"),
        ({"source": first, "execute": 8, "device": "gpu"}, r"policy\.device"),
        ({"source": first, "execute": 8, "compute": "compiled"}, r"policy\.compute.*did you mean 'compile'"),
        ({"source": first, "execute": 8, "compute": "graph"}, r"policy\.compute.*eager, compile or fused on a CPU"),
        ({"source": "planner", "steps": 3}, r"policy\.steps: got 3, wanted nothing for the planner"),
        ({"source": SWAYING, "server": "auto"}, r"policy\.server.*no policy's folder"),
        ({"source": "toy_policies:nothing"}, "a Policy"),
        ({"source": "toy_policies:absent"}, "module:factory"),
    ):
        with pytest.raises(UserError, match=what):
            evaluate(settings(policy=PolicySettings(**changes), output=str(tmp_path / "run")), progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="did you mean 'noop'"):
        settings(baselines=["nop"], policy=PolicySettings(source=SWAYING)).check()
    with pytest.raises(UserError, match=r"first_seed: got 5.*evaluation seeds start at 100000"):
        settings(first_seed=5, manifest="none", policy=PolicySettings(source=SWAYING)).check()


# ---------------------------------------------------------------------------------------------------------------- keys


def test_keys_hold_weights_and_everything_that_may_change_an_episode(folder: Callable[..., str]) -> None:
    first, other, both = folder(), folder(seed=1), folder("optional_idm")
    base = PolicySettings(source=first, execute=8)
    changed = [
        {"source": other}, {"execute": 4}, {"steps": 3}, {"execute": 4, "execution": "async"},
        {"execute": 4, "execution": "async", "delay": 2}, {"device": "cuda"}, {"device": "cuda", "server": "auto"},
        {"source": both}, {"source": both, "mode": "first_frame"}, {"source": both, "video_steps": 3}, {"compute": "compile"},
    ]  # fmt: skip
    found = [identify_policy(dataclasses.replace(base, **change)).fingerprint for change in ({}, *changed)]
    assert len(set(found)) == len(found) and identify_policy(base).fingerprint == found[0]
    said = ({"source": both}, {"source": both, "mode": "idm"})
    assert len({identify_policy(dataclasses.replace(base, **one)).fingerprint for one in said}) == 1, "said or not"
    here = "cuda" if torch.cuda.is_available() else "cpu"
    usual = {"device": "cuda", "compute": "compile"}, {"compute": "eager"}, {"device": "auto"}
    for said, meant in zip(usual, ({"device": "cuda"}, {}, {"device": here}), strict=True):
        one, two = (identify_policy(dataclasses.replace(base, **change)).fingerprint for change in (said, meant))
        assert one == two, "said, or what this device does anyway"
    for same in ({"video_steps": 3}, {"delay": 1}, {"server": "auto"}):
        assert identify_policy(dataclasses.replace(base, **same)).fingerprint == found[0], "changes nothing here"
    expert = Path(first) / "expert.safetensors"
    expert.write_bytes(expert.read_bytes()[:-1] + b"\x01")
    assert identify_policy(base).fingerprint != found[0], "other weights in the same place"
    assert identify_policy(base).cameras == ("head",)
    wide = identify_policy(PolicySettings(source=folder(canvas="robotwin"), execute=8))
    assert wide.cameras == ("head", "left_wrist", "right_wrist")
    elsewhere = planned(settings(policy=base, tasks=["click_bell", "press_stapler"]))
    assert elsewhere.notes == ["first_frame_0_head was not trained on press_stapler, but on click_bell"]
    job = Job(task="click_bell/swaying", seed=100_000)
    keys = [
        planned(settings(policy=PolicySettings(source=SWAYING), **change)).key(job)
        for change in ({}, {"control": "topp"}, {"max_steps": 9}, {"threads": 2}, {"manifest": "none"})
    ]
    assert len(set(keys)) == len(keys)


def test_all_that_a_factory_is_given_is_in_its_key() -> None:
    base = PolicySettings(source=SWAYING)
    changed = (
        {"execute": 4}, {"steps": 3}, {"video_steps": 3}, {"compute": "eager"}, {"autoencoder": "vae"}, {"delay": 2}, {"device": "cuda"},
    )  # fmt: skip
    found = [identify_policy(dataclasses.replace(base, **change)).fingerprint for change in ({}, *changed)]
    assert len(set(found)) == len(found)


def test_the_protocols_own_settings_are_no_mistake_beside_the_planner() -> None:
    words = ["protocol=table2", "policy=planner"]
    assert compose("eval_policy", spelled_out(words), EvalPolicyConfig).check()["planner"].is_planner
    with pytest.raises(UserError, match=r"policy\.execute: got 24"):
        compose("eval_policy", spelled_out(["policy=planner", "policy.execute=24"]), EvalPolicyConfig).check()


def test_how_a_server_computes_is_in_the_key(folder: Callable[..., str]) -> None:
    """Whatever a server says of itself: on a GPU another kind of computing, or another batch, rounds differently."""
    first = folder()
    gpu = {"device": "cuda", "threads": 1, "batch": 16, "compute": "compile"}
    saids = (
        gpu,
        gpu | {"compute": "eager"},
        gpu | {"batch": 8},
        gpu | {"device": "cpu", "batch": 1, "compute": "eager"},
    )
    spec = PolicySpec(
        name="any", canvas="head", size=(120, 160), lags=(0,), state_dim=3, action_dim=3, chunk=8, control_hz=10.0, fingerprint="any",
    )  # fmt: skip
    found = []
    for said in saids:
        server = PolicyServer(
            cast(Any, SimpleNamespace(spec=spec)), MessageServerConfig(batch=said["batch"]), about=said
        )
        address = f"127.0.0.1:{server.open()}"
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        settings = PolicySettings(source=first, execute=8, server=address)
        found.append(identify_policy(settings, given_server(address), threads=1).fingerprint)
        server.stop()
        thread.join()
    assert len(set(found)) == len(found)
    assert found[-1] == identify_policy(PolicySettings(source=first, execute=8), threads=1).fingerprint
    served = identify_policy(PolicySettings(source=first, execute=8, device="cuda", server="auto"), threads=1)
    assert served.fingerprint not in found, "the device that was asked for is in the key as well"


def test_one_policy_under_two_names_is_refused(folder: Callable[..., str]) -> None:
    """Their episodes would have one key: the second name would be given the episodes of the first."""
    first = folder()
    for several, what in (
        (
            {"a": {"source": first, "execute": 8}, "b": {"source": first, "execute": 8, "video_steps": 3}},
            "a and b, the same weights",
        ),
        ({"planner": "planner", "again": "planner"}, "planner and again"),
    ):
        with pytest.raises(UserError, match=what):
            planned(settings(policies=several))


def test_stored_episodes_have_the_name_that_the_policy_has_now(tmp_path: Path) -> None:
    key = ResultKey(manifest="m", episode="click_bell/1", fingerprint="f", config="c")
    ResultsFile(tmp_path / "results.jsonl").append(key, "success", task="click_bell", policy="model", seed=1)

    def nothing() -> Any:
        raise AssertionError("nothing is left to run")

    jobs = [Job(task="click_bell/mine", seed=1)]
    (row,) = run_jobs(jobs, lambda job: key, tmp_path, nothing, progress=False)
    assert (row["policy"], row["seed"], row["status"]) == ("mine", 1, "success")


def test_baselines_and_the_planner_have_the_keys_of_eval_plan(
    write_black_episodes: Callable[..., Path], tmp_path: Path
) -> None:
    demos = str(write_black_episodes(tmp_path / "demos", (9_998, 9_999)))
    shared: dict[str, Any] = {"episodes": 2, "threads": 1, "control": "topp", "train_demos": demos}
    acted = planned(EvalPolicyConfig(policies=[SWAYING, "planner"], **shared))
    plan = _Plan(EvalPlanConfig(**shared))
    assert acted.rows == ["swaying", "planner", "noop", "random", "retrieval", "expert"] and not acted.notes
    for row, there in (("planner", "model"), ("noop", "noop"), ("random", "random"), ("retrieval", "retrieval")):
        assert acted.key(Job(task=f"click_bell/{row}", seed=100_001)) == plan.key(
            Job(task=f"click_bell/{there}", seed=100_001)
        )
    assert len(acted.jobs) == 2 * 6 and acted.jobs[0] == Job(task="click_bell/swaying", seed=100_000)
    assert {row for _, row, _ in acted.films} == {"swaying", "planner", "expert"}
    without = planned(EvalPolicyConfig(policy=PolicySettings(source="toy_policies:falling"), episodes=1))
    assert without.rows == ["falling", "noop", "random", "expert"] and "train_demos" in without.notes[0]
    assert without.cameras == {"falling": toy_policies.Falling.cameras} and not acted.cameras


def test_two_policies_that_are_loaded_act_one_after_the_other() -> None:
    """A process keeps one of them: taking turns task by task would load each once a task."""
    tasks = ["click_bell", "press_stapler"]
    two = planned(settings(policies=[SWAYING, "toy_policies:standing", "planner"], tasks=tasks, episodes=1))
    apart = [f"{task}/{row}" for row in ("swaying", "standing") for task in tasks]
    assert [job.task for job in two.jobs] == apart + [f"{task}/{row}" for task in tasks for row in ("planner", "noop")]
    one = planned(settings(policies=[SWAYING, "planner"], tasks=tasks, episodes=1))
    assert [job.task for job in one.jobs] == [
        f"{task}/{row}" for task in tasks for row in ("swaying", "planner", "noop")
    ]


def test_a_folder_of_manifests_is_a_set(tmp_path: Path) -> None:
    for task in ("click_bell", "press_stapler"):
        load_manifest(f"test_{task}").save(tmp_path / f"{task}.json")
    scenes = plan_scenes(["click_bell", "press_stapler"], 3, str(tmp_path))
    assert scenes.manifests == plan_scenes(["click_bell", "press_stapler"], 3, "test").manifests
    with pytest.raises(UserError, match=r"stack_blocks_two\.json"):
        plan_scenes(["stack_blocks_two"], 3, str(tmp_path))


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


# -------------------------------------------------------------------------------------------------------------- server


def test_servers_are_started_for_open_episodes_alone_and_one_after_the_other(
    folder: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by what is called; that servers and episodes work is tested elsewhere."""
    policies = {name: {"source": folder(seed=k), "server": "auto"} for k, name in enumerate("ab")} | {"here": SWAYING}
    config = settings(policies=policies, policy=PolicySettings(execute=8), output=str(tmp_path / "run"))
    happened: list[Any] = []

    @contextlib.contextmanager
    def server(own: PolicySettings, **_: Any) -> Iterator[ServerAddress]:
        happened.append(f"begin {Path(own.source).parent.name[-6]}")
        yield ServerAddress(address=own.source)
        happened.append("end")

    def run(jobs: Any, key: Any, results: ResultsFile, make: Any, **_: Any) -> None:
        happened.append([[job.task.split("/")[1] for job in jobs], dict(make.args[5])])
        for job in jobs:
            task, policy = job.task.split("/")
            results.append(key(job), "failure", task=task, policy=policy, seed=job.seed)

    monkeypatch.setattr("physisforcing.policy_turns.policy_server", server)
    monkeypatch.setattr("physisforcing.policy_turns.run_jobs", run)
    summary = evaluate(config, progress=False)
    assert {name: row["n"] for name, row in summary["tasks"]["click_bell"].items()} == dict.fromkeys(
        ("a", "b", "here", "noop"), 2
    )
    of = {name: {name: ServerAddress(address=str(one["source"]))} for name, one in policies.items() if name != "here"}
    assert happened == [
        [["here", "here", "noop", "noop"], {}], "begin 0", [["a", "a"], of["a"]], "end", "begin 1", [["b", "b"], of["b"]], "end",
    ]  # fmt: skip
    lines = (tmp_path / "run" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "results.jsonl").write_text("".join(lines[:-1]))
    happened.clear()
    evaluate(config, progress=False)
    assert happened == ["begin 1", [["b"], of["b"]], "end"]


def test_a_policy_that_is_dropped_gives_its_memory_back(tmp_path: Path) -> None:
    """At once, not when Python next looks for circles: the next policy is loaded in its place."""
    folder = acting_policy(tmp_path / "mine" / "export")
    runner = PolicyRunner(settings(), {}, {}, {}, {}, {}, {}, {})
    opened: Any = open_policy(PolicySettings(source=str(folder), steps=2))
    model = weakref.ref(opened.source)
    runner._held = ("mine", cast(Any, None), opened)
    del opened
    gc.disable()
    try:
        runner._drop_policy()
        assert model() is None
    finally:
        gc.enable()


def test_a_served_policy_acts_as_one_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal on a CPU, under the same key; another number of steps at that address is refused, also to a runner that is deployed."""
    folder = acting_policy(tmp_path / "mine" / "export")
    own = PolicySettings(source=str(folder), steps=2)
    served = dataclasses.replace(own, server="auto")
    draw = np.random.default_rng(0)
    picture, state = draw.integers(0, 256, (240, 320, 3), dtype=np.uint8), draw.normal(size=14).astype(np.float32)
    seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="", step=0)

    def chunk(policy: Any, seed: int) -> np.ndarray:
        policy.reset(task="click_bell", seed=seed, instruction="press the bell")
        return policy.act(seen)

    here, identity = open_policy(own), identify_policy(served, threads=1)
    with policy_server(served, threads=1, workers=1) as address:
        assert address is not None
        there = open_policy(served, address)
        for seed in (100_000, 100_001):
            assert np.array_equal(chunk(there, seed), chunk(here, seed))
        assert not np.array_equal(chunk(here, 100_000), chunk(here, 100_001)), "noise of the episode"
        assert there.fingerprint.rpartition("-")[2] == here.fingerprint.rpartition("-")[2]
        at = dataclasses.replace(own, server=address.address)
        assert identify_policy(at, address, threads=1) == identify_policy(own, threads=1)
        assert identify_policy(at, address, threads=2) != identify_policy(own, threads=2), "one thread there, two here"
        with pytest.raises(UserError, match=r"policy\.server: got 'plans .*steps and mode"):
            open_policy(dataclasses.replace(at, steps=3), address)
        with monkeypatch.context() as unreadable:
            unreadable.setattr("physisforcing.policy.checkpoint.fingerprint", None)
            close_policy(open_policy(served, address, plans=identity.plans))
            with pytest.raises(UserError, match=r"policy\.server: got 'plans "):
                open_policy(served, address, plans="of other weights")
        close_policy(there)
        assert there.source._connection is None, "nothing is left open"
        monkeypatch.setenv("PHYSIS_TOKEN", address.token)
        for given in ({}, {"source": str(folder), "steps": 2}):
            deployed = make_policy({"physis_policy": "world_action", "policy": {"server": address.address, **given}})
            assert deployed.fingerprint == there.fingerprint
            assert np.array_equal(chunk(deployed, 100_000), chunk(here, 100_000))
        with pytest.raises(UserError, match=r"policy\.server: got 'plans .*steps and mode"):
            make_policy({"physis_policy": "world_action", "policy": {"server": address.address, "source": str(folder)}})
