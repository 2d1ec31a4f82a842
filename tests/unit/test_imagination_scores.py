"""Scores of imagined videos on drawn scenes whose true motion, and whose errors, are known by construction."""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np
import pytest

from drawn_scene import (
    DEPTH,
    FINGER,
    FOCAL,
    HALF,
    OBJECT,
    STEPS,
    TIMES,
    TRUE,
    execute,
    finger,
    pushed,
    ramp,
    truth,
    video,
)
from physisforcing.core.errors import UserError
from physisforcing.core.types import DT
from physisforcing.planner.comparison import EpisodeOutcome, compare
from physisforcing.planner.imagination_fit import fit_similarity
from physisforcing.planner.imagination_objects import Limits, ObjectMotion, onset_scores
from physisforcing.planner.imagination_rows import merge_rows
from physisforcing.planner.imagination_scores import ImaginationScoring, _track_scores, own_and_other, score_imagination
from physisforcing.planner.imagination_tracks import BodyPoints, TimedTracks, sample_points, true_tracks


def scores(imagined: np.ndarray, times: np.ndarray = TIMES) -> dict:
    executed, real = truth()
    return score_imagination(imagined, times, executed, real, TIMES)


@cache
def perfect_row() -> dict:
    return scores(truth()[1])


@cache
def frozen_row() -> dict:
    return scores(np.repeat(truth()[1][:1], len(TIMES), 0))


def rests(k: float) -> tuple[float, float, float]:
    return 150.0, 120.0, 0.0


def test_true_tracks_follow_the_drawing() -> None:
    """Points of the object against the motion that drew it."""
    executed, _ = truth()
    points = sample_points(executed, points_per_body=32)
    assert points.bodies("object") == [OBJECT] and points.bodies("gripper") == [FINGER] and points.bodies("robot") == []
    mask = points.body_N == OBJECT
    assert mask.sum() == 32
    offset = points.query_N2[mask] - (150, 120)
    x, y, degrees = pushed(STEPS)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    expected = offset @ np.array([[c, s], [-s, c]]) + (x, y)
    assert np.abs(points.truth.points_TN2[-1, mask] - expected).max() < 0.05
    assert np.abs(offset).max() < HALF[OBJECT] - 2  # the rim is left out


def test_a_perfect_imagination_scores_the_floor() -> None:
    row = perfect_row()
    for group in ("object", "gripper", "arm"):
        assert row[f"{group}_px_1.92s"] == row[f"{group}_px_1.92s_floor"] < 2.0
        assert row[f"{group}_lost_1.92s"] == 0 and row[f"{group}_px_1.92s_n"] > 20
    assert row["object_moved_px_1.92s"] == pytest.approx(np.hypot(24 * 1.5, 24 * 0.4), rel=0.1)
    assert row["pose_mm"] < 4 and row["pose_deg"] < 1.5 and row["pose_missing"] == 0
    assert row["onset_error_steps"] < 1 and row["onset_missed"] == 0 and row["onset_unknown"] == 0
    assert row["contact_to_motion_steps"] == pytest.approx(
        3.2, abs=0.7
    )  # touched at 6, two pixels away at 8 + 2 / 1.55
    assert row["object_melted"] < 0.05 and row["object_persists"] == 1 and row["scenery_px_0.96s"] < 0.5
    assert row["object_unseen"] == 0 and row["still_px_0.96s"] is None and row["still_px_0.96s_n"] == 0


def test_a_known_pose_error_is_recovered() -> None:
    """The imagined object ends 12 px right, 5 px up and 10 degrees further turned, growing over the chunk."""

    def wrong(k: float) -> tuple[float, float, float]:
        x, y, degrees = pushed(k)
        return x + 12 * k / STEPS, y - 5 * k / STEPS, degrees + 10 * k / STEPS

    row = scores(video({OBJECT: wrong, FINGER: finger}, TIMES))
    assert row["pose_mm"] == pytest.approx(np.hypot(12, 5) / FOCAL * DEPTH[OBJECT] * 1e3, abs=2.5)
    assert row["pose_deg"] == pytest.approx(10, abs=1.5)
    assert row["object_px_1.92s"] == pytest.approx(13.4, abs=1.2)  # 13 px, and the turn about the middle adds little
    assert row["object_px_0.48s"] == pytest.approx(13 / 4, abs=0.8)
    assert row["gripper_px_1.92s"] == pytest.approx(row["gripper_px_1.92s_floor"], abs=0.5)
    assert row["object_melted"] < 0.1 and row["object_persists"] == 1


