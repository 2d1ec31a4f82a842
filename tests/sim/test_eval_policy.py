"""``physis eval policy`` in the real simulator: rows of policies and baselines, killed and continued, errors, the planner's row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import toy_policies
from acting_policy import acting_policy
from physisforcing.core.errors import IncompleteCoverageError
from physisforcing.core.paths import weights_root
from physisforcing.core.video import probe_mp4
from physisforcing.eval_plan import EvalPlanConfig, PlannerSettings
from physisforcing.eval_plan import evaluate as evaluate_plan
from physisforcing.eval_policy import EvalPolicyConfig, evaluate, main
from physisforcing.policies import PolicySettings

pytestmark = pytest.mark.sim
TASK = "click_bell"
#: Words of a command that takes seconds: two scenes, a policy, no-op and the expert.
WORDS = [
    "policies=[toy_policies:swaying]", "policy.execute=10", "tasks=[click_bell]", "episodes=2", "max_steps=100", "threads=1",
    "baselines=[noop,expert]", "videos=1",
]  # fmt: skip


def stable(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a results file by policy and seed, without what a clock measured."""
    kept = {}
    for line in (folder / "results.jsonl").read_bytes().splitlines():
        if not line.endswith(b"}"):
            continue
        row = json.loads(line)
        plain = {name: value for name, value in row.items() if name != "seconds" and not name.endswith("_s")}
        plain["telemetry"] = {name: value for name, value in row["telemetry"].items() if not name.endswith("_s")}
        assert (row["policy"], row["seed"]) not in kept, "no episode is counted twice"
        kept[row["policy"], row["seed"]] = plain
    return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("policy") / "whole"
    assert main([*WORDS, f"output={folder}"]) == 0
    return folder


