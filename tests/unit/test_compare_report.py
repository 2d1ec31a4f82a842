"""What a comparison writes: units of every score, measurements, crashed episodes on the page."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.compare import CompareConfig, ComparedModel
from physisforcing.compare_episodes import judged_ends
from physisforcing.compare_report import UNKNOWN_UNIT, imagined_success, unit, write_comparison
from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.plan_scenes import Scenes
from physisforcing.planner.comparison_rows import COUNT_SUFFIX, TESTED_SCORES
from physisforcing.planner.imagination_media import ImaginedChunk
from physisforcing.planner.imagination_rows import Row, merge_rows
from physisforcing.planner.imagination_scores import own_and_other, score_imagination

PX, STEPS = "px of 240x320", "control steps"


def still_scene(steps: int) -> ExecutedChunk:
    """A small scene in which nothing moves."""
    bodies = 3
    ids = np.ones((240, 320), np.uint16)
    ids[100:140, 100:140], ids[20:60, 20:60] = 2, 3
    poses = np.tile(np.array([0, 0, 1, 1, 0, 0, 0], np.float32), (steps + 1, bodies, 1))
    return ExecutedChunk(
        poses_TK7=poses,
        body_ids_K=np.array([1, 2, 3], np.uint16),
        body_names={1: "table", 2: "050_bell", 3: "fr_link8"},
        contact_step_M=np.zeros(0, np.int32),
        contact_pair_M2=np.zeros((0, 2), np.uint16),
        contact_impulse_M=np.zeros(0, np.float32),
        intrinsics_33=np.array([[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]]),
        world_to_camera_44=np.eye(4),
        depth_HW=np.ones((240, 320), np.float32),
        body_HW=ids,
        success_T=np.zeros(steps + 1, bool),
        start_step=0,
    )


def row_of_scores() -> Row:
    """Every score that an episode of a comparison can have."""
    chunk = still_scene(32)
    video = np.random.default_rng(0).integers(0, 255, (1, 120, 160, 3)).astype(np.uint8).repeat(9, 0)
    times = np.arange(9) * 0.24
    row = merge_rows([score_imagination(video, times, chunk, video, times)])
    return row | own_and_other(video, times, chunk, chunk) | {"joint_deg": 1.0, "joint_deg_to_other": 2.0}


def expected_unit(name: str) -> str:
    """Said again in another way: by what the name is about."""
    told = {"chunks": "chunks", "seconds": "s", "pose_seconds": "s", "joint_deg": "deg", "joint_deg_to_other": "deg"}
    if name in told:
        return told[name]
    about = {"_px": PX, "_mm": "mm", "_deg": "deg", "_steps": STEPS}
    return next((word for part, word in about.items() if f"{part}_" in f"{name}_"), "share")


def test_every_score_has_its_unit() -> None:
    names = [name for name in row_of_scores() if not name.endswith(COUNT_SUFFIX)]
    assert len(names) > 100 and set(TESTED_SCORES) <= set(names)
    assert {name: unit(name) for name in names} == {name: expected_unit(name) for name in names}
    for name, wanted in (
        ("object_px_0.96s", PX),
        ("object_px_0.96s_floor", PX),
        ("gripper_moved_px_1.92s", PX),
        ("scenery_lost_0.24s", "share"),
        ("object_unjudged_1s", "share"),
        ("pose_mm_floor", "mm"),
        ("pose_deg_floor", "deg"),
        ("pose_seconds", "s"),
        ("joint_deg_to_other", "deg"),
        ("onset_error_steps_floor", STEPS),
        ("contact_onset_bias_steps", STEPS),
        ("arm_other_px", PX),
        ("chunks", "chunks"),
        ("seconds", "s"),
    ):
        assert unit(name) == wanted, name
    assert unit("beauty") == UNKNOWN_UNIT


def test_measurements_have_units_and_the_page_lists_crashes(tmp_path) -> None:
    scores = {"object_px_0.96s": 3.5, "object_px_0.96s_n": 64, "chunks": 2, "joint_deg_to_other": 4.0}
    rows = [
        {"task": "click_bell", "seed": 100_000 + k, "policy": "a", "status": "failure", "scores": scores}
        for k in range(2)
    ]
    rows.append(
        {
            "task": "click_bell",
            "seed": 100_002,
            "policy": "a",
            "status": "error",
            "error": "Traceback\nOSError: it died",
        }
    )
    plan = SimpleNamespace(
        models={"a": ComparedModel(source="shipped")},
        names=["a"],
        skipped={},
        note="",
        filmed=set(),
        scenes=Scenes(manifests={"click_bell": "m"}),
    )
    config = CompareConfig(models={"a": "shipped"}, output=str(tmp_path))
    write_comparison(config, plan, rows, command="physis compare")  # type: ignore[arg-type]
    lines = {line["claim"].split("/")[-1]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
    units = {name: line["unit"] for name, line in lines.items()}
    assert units == {"success": "share", "object_px_0.96s": PX, "chunks": "chunks", "joint_deg_to_other": "deg"}
    assert lines["chunks"]["low"] is None and lines["success"]["n"] == 2
    page, text = ((tmp_path / f"report.{end}").read_text(encoding="utf-8") for end in ("html", "md"))
    assert "a on click_bell/100002: OSError: it died" in page and "OSError: it died" in text
    assert "covers 0 p-values" in page


class ByBrightness:
    """A success classifier: how bright the last picture is."""

    def probability(self, frames_BTHWC: np.ndarray, tasks: list[str]) -> np.ndarray:
        return frames_BTHWC[:, -1, 0, 0, 0] / 255


def test_every_chunk_is_judged_at_its_end() -> None:
    """Three plans of 32 steps: executed whole, cut after 16 by the next plan, ended by success after 6; a fourth was never executed."""
    times = np.arange(17) * 0.12
    frames = np.broadcast_to((np.arange(17, dtype=np.uint8) * 15)[:, None, None, None], (17, 12, 16, 3))
    imagined = [ImaginedChunk(step=step, frames_THWC=frames, times_T=times) for step in (0, 32, 48, 80)]
    chunks = [executed(start, steps, done) for start, steps, done in ((0, 32, False), (32, 16, False), (48, 6, True))]
    found = judged_ends(ByBrightness(), "click_bell", imagined, chunks)
    assert found == [
        (pytest.approx(240 / 255), False),
        (pytest.approx(120 / 255), False),
        (pytest.approx(240 / 255), True),
    ]


def test_imagined_success_is_told_for_last_and_for_all_chunks() -> None:
    rows = [
        {"policy": "a", "status": "success", "imagined_success": 0.9, "imagined_success_chunks": [[0.2, False], [0.9, True]]},
        {"policy": "a", "status": "failure", "imagined_success": 0.8, "imagined_success_chunks": [[0.7, False], [0.8, False]]},
        {"policy": "a", "status": "error", "imagined_success": 0.8},
    ]  # fmt: skip
    found = imagined_success(rows)
    assert set(found) == {"a", "a, every chunk"}
    assert (found["a"].n, found["a"].specificity) == (2, 0.0)
    assert (found["a, every chunk"].n, found["a, every chunk"].specificity) == (4, pytest.approx(1 / 3))


def executed(start: int, steps: int, done: bool) -> ExecutedChunk:
    success = np.zeros(steps + 1, bool)
    success[-1] = done
    return dataclasses.replace(still_scene(steps), success_T=success, start_step=start)


def test_every_finding_is_a_measurement_with_its_scenes(tmp_path) -> None:
    """Success, scores, paired differences with both p, gaps to controls, and imagined success: what a document may state has a line."""
    seeds = list(range(100_000, 100_006))
    rows = [
        {
            "task": "click_bell", "seed": seed, "policy": name, "status": "success" if k < wins else "failure",
            "scores": {"object_px_0.96s": px + 0.1 * k}, **({"imagined_success": 0.9 - 0.05 * k} if name == "a" else {}),
        }
        for name, wins, px in (("a", 5, 2.0), ("b", 2, 4.0), ("perfect", 6, 1.0))
        for k, seed in enumerate(seeds)
    ]  # fmt: skip
    models = {name: ComparedModel(source="shipped") for name in "ab"}
    plan = SimpleNamespace(
        models=models, names=["a", "b", "perfect"], skipped={}, note="", filmed=set(),
        scenes=Scenes(manifests={"click_bell": "m"}, seeds={"click_bell": seeds}),
    )  # fmt: skip
    config = CompareConfig(models={"a": "shipped", "b": "shipped"}, output=str(tmp_path))
    write_comparison(config, plan, rows, command="physis compare")  # type: ignore[arg-type]
    lines = {line["claim"]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
    assert {line["seeds"] for line in lines.values()} == {"100000-100005"}
    assert CompareConfig(manifest="test_ood").claims == "interpolated-test_ood", "other scenes have claims of their own"
    success = lines["compare/interpolated/a-minus-b/click_bell/success_difference"]
    assert success["value"] == pytest.approx(3 / 6) and success["n"] == 6 and success["low"] < 0.5 < success["high"]
    assert success["against"]["only_a"] == 3 and success["against"]["mcnemar_p"] == 0.25  # 3 of 3: 2 / 2**3
    assert success["against"]["p_holm"] >= success["against"]["mcnemar_p"]
    gap = lines["compare/interpolated/perfect-minus-b/click_bell/success_difference"]
    assert gap["value"] == pytest.approx(4 / 6) and "mcnemar_p" not in gap["against"]
    score = lines["compare/interpolated/a-minus-b/click_bell/object_px_0.96s_difference"]
    assert score["value"] == pytest.approx(-2) and score["unit"] == PX and score["against"]["sign_flip_p"] is not None
    imagined = lines["compare/interpolated/a/imagined_success/balanced_accuracy"]
    assert imagined["value"] == pytest.approx(0.5) and imagined["n"] == 6  # every one is called success
    assert lines["compare/interpolated/a/imagined_success/brier"]["unit"] == "probability^2"


def test_a_page_without_crashes_has_no_such_section(tmp_path) -> None:
    rows = [{"task": "click_bell", "seed": 100_000, "policy": "a", "status": "failure", "scores": {}}]
    plan = SimpleNamespace(
        models={"a": ComparedModel(source="shipped")}, names=["a"], skipped={}, note="", filmed=set(),
        scenes=Scenes(manifests={"click_bell": "m"}),
    )  # fmt: skip
    config = CompareConfig(models={"a": "shipped"}, output=str(tmp_path))
    write_comparison(config, plan, rows, command="physis compare")  # type: ignore[arg-type]
    assert "Crashed episodes" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_worldarenas_protocol_is_named_with_what_differs(tmp_path) -> None:
    """Its episodes have claims of their own; the report says what is not as in the protocol."""
    words = ["protocol=worldarena", "models={a:shipped}", "episodes=2", f"output={tmp_path}"]
    config = compose("compare", words, CompareConfig)
    assert (config.tasks, config.control, config.max_steps) == (["adjust_bottle", "click_bell"], "topp", 400)
    assert (config.planner.execute_horizon, config.planner.rollout_chunks) == (45, 2)
    config.check()
    rows = [
        {"task": task, "seed": 100_000 + k, "policy": "a", "status": status, "scores": {}}
        for task, status in (("adjust_bottle", "success"), ("click_bell", "failure"))
        for k in range(2)
    ]
    plan = SimpleNamespace(
        models={"a": ComparedModel(source="shipped")}, names=["a"], skipped={}, note="", filmed=set(),
        scenes=Scenes(manifests=dict.fromkeys(config.tasks, "m")),
    )  # fmt: skip
    summary = write_comparison(config, plan, rows, command="physis compare")  # type: ignore[arg-type]
    assert "WorldArena's protocol; differs from it: episodes 2, not 100." in summary["notes"]
    claims = {line["claim"]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
    mean = next(line for claim, line in claims.items() if claim.startswith("compare/worldarena/a/") and line["n"] == 4)
    assert mean["against"]["deviations"] == "episodes 2, not 100"
    assert mean["value"] == 0.5 and all(claim.startswith("compare/worldarena/") for claim in claims)
    once_more = compose("compare", [*words, "control=interpolated"], CompareConfig)
    assert once_more.claims == "worldarena-interpolated" and CompareConfig().claims == "interpolated"
    with pytest.raises(UserError, match=r"tasks: got 'press_stapler'"):
        compose("compare", [*words, "tasks=[press_stapler]"], CompareConfig).check()
    with pytest.raises(UserError, match="did you mean 'worldarena'"):
        CompareConfig(models={"a": "shipped"}, protocol="worldarna").check()


def test_seeds_are_paired_where_the_command_says_so(tmp_path) -> None:
    """Two recipes of five training seeds each: ``paired_seeds`` decides which test is used."""
    names = [f"{recipe}{seed}" for recipe in ("flow", "physis") for seed in range(5)]
    models = {name: ComparedModel(source="shipped", recipe=name[:-1], training_seed=int(name[-1])) for name in names}
    rows = [
        {"task": "click_bell", "seed": 100_000 + k, "policy": name, "status": "success" if k < 1 + (name[0] == "p") else "failure"}
        for name in names
        for k in range(3)
    ]  # fmt: skip
    plan = SimpleNamespace(
        models=models, names=names, skipped={}, note="", filmed=set(), scenes=Scenes(manifests={"click_bell": "m"})
    )  # fmt: skip
    methods, notes = {}, {}
    for paired in (False, True):
        config = CompareConfig(models=dict.fromkeys(names, "shipped"), output=str(tmp_path), paired_seeds=paired)
        summary = write_comparison(config, plan, rows, command="physis compare")  # type: ignore[arg-type]
        methods[paired] = next(row["method"] for row in summary["seeds"] if row["measure"] == "success")
        lines = {line["claim"]: line for line in json.loads((tmp_path / "measurements.json").read_text())}
        assert lines["compare/interpolated/recipes/flow-minus-physis/click_bell/success_difference"]["n"] == (
            5 if paired else 10
        )
        plan.models = {name: model for name, model in models.items() if name != "physis4"}
        few = [row for row in rows if row["policy"] != "physis4"]
        notes[paired] = " ".join(write_comparison(config, plan, few, command="x")["notes"])  # type: ignore[arg-type]
        plan.models = models
    assert "not paired" in methods[False] and "as declared" in methods[True]
    assert "Pairs of training seeds were declared, but" in notes[True] and "Pairs of" not in notes[False]


@pytest.mark.parametrize("name", TESTED_SCORES)
def test_tested_scores_are_measured_in_something(name: str) -> None:
    assert unit(name) in (PX, STEPS, "mm", "deg", "share")
