"""WorldArena's planner protocol: settings, deviations, prompts, the mean of two tasks, published rows apart."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.stats import mean_of_proportions, wilson
from physisforcing.core.types import Observation
from physisforcing.envs.manifest import load_manifest
from physisforcing.envs.seeds import Job
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings, _Plan, _write_summary
from physisforcing.plan_scenes import Scenes
from physisforcing.planner import worldarena
from physisforcing.planner.worldarena import PromptedPolicy, ProtocolSettings, read_template


def test_the_preset_is_the_protocol() -> None:
    config = compose("eval_plan", ["protocol=worldarena"], EvalPlanConfig)
    assert config.tasks == ["adjust_bottle", "click_bell"] and config.episodes == 100
    assert (config.max_steps, config.control, config.planner.execute_horizon) == (400, "topp", 45)
    assert config.planner.rollout_chunks == 2, "two rollouts of 32 rows hold 45"
    assert config.worldarena() == ProtocolSettings() and not config.worldarena().deviations()
    assert config.planner.world_model == "shipped", "the planner's own settings stay"
    config.check()


def test_other_settings_win_and_are_named() -> None:
    words = ["protocol=worldarena", "episodes=3", "planner.execute_horizon=32", "control=interpolated"]
    config = compose("eval_plan", words, EvalPlanConfig)
    assert config.worldarena().deviations() == ["episodes 3, not 100", "execute_horizon 32, not 45"]
    assert config.claims == "worldarena-interpolated", "the second run is a run of the protocol"
    assert compose("eval_plan", words[::-1], EvalPlanConfig) == config, "whatever the order of the words"
    one = ProtocolSettings(tasks=["click_bell"], manifest="test_ood", max_steps=None)
    assert one.deviations() == [
        "without adjust_bottle",
        "max_steps None, not 400",
        "scenes of test_ood, not of the test set",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["planner.candidates=4", "planner.verifier=spread"], "best of 4 imaginations by spread, not the only one"),
        (["planner.denoising_steps=2"], "denoising_steps 2, not the model's own"),
        (["planner.rollout_chunks=3"], "plans of 3 chained rollouts, not of 1 or 2"),
        (
            ["planner.prompt_template='Do this: {instruction}'"],
            "a prompt around the instruction, not the instruction alone",
        ),
        (["first_seed=100200"], "scenes from seed 100200 on, not the frozen ones"),
    ],
)
def test_whatever_changes_results_is_named(words: list[str], told: str) -> None:
    config = compose("eval_plan", ["protocol=worldarena", *words], EvalPlanConfig)
    assert config.worldarena().deviations() == [told]
    part = worldarena.block({}, config.worldarena())
    json.dumps(part["protocol"], allow_nan=False)
    assert f"differs from the protocol: {told}" in worldarena.markdown(part)
    one = compose("eval_plan", ["protocol=worldarena", "planner.rollout_chunks=1"], EvalPlanConfig)
    assert not one.worldarena().deviations(), "a model whose rollout holds 45 rows needs one"


def test_what_the_protocol_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"tasks: got 'press_stapler'.*adjust_bottle, click_bell"):
        EvalPlanConfig(protocol="worldarena", tasks=["press_stapler"]).check()
    with pytest.raises(UserError, match="control"):
        EvalPlanConfig(protocol="worldarena", control="qpos").check()
    with pytest.raises(UserError, match=r"planner\.oracle"):
        EvalPlanConfig(protocol="worldarena", planner=PlannerSettings(oracle="video"), demos="x").check()
    with pytest.raises(UserError, match="did you mean 'worldarena'"):
        compose("eval_plan", ["protocol=worldarenna"], EvalPlanConfig)
    with pytest.raises(UserError, match="did you mean 'worldarena'"):
        EvalPlanConfig(protocol="worldarenna").check()


def test_one_hundred_frozen_episodes_a_task() -> None:
    config = compose("eval_plan", ["protocol=worldarena", "baselines=[noop]"], EvalPlanConfig)
    plan = _Plan(config)
    for task in worldarena.TASKS:
        frozen = [entry.seed for entry in load_manifest(f"test_{task}").entries]
        assert len(frozen) == len(set(frozen)) == 100 and min(frozen) >= 100_000
        assert [job.seed for job in plan.jobs if job.task == f"{task}/model"] == frozen
    assert len(plan.jobs) == 400


# ---------------------------------------------------------------------------------------------------------------- prompts


def test_templates(tmp_path: Path) -> None:
    (tmp_path / "prefix.txt").write_text("A fixed workspace. The arm enters to{instruction}\n")
    assert read_template(str(tmp_path / "prefix.txt")) == "A fixed workspace. The arm enters to{instruction}"
    for bad in ("no place", "{instruction} and {instruction}", str(tmp_path / "missing.txt")):
        with pytest.raises(UserError, match="prompt_template"):
            read_template(bad)
    odd = "{0.__class__} {instruction} {x}"
    assert PromptedPolicy(_Recorder(), odd)._prompt("go {y}") == "{0.__class__} go {y} {x}", "text is text"


class _Recorder:
    """A policy that remembers what it was told."""

    fingerprint = "inner"

    def __init__(self) -> None:
        self.told: list[str] = []

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self.told.append(instruction)

    def act(self, observation: Observation) -> np.ndarray:
        self.told.append(observation.instruction)
        return observation.state_A[None]

    def telemetry(self) -> dict[str, float]:
        return {"plans": 1.0}


def test_the_prompt_reaches_world_model_and_decoder() -> None:
    inner = _Recorder()
    assert worldarena.prompted(inner, "{instruction}") is inner
    policy = worldarena.prompted(inner, "Rigid arm: {instruction}.")
    policy.reset(task="click_bell", seed=1, instruction="click the bell")
    state = np.arange(14, dtype=np.float32)
    picture = np.zeros((2, 2, 3), np.uint8)
    seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="click the bell", step=3)
    assert (policy.act(seen) == state).all() and policy.telemetry() == {"plans": 1.0}
    assert inner.told == ["Rigid arm: click the bell."] * 2 and seen.instruction == "click the bell"
    other = worldarena.prompted(_Recorder(), "Soft arm: {instruction}.")
    assert len({"inner", policy.fingerprint, other.fingerprint}) == 3, "results of two prompts are not mixed"


def test_the_prompt_is_part_of_the_key(tmp_path: Path) -> None:
    def key(template: str) -> str:
        config = EvalPlanConfig(baselines=[], episodes=1, planner=PlannerSettings(prompt_template=template))
        return _Plan(config).key(Job(task="click_bell/model", seed=100_000)).fingerprint

    path = tmp_path / "prompt.txt"
    path.write_text("one {instruction}")
    first = key(str(path))
    assert first == key("one {instruction}"), "the text counts, not where it stands"
    path.write_text("two {instruction}")
    assert first != key(str(path))


# ---------------------------------------------------------------------------------------------------------------- results


def rows(successes: dict[str, int], n: int, policy: str = "model") -> list[dict[str, object]]:
    return [
        {"task": task, "policy": policy, "seed": 100_000 + k, "status": "success" if k < wins else "failure"}
        for task, wins in successes.items()
        for k in range(n)
    ]


def written(tmp_path: Path, found: list[dict[str, object]], **settings: object) -> tuple[dict, str, list[dict]]:
    config = EvalPlanConfig(
        protocol="worldarena", tasks=list(worldarena.TASKS), max_steps=400, control="topp", **settings
    )  # type: ignore[arg-type]
    config.planner.execute_horizon = 45
    plan = SimpleNamespace(scenes=Scenes(manifests=dict.fromkeys(worldarena.TASKS, "m")), skipped=[])
    summary = _write_summary(config, plan, found, "physis eval plan protocol=worldarena", tmp_path)  # type: ignore[arg-type]
    lines = json.loads((tmp_path / "measurements.json").read_text())
    return summary, (tmp_path / "summary.md").read_text(), lines


def test_the_mean_of_two_tasks_and_its_interval(tmp_path: Path) -> None:
    found = rows({"adjust_bottle": 12, "click_bell": 20}, 100) + rows(
        {"adjust_bottle": 0, "click_bell": 2}, 100, "noop"
    )
    summary, text, lines = written(tmp_path, found, episodes=100)
    mean = summary["worldarena"]["means"]["model"]
    assert (mean["rate"], mean["low"], mean["high"]) == mean_of_proportions([(12, 100), (20, 100)])
    assert mean["n"] == 200 and not summary["worldarena"]["deviations"]
    claims = {line["claim"]: line for line in lines}
    assert claims["planner/worldarena/model/mean/success"]["value"] == 0.16
    assert claims["planner/worldarena/noop/mean/success"]["value"] == 0.01
    assert claims["planner/worldarena/model/mean/success"]["seeds"] == "100000-100099"
    task = claims["planner/worldarena/model/adjust_bottle/success"]
    assert (task["low"], task["high"]) == wilson(12, 100)
    against = claims["planner/worldarena/model/mean/success"]["against"]
    assert against == {
        "execute_horizon": 45, "rollout_chunks": 1, "max_steps": 400, "control": "topp", "denoising_steps": 0, "candidates": 1,
        "deviations": "none",
    }  # fmt: skip
    assert "| model | 16.0 % | 11.8-21.9 % | 200 | 0 |" in text
    assert "executed rows a plan 45, step limit 400, control topp" in text


def test_a_rehearsal_says_so_and_a_missing_task_gives_no_mean(tmp_path: Path) -> None:
    summary, text, lines = written(tmp_path, rows({"click_bell": 1}, 2), episodes=2)
    assert summary["worldarena"]["means"]["model"] == {"skipped": "needs finished episodes of adjust_bottle"}
    assert (
        "skipped: needs finished episodes of adjust_bottle" in text
        and "differs from the protocol: episodes 2, not 100" in text
    )
    assert not [line for line in lines if "/mean/" in line["claim"]]
    torn = [{"task": "adjust_bottle", "policy": "model", "seed": 1, "status": "error"}, *rows({"click_bell": 1}, 2)]
    assert "skipped" in written(tmp_path, torn, episodes=2)[0]["worldarena"]["means"]["model"], "errors are no episodes"


def test_published_rows_stand_apart(tmp_path: Path) -> None:
    summary, text, lines = written(tmp_path, rows({"adjust_bottle": 1, "click_bell": 1}, 2), episodes=2)
    ours, heading, theirs = text.partition("## Published results of WorldArena's action planner (not measured here)")
    assert heading and "TesserAct" in theirs and "TesserAct" not in ours and "| model |" not in theirs
    assert set(summary["tasks"]["click_bell"]) == {"model"} and not [x for x in lines if "TesserAct" in x["claim"]]


def test_published_numbers_are_those_of_the_sources() -> None:
    content = worldarena.published()
    found = {row["planner"]: (row["adjust_bottle"], row["click_bell"], row["mean"]) for row in content["rows"]}
    assert found["Wan2.2-TI2V-5B"] == (12, 20, 16.0) and found["Wan2.2-TI2V-5B + PhysisForcing"] == (22, 26, 24.0)
    assert found["TesserAct"] == (1, 35, 18.0) and len(found) == 10
    for row in content["rows"]:
        assert row["mean"] == (row["adjust_bottle"] + row["click_bell"]) / 2
        assert row["sources"] and all(name in content["sources"] for name in row["sources"])
        assert row["mean_interval"][0] < row["mean"] / 100 < row["mean_interval"][1]
    wan = next(row for row in content["rows"] if row["planner"] == "Wan2.2-TI2V-5B")
    assert wan["intervals"]["adjust_bottle"] == pytest.approx((0.07, 0.20), abs=0.006)


# ---------------------------------------------------------------------------------------------------------------- the page


def test_commands_of_the_page_fit_their_settings() -> None:
    from physisforcing import cli
    from physisforcing.data_export import DataExportConfig
    from physisforcing.envs.collect import CollectConfig
    from physisforcing.eval_evaluator import EvaluatorConfig

    schemas = {
        "eval plan": ("eval_plan", EvalPlanConfig),
        "data export": ("data_export", DataExportConfig),
        "eval evaluator": ("eval_evaluator", EvaluatorConfig),
        "data collect": ("collect", CollectConfig),
    }
    text = (Path(__file__).resolve().parents[2] / "docs/worldarena.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    composed = []
    for words in (shlex.split(line)[1:] for line in lines if line.startswith("physis ")):
        verb, rest = cli.find_verb(words)
        if verb in schemas:
            made = compose(schemas[verb][0], rest, schemas[verb][1])
            composed.append(verb)
            if verb == "eval plan" and "prompt_template" not in " ".join(rest):
                made.check()
    assert len(composed) >= 12 and set(composed) == set(schemas)
