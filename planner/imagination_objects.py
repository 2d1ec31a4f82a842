"""What an imagination does to objects: where they end, when they start to move, and whether they stay the things they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.types import DT

from .imagination_fit import Similarity, fit_similarity
from .imagination_rows import Row, score
from .imagination_tracks import SAME_TIME, TimedTracks, judged

#: An object that has truly moved by this much (pixels) within the first two control steps was under way already: it has no onset.
UNDER_WAY_PX, UNDER_WAY_STEPS = 0.5, 2
#: An object persists while at least this share of its points is where a rigid thing would have them.
PERSISTS = 0.5


@dataclass(slots=True, kw_only=True)
class Limits:
    """See ``ImaginationScoring``."""

    min_points: int
    moving_px: float
    rigid_px: float
    followed_px: float
    horizons: tuple[float, ...]


@dataclass(slots=True, kw_only=True)
class ObjectMotion:
    """Tracks of the points on one object. ``moves``: whether it truly moved; ``depth``: metres from the camera at frame 0;
    ``first_contact``: control step at which the robot first touched it, or None."""

    body: int
    moves: bool
    depth: float
    first_contact: int | None
    truth: TimedTracks
    imagined: TimedTracks
    floor: TimedTracks

    def seen(self, kind: str) -> TimedTracks:
        return self.imagined if kind == "imagined" else self.floor


def pose_scores(objects: Sequence[ObjectMotion], end: float, executed: ExecutedChunk, limits: Limits) -> Row:
    """Final pose of the objects that truly move: ``pose_mm`` across the line of sight and ``pose_deg`` in the picture.

    A similarity is fitted to the object's points that can be judged; distance along the line of sight and turns out of the picture
    are not. Final is the end of the chunk, or the latest horizon at which the real video gives a pose (``pose_seconds``: when that
    is). ``pose_missing``: share of these objects without one, because the imagination has fewer than ``min_points`` or than half of
    the points on one motion, or because of ``pose_missing_floor``: the real video gives none either.
    """
    moving = [o for o in objects if o.moves]
    times = [end, *(h for h in sorted(limits.horizons, reverse=True) if h < end - SAME_TIME)]
    real, imagined, when = [], [], []
    for thing in moving:
        time, floor = _pose_time(thing, times, executed, limits)
        error = None if floor is None else _pose_error(thing, thing.imagined, time, executed, limits)
        real += [floor] if floor is not None else []
        imagined += [error] if error is not None else []
        when += [time] if error is not None else []
    row = score("pose_seconds", _mean(when), len(when))
    for found, suffix in ((imagined, ""), (real, "_floor")):
        row |= score(f"pose_mm{suffix}", _mean([mm for mm, _ in found]), len(found))
        row |= score(f"pose_deg{suffix}", _mean([degrees for _, degrees in found]), len(found))
        row |= score(f"pose_missing{suffix}", 1 - len(found) / len(moving) if moving else None, len(moving))
    return row


def _pose_time(
    thing: ObjectMotion, times: Sequence[float], executed: ExecutedChunk, limits: Limits
) -> tuple[float, tuple[float, float] | None]:
    """The first of these times at which the object has moved and the real video gives its pose, and the error of that."""
    for time in times:
        true_N2, judged_N = judged(thing.truth, thing.floor, time, limits.followed_px)
        off = float(np.median(np.linalg.norm(true_N2 - thing.truth.points_TN2[0], axis=-1)))
        if off > limits.moving_px and judged_N.sum() >= PERSISTS * thing.truth.at(time)[1].sum():
            floor = _pose_error(thing, thing.floor, time, executed, limits)
            if floor is not None:
                return time, floor
    return times[0], None


def _pose_error(
    thing: ObjectMotion, seen: TimedTracks, time: float, executed: ExecutedChunk, limits: Limits
) -> tuple[float, float] | None:
    """(mm, degrees) between where an object's points are seen and where they truly are, or None."""
    true_N2, judged_N = judged(thing.truth, thing.floor, time, limits.followed_px)
    found_N2, seen_N = seen.at(time)
    known_N = judged_N & seen_N
    start_N2 = thing.truth.points_TN2[0]
    fits = [fit_similarity(source, found_N2, known_N, tolerance_px=limits.rigid_px) for source in (true_N2, start_N2)]
    sizes = [int(fit.inliers_N.sum()) if fit is not None else 0 for fit in fits]
    if max(sizes) < max(limits.min_points, PERSISTS * int(judged_N.sum())):
        return None
    direct = sizes[0] >= sizes[1]
    fit = fits[0] if direct else fits[1]
    assert fit is not None
    centre_2 = fit.apply((true_N2 if direct else start_N2).mean(0))
    degrees = fit.degrees
    if not direct:
        # The picture does not follow the true motion (a turn out of the picture): both are measured from the start instead.
        true_fit = fit_similarity(start_N2, true_N2, np.ones(len(true_N2), bool), tolerance_px=limits.rigid_px)
        degrees -= true_fit.degrees if true_fit is not None else 0.0
    focal_2 = np.diag(executed.intrinsics_33)[:2]
    depth = thing.depth + _depth_change(thing.body, time, executed)
    millimetres = 1e3 * float(np.linalg.norm((centre_2 - true_N2.mean(0)) / focal_2)) * depth
    return millimetres, abs((degrees + 180.0) % 360.0 - 180.0)