def test_policies_and_baselines_of_the_same_scenes(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    rows = summary["tasks"][TASK]
    assert list(rows) == ["swaying", "noop", "expert"] and all(r["n"] == 2 and not r["errors"] for r in rows.values())
    assert rows["expert"]["successes"] == 2 and rows["noop"]["successes"] == 0 == rows["swaying"]["successes"]
    assert rows["swaying"]["telemetry"]["plans"] == 10, "100 steps, planned again after 10"
    episodes = stable(whole)
    sums = [episodes["swaying", seed]["telemetry"]["sum"] for seed in rows["swaying"]["seeds"]]
    assert sums[0] != sums[1], "each scene has its own noise"
    assert len({row["scene_hash"] for row in episodes.values()}) == 2 and len(episodes) == 6
    lines = {line["claim"]: line for line in json.loads((whole / "measurements.json").read_text())}
    assert lines[f"policy/expert/{TASK}/success"]["value"] == 1.0
    swaying = lines[f"policy/swaying/{TASK}/success"]
    assert (
        swaying["n"] == 2 and swaying["against"]["execute"] == 10 and swaying["against"]["scenes"].startswith("test_")
    )
    films = sorted((whole / "videos").glob("*.mp4"))
    assert [film.name.rsplit("_", 1)[1] for film in films] == ["success.mp4", "failure.mp4"], "of expert and policy"
    assert "not generated: swaying acts" in probe_mp4(films[1]).metadata["comment"]


def test_the_shipped_policy_acts_by_its_name(tmp_path: Path) -> None:
    words = ["policy=policy_pico", "tasks=[click_bell]", "episodes=3", "baselines=[noop]", "threads=1", "videos=0"]
    assert main([*words, f"output={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["tasks"][TASK]
    assert rows["policy_pico"]["successes"] == 3 and rows["noop"]["successes"] == 0
    shipped = {path: path.stat().st_size for path in weights_root().rglob("*.safetensors")}
    assert sum(size for path, size in shipped.items() if path.parent.name == "policy_pico") < 10e6
    assert sum(shipped.values()) < 45e6


def test_killed_and_continued_gives_the_same_rows(whole: Path, tmp_path: Path) -> None:
    folder, results = tmp_path / "killed", tmp_path / "killed" / "results.jsonl"
    helpers = str(Path(toy_policies.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "physisforcing", "eval", "policy", *WORDS, f"output={folder}"],
        env=os.environ | {"PYTHONPATH": helpers, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (results.exists() and results.read_bytes().count(b"\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    done = results.read_bytes()
    assert 2 <= done.count(b"\n") < 6, "killed in the middle"
    assert not (folder / "summary.md").exists()
    results.write_bytes(done + b'{"manifest": "te')  # and a torn line, as a writer leaves it
    assert main([*WORDS, f"output={folder}"]) == 0
    assert results.read_bytes().startswith(done), "what was there stays"
    assert stable(folder) == stable(whole)


def test_errors_are_counted_and_give_exit_code_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_policies.Falling.closed = 0
    drawn: list[Any] = []
    make = gymnasium.make
    monkeypatch.setattr(gymnasium, "make", lambda *a, **k: drawn.append(k.get("cameras", ("head",))) or make(*a, **k))
    words = [
        "policy=toy_policies:falling",
        "manifest=none",
        "episodes=2",
        "max_steps=12",
        "threads=1",
        "baselines=[noop]",
    ]
    with pytest.raises(IncompleteCoverageError, match="1 episodes ended in errors") as caught:
        main([*words, "control=topp", "videos=0", f"output={tmp_path}"])
    assert caught.value.exit_code == 3
    assert toy_policies.Falling.closed == 2, "once when it said what it is, once when the episodes were done"
    assert drawn == [("head", "left_wrist"), ("head",)], "a wrist is drawn for the row that looks at it"
    rows = stable(tmp_path)
    assert rows["falling", 100_000]["status"] == "failure" and rows["falling", 100_000]["steps"] == 12
    failed = rows["falling", 100_001]
    assert failed["status"] == "error" and "it fell over" in failed["error"]
    entry = json.loads((tmp_path / "summary.json").read_text())["tasks"][TASK]["falling"]
    assert (entry["n"], entry["errors"]) == (1, 1)
    lines = json.loads((tmp_path / "measurements.json").read_text())
    assert [line["claim"] for line in lines] == [f"policy/topp-{name}/{TASK}/success" for name in ("falling", "noop")]
    assert "| falling | 0/1 | 0 % |" in capsys.readouterr().out


def test_a_world_action_policy_acts_in_each_of_its_ways(tmp_path: Path) -> None:
    """Random weights: what is tested is that folders load and plan as often as they should."""
    first, both = (acting_policy(tmp_path / mode / "export", mode=mode) for mode in ("first_frame", "optional_idm"))
    policies: dict[str, Any] = {
        "receding": {"source": str(first)},
        "overlapping": {"source": str(first), "execution": "async", "execute": 8, "delay": 4},
        "imagining": {"source": str(both), "mode": "idm", "video_steps": 2},
    }
    shared: dict[str, Any] = {"episodes": 1, "max_steps": 24, "threads": 1, "videos": 0, "baselines": []}
    shared |= {"policies": policies, "policy": PolicySettings(steps=3)}
    summary = evaluate(EvalPolicyConfig(output=str(tmp_path / "a"), **shared), progress=False)
    rows = summary["tasks"][TASK]
    assert {name: (row["n"], row["errors"]) for name, row in rows.items()} == dict.fromkeys(policies, (1, 0))
    telemetry = {name: row["telemetry"] for name, row in rows.items()}
    assert {name: told["plans"] for name, told in telemetry.items()} == {
        "receding": 2,
        "overlapping": 3,
        "imagining": 2,
    }
    assert telemetry["overlapping"]["dropped"] == 8 and telemetry["receding"]["dropped"] == 0
    acted = stable(tmp_path / "a")
    assert len({row["fingerprint"] for row in acted.values()}) == 3, "another way to act is another result"
    assert {row["steps"] for row in acted.values()} == {24}


def test_the_planner_is_the_row_that_eval_plan_writes(tmp_path: Path) -> None:
    """The same weights, settings and scene: the same row under the same key, whichever command ran it."""
    shared: dict[str, Any] = {"episodes": 1, "max_steps": 6, "threads": 1, "videos": 0, "baselines": ["noop"]}
    planner = PlannerSettings(denoising_steps=1, max_resamples=0)
    planned = EvalPlanConfig(planner=planner, output=str(tmp_path / "plan"), **shared)
    evaluate_plan(planned, progress=False)
    policy = PolicySettings(source="planner")
    acted = EvalPolicyConfig(policy=policy, planner=planner, output=str(tmp_path / "policy"), **shared)
    evaluate(acted, progress=False)
    one, two = stable(tmp_path / "plan"), stable(tmp_path / "policy")
    (seed,) = {seed for _, seed in one}
    assert two["noop", seed] == one["noop", seed]
    assert two["planner", seed] == one["model", seed] | {"policy": "planner"}
    assert two["planner", seed]["steps"] == 6 and two["planner", seed]["telemetry"]["plans"] == 1