def test_the_pose_is_taken_while_it_can_be_measured() -> None:
    """After 0.96 s the object is thrown out of the picture: its pose then is compared, and nothing counts as missing."""

    def thrown(k: float) -> tuple[float, float, float]:
        return 150.0 + ramp(k, 2, 1.5) + ramp(k, 16, 16), 120.0, 0.0

    def slower(k: float) -> tuple[float, float, float]:
        return 150.0 + ramp(k, 2, 1.0), 120.0, 0.0

    on = {OBJECT: thrown, FINGER: finger}
    row = score_imagination(video({OBJECT: slower, FINGER: finger}, TIMES), TIMES, execute(on), video(on, TIMES), TIMES)
    assert row["pose_seconds"] == pytest.approx(0.96) and row["pose_missing"] == row["pose_missing_floor"] == 0
    assert row["pose_mm"] == pytest.approx(14 * 0.5 / FOCAL * 900, abs=3) and row["pose_mm_floor"] < 3


def test_a_frozen_picture_misses_the_onset_but_melts_nothing() -> None:
    row = frozen_row()
    assert row["object_px_1.92s"] == pytest.approx(row["object_moved_px_1.92s"], abs=0.01)
    assert row["onset_missed"] == 1 and row["onset_missed_n"] == 1 and row["onset_error_steps"] is None
    assert row["object_melted"] == 0 and row["object_persists"] == 1
    assert row["pose_mm"] == pytest.approx(np.hypot(24 * 1.5, 24 * 0.4) / FOCAL * 900, rel=0.05)


def test_a_vanished_object_is_flagged() -> None:
    frames = truth()[1].copy()
    frames[4:] = video({FINGER: finger}, TIMES[4:])
    row = scores(frames)
    assert row["object_lost_1.92s"] > 0.7 and row["object_persists"] == 0 and row["object_melted"] > 0.5
    assert (
        row["pose_missing"] == 1 and row["pose_missing_floor"] == 0 and row["pose_mm"] is None and row["pose_mm_n"] == 0
    )
    assert row["object_lost_0.48s"] < 0.1 and row["gripper_lost_1.92s"] < 0.1


def drawn_tracks(shift: float, visible: int, moved: float) -> TimedTracks:
    """64 points that rest, and at 0.96 s are ``moved`` pixels further right and ``shift`` px off, only so many of them visible."""
    start = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), -1).reshape(-1, 2) + 100
    seen = np.ones((4, 64), bool)
    seen[3, visible:] = False
    points = np.stack([start, start, start, start + (moved, shift)])
    return TimedTracks(points_TN2=points, visible_TN=seen, times_T=np.array([0.0, 0.06, 0.12, 0.96]))


def track_row(shift: float, visible: int, *, moved: float = 30.0, judged: int = 64) -> dict:
    truth = drawn_tracks(0.0, 64, moved)
    points = BodyPoints(
        query_N2=truth.points_TN2[0], body_N=np.full(64, OBJECT), role_N=np.full(64, "object"), depth_N=np.ones(64),
        truth=truth,
    )  # fmt: skip
    floor, mask = drawn_tracks(0.0, judged, moved), np.ones(64, bool)
    return _track_scores("object", mask, 0.96, points, drawn_tracks(shift, visible, moved), floor, ImaginationScoring())


@pytest.mark.parametrize("moved", [3.0, 30.0])
def test_a_lost_point_costs_at_least_what_a_frozen_picture_would(moved: float) -> None:
    """All 64 points 4 px off against 63 of them lost and the last one exact."""
    shown, lost = track_row(4.0, 64, moved=moved), track_row(0.0, 1, moved=moved)
    assert shown["object_px_0.96s"] == pytest.approx(4) and shown["object_lost_0.96s"] == 0
    assert lost["object_px_0.96s"] == pytest.approx(63 / 64 * max(moved, 8.0)) and lost["object_px_0.96s_n"] == 64
    assert lost["object_lost_0.96s"] == pytest.approx(63 / 64)
    names = ("object_px_0.96s", "object_lost_0.96s")
    rows = [
        EpisodeOutcome(task="t", episode=str(k), model=m, status="success", scores={n: row[n] for n in names})
        for m, row in (("shown", shown), ("vanished", lost))
        for k in range(10)
    ]
    found = {d.score: d for d in compare(rows).score_differences}
    assert set(found) == set(names) and all(d.difference < 0 and d.p < 0.01 for d in found.values())


def test_too_few_judged_points_give_no_track_score() -> None:
    few, enough = track_row(0.0, 64, judged=7), track_row(0.0, 64, judged=8)
    for name in ("object_px_0.96s", "object_px_0.96s_floor", "object_moved_px_0.96s", "object_lost_0.96s"):
        assert few[name] is None and few[f"{name}_n"] == 0 and enough[name] is not None and enough[f"{name}_n"] == 8
    assert few["object_unjudged_0.96s"] == pytest.approx(57 / 64)