def _depth_change(body: int, time: float, executed: ExecutedChunk) -> float:
    """How far a body's origin went along the optical axis, metres."""
    place = int(np.flatnonzero(executed.body_ids_K == body)[0])
    row = min(round(time / DT), executed.steps)
    moved_3 = executed.poses_TK7[row, place, :3].astype(np.float64) - executed.poses_TK7[0, place, :3]
    return float(executed.world_to_camera_44[2, :3] @ moved_3)


def onset_scores(objects: Sequence[ObjectMotion], end: float, limits: Limits) -> Row:
    """When objects start to move, in control steps, for those at rest when the chunk starts.

    An object has started when the median of its points is off by more than ``moving_px``, in this frame and the next; the moment is
    interpolated between frames, the truth by the same rule at every control step. ``onset_error_steps``: mean distance,
    ``onset_bias_steps``: signed, late is positive. ``onset_missed``: share of truly moving objects that stay still, or that the
    imagination loses before they start where the real video shows their start; ``onset_false``: of still objects that start;
    ``onset_unknown``: lost before anything could be said. ``contact_to_motion_steps``: how long after the robot's first touch the
    object truly moves. See ``contact_scores`` for the rest.
    """
    rested = [o for o in objects if not _under_way(o.truth)]
    true_starts = {o.body: _start(o.truth, end, 1, limits.moving_px, all_visible=True)[0] for o in rested}
    starts = {
        kind: {o.body: _start(o.seen(kind), end, limits.min_points, limits.moving_px) for o in rested}
        for kind in ("imagined", "floor")
    }
    row: Row = {}
    for kind, suffix in (("imagined", ""), ("floor", "_floor")):
        errors, missed, false, unknown = [], [], [], []
        for thing in rested:
            started, known = starts[kind][thing.body]
            truly = true_starts[thing.body]
            unknown.append(started is None and not known)
            if started is not None and truly is not None:
                errors.append((started - truly) / DT)
            if truly is not None and (not unknown[-1] or _vanished(kind, starts["floor"][thing.body])):
                missed.append(started is None)
            if truly is None and not unknown[-1]:
                false.append(started is not None)
        row |= score(f"onset_error_steps{suffix}", _mean([abs(e) for e in errors]), len(errors))
        row |= score(f"onset_bias_steps{suffix}", _mean(errors), len(errors))
        for name, found in (("missed", missed), ("false", false), ("unknown", unknown)):
            row |= score(f"onset_{name}{suffix}", _mean(found), len(found))
    # Row 0 holds the contacts of the step before the chunk.
    touched = {o.body: o.first_contact for o in rested if o.first_contact}
    return row | contact_scores(touched, true_starts, starts)


def contact_scores(
    touched: Mapping[int, int],
    true_starts: Mapping[int, float | None],
    starts: Mapping[str, Mapping[int, tuple[float | None, bool]]],
) -> Row:
    """When imagined objects start to move against when the robot truly first touches them, in control steps.

    ``touched``: object -> row of its first contact (without those touched before). An imagination's own touches cannot be seen in its
    pictures, only what they move; so a touch that truly moves nothing is not judged, nor is what moves before it is touched. Even a
    perfect imagination has an error, the time from the touch to visible motion (``contact_to_motion_steps``, from the exact tracks),
    which ``..._floor``, the real video's error, holds as well. ``contact_onset_error_steps``: mean distance,
    ``contact_onset_bias_steps``: signed, negative where an object moves before it is touched. ``contact_onset_missed``: share of
    these objects that the imagination does not move at all, or loses.
    """
    lags = {
        body: start / DT - step
        for body, step in touched.items()
        if (start := true_starts[body]) is not None and start / DT > step - 1
    }
    row = score("contact_to_motion_steps", _mean(list(lags.values())), len(lags))
    for kind, suffix in (("imagined", ""), ("floor", "_floor")):
        errors, missed = [], []
        for body in lags:
            started, known = starts[kind][body]
            if started is not None:
                errors.append(started / DT - touched[body])
            if started is not None or known or _vanished(kind, starts["floor"][body]):
                missed.append(started is None)
        row |= score(f"contact_onset_error_steps{suffix}", _mean([abs(e) for e in errors]), len(errors))
        row |= score(f"contact_onset_bias_steps{suffix}", _mean(errors), len(errors))
        row |= score(f"contact_onset_missed{suffix}", _mean(missed), len(missed))
    return row


