"""How much of what was imagined really happened: tracks, final poses, onset of motion and persistence, against the simulator.

Scores stand in rows with what they were averaged over (``imagination_rows``). ``..._floor`` is the same score of the video that really was rendered, through the
same tracker at the same size and rate: what the measuring itself costs. Pixels are those of the executed chunk's camera (240x320).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.types import DT
from physisforcing.worldmodel.teachers.protocols import PointTracker

from .imagination_objects import Limits, ObjectMotion, onset_scores, persistence_scores, pose_scores
from .imagination_rows import Row, score
from .imagination_tracks import (
    SAME_TIME,
    BodyPoints,
    TimedTracks,
    check_video,
    judged,
    resize_frames,
    same_rate,
    sample_points,
    track_video,
    true_tracks,
)

#: Part of what identifies an episode's result: scores of another meaning are never mixed with these.
SCORES_VERSION = 2


@dataclass(slots=True, kw_only=True)
class ImaginationScoring:
    """``points_per_body``: points followed on each body. ``min_points``: with fewer that can be judged, an object or a group of points
    counts as not measured.
    ``horizons``: seconds at which tracks are compared. ``moving_px``: a body, or an imagined object, has moved when the median of
    its points has left its place by more; noise of the tracker at half size stays below. ``rigid_px``: how far a point may be off
    the motion that most points of its body agree on. ``followed_px``: a point is judged while the tracker has it within this distance
    of the truth in the real video; an imagination that is true to reality is followed as well as that."""

    points_per_body: int = 64
    min_points: int = 8
    horizons: tuple[float, ...] = (0.24, 0.48, 0.96, 1.92)
    moving_px: float = 2.0
    rigid_px: float = 3.0
    followed_px: float = 8.0


@dataclass(slots=True, kw_only=True)
class ScoredChunk:
    """``row``: the scores; ``points`` and their tracks in the imagined and in the real video, to draw them (``imagination_media``)."""

    row: Row
    points: BodyPoints
    imagined: TimedTracks
    floor: TimedTracks


def score_imagination(
    imagined_THWC: NDArray[np.uint8],
    times_T: Sequence[float] | NDArray[np.floating],
    executed: ExecutedChunk,
    real_THWC: NDArray[np.uint8],
    real_times_T: Sequence[float] | NDArray[np.floating],
    config: ImaginationScoring | None = None,
    *,
    tracker: PointTracker | None = None,
) -> Row:
    """The row of ``score_chunk``."""
    return score_chunk(imagined_THWC, times_T, executed, real_THWC, real_times_T, config, tracker=tracker).row


def score_chunk(
    imagined_THWC: NDArray[np.uint8],
    times_T: Sequence[float] | NDArray[np.floating],
    executed: ExecutedChunk,
    real_THWC: NDArray[np.uint8],
    real_times_T: Sequence[float] | NDArray[np.floating],
    config: ImaginationScoring | None = None,
    *,
    tracker: PointTracker | None = None,
) -> ScoredChunk:
    """Score one imagined video against the execution of the same actions.

    ``imagined_THWC``: uint8, frame 0 the context frame, at ``times_T`` seconds from it. ``real_THWC``: what was rendered while the
    actions were executed, at ``real_times_T``, of any size with the camera's shape. Only what was executed is judged: a longer
    imagination is cut. ``tracker``: default the classical one. Raises ``UserError`` for videos and times that do not fit.
    """
    config, tracker = config or ImaginationScoring(), tracker or _classical()
    points = sample_points(executed, points_per_body=config.points_per_body)
    imagined, floor = follow_both(imagined_THWC, times_T, executed, real_THWC, real_times_T, points, tracker)
    end = min(imagined.end, floor.end, points.truth.end)
    moving = _moving_bodies(points, end, config)
    row: Row = {"seconds": end, "start_step": executed.start_step}
    for name, mask_N in _groups(points, moving).items():
        for horizon in config.horizons:
            if horizon <= end + SAME_TIME:
                row |= _track_scores(name, mask_N, horizon, points, imagined, floor, config)
    objects = [
        _object(points, body, body in moving, executed, imagined, floor, end)
        for body in points.bodies("object")
        if (points.body_N == body).sum() >= config.min_points
    ]
    seen, present = len(objects), len(executed.bodies("object"))
    row |= score("object_unseen", (present - seen) / present if present else None, present)
    limits = Limits(
        min_points=config.min_points,
        moving_px=config.moving_px,
        rigid_px=config.rigid_px,
        followed_px=config.followed_px,
        horizons=config.horizons,
    )
    row |= pose_scores(objects, end, executed, limits)
    row |= onset_scores(objects, end, limits) | persistence_scores(objects, end, limits)
    return ScoredChunk(row=row, points=points, imagined=imagined, floor=floor)


def follow_both(
    imagined_THWC: NDArray[np.uint8],
    times_T: Sequence[float] | NDArray[np.floating],
    executed: ExecutedChunk,
    real_THWC: NDArray[np.uint8],
    real_times_T: Sequence[float] | NDArray[np.floating],
    points: BodyPoints,
    tracker: PointTracker,
) -> tuple[TimedTracks, TimedTracks]:
    """Tracks of the imagined and of the real video, both at the imagined size (at most the camera's) and rate, up to what was executed."""
    size = (int(executed.depth_HW.shape[0]), int(executed.depth_HW.shape[1]))
    times, real_times = (check_video(*v, size) for v in ((imagined_THWC, times_T), (real_THWC, real_times_T)))
    small = size if imagined_THWC.shape[1] > size[0] else imagined_THWC.shape[1:3]
    last = executed.steps * DT
    used = times <= last + SAME_TIME
    if not used.all() and used.any() and times[used][-1] < last - SAME_TIME:
        used[int(used.sum())] = True  # one frame beyond, between which and the last the end of the chunk lies
    imagined = resize_frames(imagined_THWC[used], (int(small[0]), int(small[1])))
    real, real_times = same_rate(real_THWC, real_times, times[used])
    real = resize_frames(real, (int(small[0]), int(small[1])))
    return (
        track_video(imagined, times[used], points.query_N2, camera_size=size, tracker=tracker),
        track_video(real, real_times, points.query_N2, camera_size=size, tracker=tracker),
    )


def _moving_bodies(points: BodyPoints, end: float, config: ImaginationScoring) -> set[int]:
    """Bodies that truly moved: at some step the median of their points was off by more than ``moving_px``."""
    within = points.truth.times_T <= end + SAME_TIME
    off_TN = np.linalg.norm(points.truth.points_TN2[within] - points.query_N2, axis=-1)
    return {
        int(body)
        for body in np.unique(points.body_N[points.body_N >= 0])
        if np.median(off_TN[:, points.body_N == body], axis=1).max() > config.moving_px
    }


def _groups(points: BodyPoints, moving: set[int]) -> dict[str, NDArray[np.bool_]]:
    """Names of scores -> their points. ``still``: objects that truly stay where they are; ``arm``: all robot links that move."""
    moves_N = np.isin(points.body_N, sorted(moving))
    is_object = points.role_N == "object"
    return {
        "object": is_object & moves_N,
        "gripper": (points.role_N == "gripper") & moves_N,
        "arm": np.isin(points.role_N, ("gripper", "robot")) & moves_N,
        "still": is_object & ~moves_N,
        "scenery": points.role_N == "scenery",
    }


def _track_scores(
    name: str,
    mask_N: NDArray[np.bool_],
    horizon: float,
    points: BodyPoints,
    imagined: TimedTracks,
    floor: TimedTracks,
    config: ImaginationScoring,
) -> Row:
    """Errors over the points that can be judged; ``..._unjudged``: share of those in sight that cannot, ``..._lost``: share of the
    judged ones that the imagination does not show any more, ``..._moved_px``: how far they truly went (a frozen picture's error).

    A lost point costs what a frozen picture would make of it, and at least ``followed_px``: an imagination gains nothing by making a
    body vanish. With fewer than ``min_points`` that can be judged nothing but ``..._unjudged`` is said.
    """
    true_N2, judged_N = judged(points.truth, floor, horizon, config.followed_px)
    judged_N, in_sight_N = judged_N & mask_N, points.truth.at(horizon)[1] & mask_N
    imagined_N2, kept_N = imagined.at(horizon)
    moved_N, shown_N, floor_N = (
        np.linalg.norm(found_N2 - true_N2, axis=1) for found_N2 in (points.query_N2, imagined_N2, floor.at(horizon)[0])
    )
    error_N = np.where(kept_N, shown_N, np.maximum(moved_N, config.followed_px))
    at, in_sight, seen = f"{horizon:g}s", int(in_sight_N.sum()), int(judged_N.sum())
    count = seen if seen >= config.min_points else 0

    def mean(value_N: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
        return float(value_N[judged_N].mean()) if count else None

    row = score(f"{name}_px_{at}", mean(error_N), count)
    row |= score(f"{name}_px_{at}_floor", mean(floor_N), count)
    row |= score(f"{name}_moved_px_{at}", mean(moved_N), count)
    row |= score(f"{name}_lost_{at}", mean(~kept_N), count)
    return row | score(f"{name}_unjudged_{at}", 1 - seen / in_sight if in_sight else None, in_sight)


def _object(
    points: BodyPoints,
    body: int,
    moves: bool,
    executed: ExecutedChunk,
    imagined: TimedTracks,
    floor: TimedTracks,
    end: float,
) -> ObjectMotion:
    mask_N = points.body_N == body
    hands = executed.bodies("gripper") + executed.bodies("robot")
    return ObjectMotion(
        body=body,
        moves=moves,
        depth=float(points.depth_N[mask_N].mean()),
        first_contact=executed.first_contact(body, hands),
        truth=_only(points.truth, mask_N),
        imagined=_only(imagined, mask_N),
        floor=_only(floor, mask_N),
    )


def _only(tracks: TimedTracks, mask_N: NDArray[np.bool_]) -> TimedTracks:
    return TimedTracks(
        points_TN2=tracks.points_TN2[:, mask_N], visible_TN=tracks.visible_TN[:, mask_N], times_T=tracks.times_T
    )


def own_and_other(
    imagined_THWC: NDArray[np.uint8],
    times_T: Sequence[float] | NDArray[np.floating],
    own: ExecutedChunk,
    other: ExecutedChunk,
    config: ImaginationScoring | None = None,
    *,
    tracker: PointTracker | None = None,
) -> Row:
    """Is an imagination nearer to the execution of its own actions than to that of other ones from the same state?

    For ``arm`` and ``object`` the error of its tracks at the end against both executions (``arm_own_px``, ``arm_other_px``), over the
    points that the two executions take to places more than ``moving_px`` apart. Both chunks start in the same state.
    """
    config, tracker = config or ImaginationScoring(), tracker or _classical()
    size = (int(own.depth_HW.shape[0]), int(own.depth_HW.shape[1]))
    points = sample_points(own, points_per_body=config.points_per_body)
    rival, _ = true_tracks(other, points.query_N2)
    small = size if imagined_THWC.shape[1] > size[0] else (int(imagined_THWC.shape[1]), int(imagined_THWC.shape[2]))
    frames = resize_frames(imagined_THWC, small)
    tracks = track_video(frames, times_T, points.query_N2, camera_size=size, tracker=tracker)
    end = min(tracks.end, points.truth.end, rival.end)
    found_N2, kept_N = tracks.at(end)
    (own_N2, own_seen_N), (other_N2, other_seen_N) = points.truth.at(end), rival.at(end)
    apart_N = np.linalg.norm(own_N2 - other_N2, axis=1) > config.moving_px
    row: Row = {"seconds": end}
    for name, roles in (("arm", ("gripper", "robot")), ("object", ("object",))):
        mask_N = np.isin(points.role_N, roles) & apart_N & kept_N & own_seen_N & other_seen_N
        enough = int(mask_N.sum()) if mask_N.sum() >= config.min_points else 0
        for label, true_N2 in (("own", own_N2), ("other", other_N2)):
            error = float(np.linalg.norm(found_N2 - true_N2, axis=1)[mask_N].mean()) if enough else None
            row |= score(f"{name}_{label}_px", error, enough)
    return row


def _classical() -> PointTracker:
    from physisforcing.worldmodel.teachers.classical import ClassicalTracker

    return ClassicalTracker()
