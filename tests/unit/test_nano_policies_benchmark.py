"""benchmarks/nano_policies.py goes on where it stopped, mixes nothing up, and gives `physis` what it takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from physisforcing.core.config import compose
from physisforcing.eval_policy import EvalPolicyConfig
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.worldmodel.training.config import TrainWorldModelConfig


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import nano_policies

    return nano_policies


def nano(script: ModuleType, work: Path, *words: str) -> Any:
    return script.Nano(script.read_options(["--data", str(work), "--work", str(work / "runs"), "--tiny", *words]))


def finish(out: Path, *, export: bool = True, after: bool = True) -> None:
    (out / "export").mkdir(parents=True) if export else out.mkdir(parents=True, exist_ok=True)
    values = {"before": {"heldout_fm": 2.0}} | ({"after": {"heldout_fm": 1.0}} if after else {})
    (out / "heldout.json").write_text(json.dumps(values))
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": k, "step_ms": 10.0 * k}) + "\n" for k in range(4)))


class Recorded:
    """Commands in place of processes. ``makes``: what each leaves behind."""

    def __init__(self, made: Any, makes: dict[str, dict[str, bool]] | None = None) -> None:
        self.words: dict[str, list[str]] = {}
        self.made, self.makes = made, makes or {}
        made.physis = self

    def __call__(self, name: str, words: list[str], gpus: str = "") -> int:
        self.words[name] = words
        if words[0] == "train":
            finish(self.made.work / name, **self.makes.get(name, {}))
        elif words[0] == "eval":
            (self.made.work / name).mkdir()
            (self.made.work / name / "summary.md").write_text("")
        return 0


@pytest.mark.parametrize("left", [{"after": False}, {"export": False}], ids=["before its end", "before its export"])
def test_a_training_that_was_killed_goes_on_and_a_whole_one_is_kept(
    script: ModuleType, tmp_path: Path, left: dict[str, bool]
) -> None:
    made = nano(script, tmp_path)
    finish(made.backbone, **left)
    recorded = Recorded(made)
    if left == {"after": False}:
        (made.backbone / "export").rmdir()
    made.world_model()
    assert "run.resume=true" in recorded.words["backbone_0"]
    again = nano(script, tmp_path)
    recorded = Recorded(again)
    again.world_model()
    assert not recorded.words
    (line,) = again.lines()
    assert line["claim"] == "policy/nano/backbone_0/training_s"
    assert line["against"]["update_ms"] == 20.0, "the first is left out"
    assert line["against"]["parts"] == 1


def test_a_training_that_ends_early_and_one_of_other_settings_are_told(script: ModuleType, tmp_path: Path) -> None:
    made = nano(script, tmp_path)
    Recorded(made, {"backbone_0": {"after": False}})
    with pytest.raises(RuntimeError, match="backbone_0 ended before its last update"):
        made.world_model()
    other = nano(script, tmp_path, "--backbone-seed", "0")
    other.options.steps = ["7", "7"]
    with pytest.raises(RuntimeError, match=r"backbone_0\.json has other settings(.|\n)*another --work"):
        other.world_model()


def test_every_command_is_one_that_physis_takes(script: ModuleType, tmp_path: Path) -> None:
    made = nano(script, tmp_path, "--seeds", "0,1", "--decoder", "runs/idm/model")
    made.options.tiny, made.options.steps = False, ["1200", "2500"]
    recorded = Recorded(made)
    for part in ("world_model", "policies", "evaluation", "planner"):
        getattr(made, part)()
    words = recorded.words
    assert sorted(words) == ["actions_0", "actions_1", "backbone_0", "evaluation", "joint_0", "joint_1", "planner"]
    assert compose("train_worldmodel", words["backbone_0"][2:], TrainWorldModelConfig).run.steps == 1200
    policy = compose("train_policy", words["actions_1"][2:], TrainPolicyConfig)
    assert (policy.video_weight, policy.run.seed, policy.run.batch, policy.run.steps) == (0.0, 1, 128, 2500)
    found = compose("eval_policy", words["evaluation"][2:], EvalPolicyConfig)
    assert found.policies["joint_1"]["source"] == str(made.work / "joint_1" / "export")
    planned = compose("eval_policy", words["planner"][2:], EvalPolicyConfig)
    assert planned.policies == ["planner"] and planned.planner.decoder == "runs/idm/model"
    # settings of a policy's server are refused for the planner
    assert not any(word.startswith("policy.") for word in words["planner"])


def test_all_that_failed_is_named(script: ModuleType, tmp_path: Path) -> None:
    made = nano(script, tmp_path, "--seeds", "0")
    Recorded(made, {"joint_0": {"after": False}, "actions_0": {"export": False}})
    with pytest.raises(RuntimeError, match=r"joint_0 ended(.|\n)*actions_0 ended"):
        made.policies()


def test_a_signal_reaches_the_command_that_runs_and_ends_the_script(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = nano(script, tmp_path)
    saved = tmp_path / "saved"
    waits = f"""
import signal, sys, time, pathlib
def save(*_):
    time.sleep(0.3); pathlib.Path({str(saved)!r}).touch(); sys.exit(3)
signal.signal(signal.SIGINT, save)
pathlib.Path({str(tmp_path / "begun")!r}).touch()
time.sleep(60)
"""
    usual = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **named: usual([sys.executable, "-c", waits], **named))

    def stop_once_begun(*_: Any) -> None:
        if (tmp_path / "begun").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            made.stop()

    before = signal.signal(signal.SIGALRM, stop_once_begun)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    begun = time.monotonic()
    try:
        with pytest.raises(script.Stopped):
            made.targets()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert saved.exists(), "it was let to save"
    assert time.monotonic() - begun < 30
    with pytest.raises(script.Stopped):
        made.targets()


def test_what_cannot_be_is_said_at_once(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["--parts", "polices"], "polices: known are"), (["--recipes", "jont"], "jont: known are")):
        with pytest.raises(SystemExit):
            nano(script, tmp_path, *words)
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.read_options(["--data", "a", "--work", "runs/a,b", "--tiny"])
    assert "--work" in capsys.readouterr().err