def _vanished(kind: str, real: tuple[float | None, bool]) -> bool:
    """Whether an object that the imagination has lost is its own doing: the real video shows it start."""
    return kind == "imagined" and real[0] is not None


def _under_way(truth: TimedTracks) -> bool:
    row = min(UNDER_WAY_STEPS, len(truth.times_T) - 1)
    return bool(np.median(np.linalg.norm(truth.points_TN2[row] - truth.points_TN2[0], axis=-1)) > UNDER_WAY_PX)


def _start(
    tracks: TimedTracks, end: float, min_points: int, moving_px: float, *, all_visible: bool = False
) -> tuple[float | None, bool]:
    """Seconds at which the points start to move, or None; and whether the object was still in sight at the end."""
    times, off = [], []
    known = True
    for time, points_N2, visible_N in zip(tracks.times_T, tracks.points_TN2, tracks.visible_TN, strict=True):
        if time > end + SAME_TIME:
            break
        seen_N = visible_N | all_visible
        known = bool(seen_N.sum() >= min_points)
        if known:
            times.append(float(time))
            off.append(float(np.median(np.linalg.norm(points_N2 - tracks.points_TN2[0], axis=-1)[seen_N])))
    for i in range(1, len(off)):
        if off[i] > moving_px and (i + 1 == len(off) or off[i + 1] > moving_px):
            share = (moving_px - off[i - 1]) / (off[i] - off[i - 1]) if off[i - 1] < moving_px else 0.0
            return times[i - 1] + share * (times[i] - times[i - 1]), known
    return None, known


def persistence_scores(objects: Sequence[ObjectMotion], end: float, limits: Limits) -> Row:
    """``object_melted``: share of (point, frame) pairs in which a point of an object is lost or off the rigid motion of the others.

    Counted are pairs that can be judged; so what an arm really covers is no melting. ``object_unjudged``: the share of the pairs in
    sight that cannot, ``object_melted_floor``: the share of the judged ones that is off in the real video. ``object_persists``: share
    of objects of which at least half of these points are left at the end.
    """
    melted, floor, expected, in_sight = 0, 0, 0, 0
    persists: list[bool] = []
    for thing in objects:
        times = [float(t) for t in thing.imagined.times_T if SAME_TIME < t < end - SAME_TIME]
        for time in (*times, end):
            _, judged_N = judged(thing.truth, thing.floor, time, limits.followed_px)
            kept_N = judged_N & _rigid(thing, thing.imagined, time, limits.rigid_px)
            floor += int((judged_N & ~_rigid(thing, thing.floor, time, limits.rigid_px)).sum())
            in_sight += int(thing.truth.at(time)[1].sum())
            expected, melted = expected + int(judged_N.sum()), melted + int((judged_N & ~kept_N).sum())
        if judged_N.sum() >= limits.min_points:
            persists.append(bool(kept_N.sum() >= PERSISTS * judged_N.sum()))
    row = score("object_melted", melted / expected if expected else None, expected)
    row |= score("object_melted_floor", floor / expected if expected else None, expected)
    row |= score("object_unjudged", 1 - expected / in_sight if in_sight else None, in_sight)
    return row | score("object_persists", _mean(persists), len(persists))


def _rigid(thing: ObjectMotion, seen: TimedTracks, time: float, rigid_px: float) -> NDArray[np.bool_]:
    """Points that are seen and follow one motion, of the first picture's points or of the true ones (which may turn out of it)."""
    found_N2, known_N = seen.at(time)
    true_N2, _ = thing.truth.at(time)
    best: Similarity | None = None
    for source in (true_N2, thing.truth.points_TN2[0]):
        fit = fit_similarity(source, found_N2, known_N, tolerance_px=rigid_px)
        if fit is not None and (best is None or fit.inliers_N.sum() > best.inliers_N.sum()):
            best = fit
    return best.inliers_N if best is not None else np.zeros(len(known_N), bool)


def _mean(values: Sequence[float] | Sequence[bool]) -> float | None:
    return float(np.mean(values)) if len(values) else None
