"""The demo's stages: what is reused, what runs again, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from physisforcing import demo_report, demo_stages
from physisforcing.core import ground_truth
from physisforcing.core.errors import UserError
from physisforcing.core.lerobot_format import GROUND_TRUTH_PATH, place
from physisforcing.core.report.data import LossChange, ReportData, Stage, SuccessRow
from physisforcing.core.report.runs import read_losses
from physisforcing.demo import DemoConfig, Stages
from physisforcing.plan_scenes import FIRST_SEED


class Counter:
    def __init__(self, output: Path) -> None:
        self.calls, self.output = 0, output

    def __call__(self) -> dict:
        self.calls += 1
        self.output.write_text("made", encoding="utf-8")
        return {"call": self.calls}


def run(folder: Path, work: Counter, inputs: dict, *, fresh: bool = False) -> tuple[dict, bool]:
    stages = Stages(folder, fresh=fresh, say=lambda text: None)
    result = stages.run("a stage", "what", inputs, work, [work.output])
    return result, stages.records[0].reused


def test_a_stage_is_reused_only_with_equal_inputs_and_its_files(tmp_path: Path) -> None:
    work = Counter(tmp_path / "output")
    assert run(tmp_path, work, {"seed": 1}) == ({"call": 1}, False)
    assert run(tmp_path, work, {"seed": 1}) == ({"call": 1}, True)
    assert run(tmp_path, work, {"seed": 2}) == ({"call": 2}, False)
    work.output.unlink()
    assert run(tmp_path, work, {"seed": 2}) == ({"call": 3}, False)
    assert run(tmp_path, work, {"seed": 2}, fresh=True) == ({"call": 4}, False)
    (tmp_path / "stages" / "a_stage.json").write_text("{cut off", encoding="utf-8")
    assert run(tmp_path, work, {"seed": 2}) == ({"call": 5}, False)


def test_a_stage_that_fails_leaves_nothing_to_reuse(tmp_path: Path) -> None:
    def fail() -> dict:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Stages(tmp_path, fresh=False, say=lambda text: None).run("a stage", "what", {}, fail)
    work = Counter(tmp_path / "output")
    assert run(tmp_path, work, {}) == ({"call": 1}, False)


def test_source_hash_depends_on_the_room() -> None:
    one, two = demo_stages.source_hash("core"), demo_stages.source_hash("core", "envs")
    assert one == demo_stages.source_hash("core") and one != two
    assert demo_stages.source_hash("worldmodel/data") != demo_stages.source_hash("worldmodel/physics")


@pytest.mark.parametrize("wrong", [{"episodes": [5]}, {"heldout": 16}, {"heldout": 0}])
def test_settings_that_cannot_work_are_refused(wrong: dict) -> None:
    DemoConfig().check()
    with pytest.raises(UserError, match=next(iter(wrong))):
        DemoConfig(**wrong).check()


def test_seeds_stay_in_their_ranges() -> None:
    assert demo_stages.TRAIN_SEED >= 0 and demo_stages.TRAIN_SEED + DemoConfig().demonstrations < 9_999
    assert FIRST_SEED >= 100_000, "the closed loop leaves its scenes to eval plan"


def test_ground_truth_lies_where_the_writer_puts_it() -> None:
    """Episodes from 1000 on are in the next chunk."""
    for episode in (0, 1234):
        assert ground_truth.episode_path("root", episode) == Path("root") / GROUND_TRUTH_PATH.format(**place(episode))
    assert "chunk-001" in str(ground_truth.episode_path("root", 1234))


def test_the_report_of_the_demo_draws_a_task_whose_demonstrations_all_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from physisforcing.core import lerobot

    episodes = [("click_bell", False), ("click_bell", True), ("adjust_bottle", False), ("adjust_bottle", None)]
    listed = [SimpleNamespace(index=k, task_name=task, success=ok) for k, (task, ok) in enumerate(episodes)]
    monkeypatch.setattr(lerobot, "LeRobotDataset", lambda root: SimpleNamespace(episodes=listed))
    assert demo_report._first_episodes(Path("anywhere"), ["click_bell", "adjust_bottle"]) == [1, 2]


def test_losses_and_summary_tell_what_did_not_go_down() -> None:
    heldout = {
        "before": {"heldout_fm": 1.0, "heldout_pix": 0.2, "heldout_sem": 0.3},
        "after": {"heldout_fm": 0.9, "heldout_pix": 0.25, "heldout_sem": float("nan")},
    }
    losses = read_losses(heldout)
    assert [change.lower for change in losses] == [True, False, False]
    data = ReportData(
        title="t",
        summary="s",
        created="c",
        losses=[*losses, LossChange(term="equal", meaning="", before=1.0, after=1.0)],
        success=[SuccessRow(task="click_bell", policy="model", successes=4, episodes=5, errors=1)],
        stages=[Stage(name="train", what="", seconds=61.0, reused=True)],
    )
    text = demo_report.summary_table(data)
    assert text.count("NOT LOWER") == 3 and "38% to 96%" in text and "(1 crashed)" in text and "reused" in text
    assert json.loads(json.dumps(data.to_json()))["losses"][0]["after"] == 0.9
