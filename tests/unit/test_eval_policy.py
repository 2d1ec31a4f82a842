"""``physis eval policy`` before the simulator: which policies, with which settings, and under which keys."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import toy_policies
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.message_server import MessageServerConfig
from physisforcing.core.results import ResultKey, ResultsFile, config_hash
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.seeds import Job
from physisforcing.episode_jobs import run_jobs
from physisforcing.eval_plan import EvalPlanConfig, _Plan
from physisforcing.eval_policy import EvalPolicyConfig, PolicyPlan, evaluate, main, spelled_out
from physisforcing.model_process import given_server
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
from physisforcing.policy_opening import identify_policy, open_policy
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


def test_baselines_run_without_a_policy() -> None:
    words = ["policies=[]", "baselines=[noop,expert]"]
    config = compose("eval_policy", spelled_out(words), EvalPolicyConfig)
    assert config.check() == {} and PolicyPlan(config, {}).rows == ["noop", "expert"]
    config.baselines = []
    with pytest.raises(UserError, match="baselines beside no policy"):
        config.check()
    config = compose("eval_policy", spelled_out([*words, "policy.steps=3"]), EvalPolicyConfig)
    with pytest.raises(UserError, match=r"policy\.steps"):
        config.check()


def test_results_are_not_written_into_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(UserError, match=r"output: got .*not a dataset"):
        EvalPolicyConfig(policies=[], output=str(tmp_path)).check()


def test_a_policy_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy_of_mine.py").write_text("def make(settings):\n    raise RuntimeError('found')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(RuntimeError, match="found"):
        open_policy(PolicySettings(source="policy_of_mine:make"))
    with pytest.raises(UserError, match=r"^policy: got 'policy_of_yours:make'.*holds policy_of_yours\.py"):
        open_policy(PolicySettings(source="policy_of_yours:make"))


def test_policies_have_names_of_their_own() -> None:
    assert named("runs/forced/export") == "forced" == named("/somewhere/runs/forced")
    assert named(SWAYING) == "swaying" and named("runs/2026-11/noop") == "noop_policy"
    assert named("runs/policy/export") == "policy" and named("my_robot.reach:make") == "reach"
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
        {"seed": 1}, {"seed": 2},
    ]  # fmt: skip
    found = [identify_policy(dataclasses.replace(base, **change)).fingerprint for change in ({}, *changed)]
    assert len(set(found)) == len(found) and identify_policy(base).fingerprint == found[0]
    said = ({"source": both}, {"source": both, "mode": "idm"})
    assert len({identify_policy(dataclasses.replace(base, **one)).fingerprint for one in said}) == 1, "said or not"
    here = "cuda" if torch.cuda.is_available() else "cpu"
    usual = {"device": "cuda", "compute": "fused"}, {"compute": "eager"}, {"device": "auto"}
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
        {"seed": 1},
    )  # fmt: skip
    found = [identify_policy(dataclasses.replace(base, **change)).fingerprint for change in ({}, *changed)]
    assert len(set(found)) == len(found)


def test_keys_of_the_usual_noise_are_those_of_results_from_before_it_had_a_seed(folder: Callable[..., str]) -> None:
    mine, made = (
        identify_policy(PolicySettings(source=folder(), execute=8)),
        identify_policy(PolicySettings(source=SWAYING)),
    )
    acting = {"execute": 8, "execution": "receding", "plans": mine.plans, "device": "cpu"}
    assert mine.fingerprint == f"policy-{config_hash(acting)}"
    given = {
        "execute": 12, "steps": 10, "video_steps": 10, "mode": "", "execution": "receding", "delay": 4, "device": "cpu",
        "compute": "auto", "autoencoder": "",
    }  # fmt: skip
    assert made.fingerprint == f"swaying-{config_hash(given)[:8]}"


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