@pytest.mark.parametrize("real_shows_it", [True, False])
def test_an_object_that_vanishes_before_it_starts_has_missed_its_onset(real_shows_it: bool) -> None:
    truth, gone = drawn_tracks(0.0, 64, 30.0), drawn_tracks(0.0, 0, 30.0)
    thing = ObjectMotion(
        body=OBJECT, moves=True, depth=1.0, first_contact=1, truth=truth, imagined=gone,
        floor=truth if real_shows_it else gone,
    )  # fmt: skip
    limits = Limits(min_points=8, moving_px=2.0, rigid_px=3.0, followed_px=8.0, horizons=(0.96,))
    row = onset_scores([thing], 0.96, limits)
    assert row["onset_unknown"] == 1 and row["onset_unknown_floor"] == (not real_shows_it)
    for name in ("onset_missed", "contact_onset_missed"):
        assert row[name] == (1 if real_shows_it else None) and row[f"{name}_floor"] == (0 if real_shows_it else None)


def test_contact_onset_is_imagined_motion_against_the_true_touch() -> None:
    """Touched at step 6 and two pixels away 3.3 steps later; imagined 5 steps too early, on time, never, and without a touch."""
    times = np.arange(13) * 2 * DT
    executed, real = execute(TRUE, contact=6, steps=24), video(TRUE, times)

    def early(k: float) -> tuple[float, float, float]:
        return pushed(k + 5)

    row = score_imagination(video({OBJECT: early, FINGER: finger}, times), times, executed, real, times)
    lag = row["contact_to_motion_steps"]
    assert lag == pytest.approx(3.3, abs=0.3) and row["contact_onset_bias_steps_floor"] == pytest.approx(lag, abs=0.7)
    assert row["contact_onset_bias_steps"] == pytest.approx(lag - 5, abs=0.8)  # before the touch
    assert row["contact_onset_error_steps"] == pytest.approx(5 - lag, abs=0.8) and row["contact_onset_missed"] == 0
    frozen = score_imagination(np.repeat(real[:1], 13, 0), times, executed, real, times)
    assert frozen["contact_onset_error_steps"] is None and frozen["contact_onset_missed"] == 1
    for contact in (None, 0):  # nothing touched it, or something did already
        none = score_imagination(real, times, execute(TRUE, contact=contact, steps=24), real, times)
        assert none["contact_onset_error_steps_n"] == none["contact_onset_missed_n"] == 0
    later = score_imagination(real, times, execute(TRUE, contact=20, steps=24), real, times)
    assert later["contact_onset_error_steps_n"] == 0  # it moved long before it was touched


def test_a_melting_object_is_flagged() -> None:
    """The picture round the object is pulled apart in waves that grow to 9 px."""
    ys, xs = np.mgrid[:120, :160].astype(np.float32)
    frames = truth()[1].copy()
    for t, time in enumerate(TIMES):
        grow = np.float32(4.5 * t / (len(TIMES) - 1))
        wave_x, wave_y = grow * np.sin(ys / 2.6), grow * np.sin(xs / 2.6)
        x, y, _ = pushed(time / DT)
        near = np.exp(-(((xs - x / 2) / 22) ** 4) - ((ys - y / 2) / 22) ** 4).astype(np.float32)
        frames[t] = cv2.remap(frames[t], xs + wave_x * near, ys + wave_y * near, cv2.INTER_LINEAR)
    row = scores(frames)
    assert row["object_melted"] > 0.3 and row["object_persists"] == 0
    assert row["object_melted"] > 5 * row["object_melted_floor"]


@pytest.mark.parametrize("shift", [-4, 6])
def test_an_onset_shift_is_recovered(shift: int) -> None:
    def later(k: float) -> tuple[float, float, float]:
        return pushed(k - shift)

    times = np.arange(13) * 2 * DT
    executed = execute(TRUE, contact=6, steps=24)
    real = video(TRUE, times)
    row = score_imagination(video({OBJECT: later, FINGER: finger}, times), times, executed, real, times)
    assert row["onset_bias_steps"] == pytest.approx(shift, abs=1.0)
    assert row["onset_error_steps"] == pytest.approx(abs(shift), abs=1.0)
    assert row["onset_error_steps_floor"] < 1.0 and row["onset_missed"] == 0


def test_a_false_onset_and_an_object_under_way() -> None:
    still = {OBJECT: rests, FINGER: finger}
    row = score_imagination(video(TRUE, TIMES), TIMES, execute(still), video(still, TIMES), TIMES)
    assert row["onset_false"] == 1 and row["onset_false_floor"] == 0 and row["onset_missed"] is None
    assert row["still_px_1.92s"] == pytest.approx(37.3, rel=0.1) and row["object_px_1.92s"] is None
    assert row["pose_mm"] is None and row["pose_missing"] is None  # nothing moved: no pose to compare

    def carried(k: float) -> tuple[float, float, float]:
        return 150 + 1.2 * k, 120.0, 0.0

    on = {OBJECT: carried, FINGER: finger}
    few = TIMES[:3]
    row = score_imagination(video(on, few), few, execute(on), video(on, few), few)
    assert row["onset_unknown_n"] == row["onset_missed_n"] == 0  # it has no onset in this chunk


def test_other_rates_and_shorter_chunks() -> None:
    """24 frames a second against control steps of 0.06 s, and an imagination that is longer than what was executed."""
    executed = execute(TRUE, contact=6, steps=10)
    times = np.arange(20) / 24
    steps = np.arange(11) * DT
    row = score_imagination(video(TRUE, times), times, executed, video(TRUE, steps), steps)
    assert row["seconds"] == pytest.approx(0.6)
    assert "object_px_0.48s" in row and "object_px_0.96s" not in row
    assert row["gripper_px_0.48s"] < 1 and row["gripper_px_0.48s_floor"] < 1
    assert row["gripper_moved_px_0.48s"] == pytest.approx(9.6, abs=0.1)


def test_own_and_other_execution() -> None:
    def left(k: float) -> tuple[float, float, float]:
        return 150.0 - ramp(k, 8, 1.5), 120.0, 0.0

    def back(k: float) -> tuple[float, float, float]:
        return 60.0 - 0.6 * k, 50.0 + k, 0.0

    other = execute({OBJECT: left, FINGER: back})
    row = own_and_other(truth()[1], TIMES, truth()[0], other)
    assert row["arm_own_px"] < 2.5 and row["object_own_px"] < 2.5
    assert row["arm_other_px"] == pytest.approx(np.hypot(1.8 * STEPS, STEPS), abs=2)
    assert row["object_other_px"] == pytest.approx(np.hypot(24 * 3, 24 * 0.4), abs=3)
    same = own_and_other(truth()[1], TIMES, truth()[0], truth()[0])
    assert same["arm_own_px"] is None and same["arm_own_px_n"] == 0  # equal executions tell nothing


def test_rows_hold_plain_values_and_merge_exactly() -> None:
    rows = [perfect_row(), frozen_row()]
    for row in rows:
        assert all(v is None or (type(v) in (float, int) and math.isfinite(v)) for v in row.values())
    merged = merge_rows(rows)
    assert merged["chunks"] == 2 and merged["seconds"] == pytest.approx(3.84)
    for name in ("object_px_1.92s", "pose_mm", "onset_missed", "object_melted"):
        weights = [row[f"{name}_n"] for row in rows]
        assert merged[f"{name}_n"] == sum(weights)
        assert merged[name] == pytest.approx(np.average([row[name] for row in rows], weights=weights))
    assert (
        merged["onset_error_steps"] == rows[0]["onset_error_steps"]
    )  # the frozen one has none, and does not count as 0
    assert merged["still_px_1.92s"] is None


def test_what_does_not_fit_is_refused() -> None:
    executed, real = truth()
    for imagined, times, match in (
        (real[:, :, :100], TIMES, "shape of the camera"),
        (real.astype(np.float32), TIMES, "uint8"),
        (real, TIMES[:-1], "time a frame"),
        (real, TIMES + 0.1, "from 0"),
    ):
        with pytest.raises(UserError, match=match):
            score_imagination(imagined, times, executed, real, TIMES)


def test_similarity_survives_outliers_and_needs_two_points() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0, 40, (40, 2))
    angle, scale = math.radians(25), 1.1
    turn = scale * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    after = before @ turn + (7, -3) + generator.normal(0, 0.2, (40, 2))
    after[::5], after[1::5] = generator.uniform(0, 80, (8, 2)), before[1::5]  # 8 astray, 8 left behind
    fit = fit_similarity(before, after, np.ones(40, bool), tolerance_px=2)
    assert fit.degrees == pytest.approx(25, abs=0.5) and abs(fit.turn) == pytest.approx(scale, abs=0.01)
    assert fit.inliers_N.sum() >= 24 and not fit.inliers_N[::5].any()
    assert np.abs(fit.apply(before[2:5]) - after[2:5]).max() < 1
    one = np.zeros(40, bool)
    one[3] = True
    assert fit_similarity(before, after, one, tolerance_px=2) is None
    assert fit_similarity(before[:1].repeat(5, 0), after[:5], np.ones(5, bool), tolerance_px=2) is None


def test_true_tracks_of_no_points() -> None:
    tracks, depth = true_tracks(truth()[0], np.zeros((0, 2)))
    assert tracks.points_TN2.shape == (STEPS + 1, 0, 2) and depth.shape == (0,)
