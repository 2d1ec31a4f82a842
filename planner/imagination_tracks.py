"""Points on every body of an executed chunk: where they truly went, and where a video shows them going."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.types import DT
from physisforcing.worldmodel.teachers.protocols import PointTracker

#: Times closer than this, in seconds, are the same.
SAME_TIME = 1e-6


@dataclass(slots=True, kw_only=True)
class TimedTracks:
    """``points_TN2``: pixels of the executed chunk's camera, ``visible_TN``, at ``times_T`` seconds after the moment of planning."""

    points_TN2: NDArray[np.float64]
    visible_TN: NDArray[np.bool_]
    times_T: NDArray[np.float64]

    @property
    def end(self) -> float:
        return float(self.times_T[-1])

    def at(self, seconds: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Points [N,2] and visibility [N] at a time within the tracks, linear between frames; visible means in both of them."""
        assert self.times_T[0] - SAME_TIME <= seconds <= self.end + SAME_TIME, (seconds, self.end)
        after = int(np.searchsorted(self.times_T, seconds - SAME_TIME).clip(0, len(self.times_T) - 1))
        if after == 0 or abs(self.times_T[after] - seconds) <= SAME_TIME:
            return self.points_TN2[after], self.visible_TN[after]
        before = after - 1
        share = (seconds - self.times_T[before]) / (self.times_T[after] - self.times_T[before])
        points_N2 = (1 - share) * self.points_TN2[before] + share * self.points_TN2[after]
        return points_N2, self.visible_TN[before] & self.visible_TN[after]


@dataclass(slots=True, kw_only=True)
class BodyPoints:
    """N points on the bodies seen in frame 0. ``body_N``: body ids, ``role_N``: one of ``core.executed.ROLES`` each; scenery counts as
    one body, -1. ``depth_N``: metres at frame 0. ``truth``: exact tracks at every control step (``visible``: inside the picture and
    not hidden at frame 0; what comes to cover a point later is not known here)."""

    query_N2: NDArray[np.float64]
    body_N: NDArray[np.int64]
    role_N: NDArray[np.str_]
    depth_N: NDArray[np.float64]
    truth: TimedTracks

    def bodies(self, *roles: str) -> list[int]:
        return sorted({int(body) for body, role in zip(self.body_N, self.role_N, strict=True) if role in roles})


def sample_points(executed: ExecutedChunk, *, points_per_body: int) -> BodyPoints:
    """Up to ``points_per_body`` pixels of every robot link and object in frame 0, and as many of the scenery, with their true tracks.

    Pixels at the rim of a body are left out where enough others remain: a coarser picture mixes them with what is behind.
    """
    queries, bodies, roles = [], [], []
    for mask_HW, body, role in _masks(executed):
        rows, columns = np.nonzero(mask_HW)
        if len(rows):
            chosen = np.random.default_rng(0).permutation(len(rows))[:points_per_body]
            queries.append(np.stack([columns[chosen], rows[chosen]], -1).astype(np.float64))
            bodies += [body] * len(chosen)
            roles += [role] * len(chosen)
    query_N2 = np.concatenate(queries) if queries else np.zeros((0, 2))
    truth, depth_N = true_tracks(executed, query_N2)
    return BodyPoints(
        query_N2=query_N2, body_N=np.array(bodies, np.int64), role_N=np.array(roles, str), depth_N=depth_N, truth=truth
    )


def _masks(executed: ExecutedChunk) -> list[tuple[NDArray[np.bool_], int, str]]:
    known_HW = executed.depth_HW > 0
    found, moving_HW = [], np.zeros(known_HW.shape, bool)
    for body, role in zip(executed.body_ids_K, executed.roles_K, strict=True):
        if role != "scenery":
            own_HW = (executed.body_HW == body) & known_HW
            moving_HW |= own_HW
            found.append((_without_rim(own_HW), int(body), role))
    return [*found, (_without_rim(known_HW & ~moving_HW), -1, "scenery")]


def _without_rim(mask_HW: NDArray[np.bool_], *, width: int = 2, enough: int = 32) -> NDArray[np.bool_]:
    """The mask without its outermost pixels, or with as much of its rim as it needs to keep ``enough`` pixels."""
    for less in range(width, 0, -1):
        padded = np.pad(mask_HW, less)
        inner = np.ones_like(mask_HW)
        for dy, dx in ((less, 0), (-less, 0), (0, less), (0, -less)):
            rows, columns = (
                slice(less + dy, less + dy + mask_HW.shape[0]),
                slice(less + dx, less + dx + mask_HW.shape[1]),
            )
            inner &= padded[rows, columns]
        inner &= mask_HW
        if inner.sum() >= enough:
            return inner
    return mask_HW


def true_tracks(executed: ExecutedChunk, query_N2: NDArray[np.float64]) -> tuple[TimedTracks, NDArray[np.float64]]:
    """Exact tracks of pixels of frame 0 at every control step, and their depth at frame 0 in metres."""
    from physisforcing.worldmodel.teachers.ground_truth import point_tracks

    times_T = np.arange(executed.steps + 1, dtype=np.float64) * DT
    if not len(query_N2):
        empty = np.zeros((len(times_T), 0, 2)), np.zeros((len(times_T), 0), bool)
        return TimedTracks(points_TN2=empty[0], visible_TN=empty[1], times_T=times_T), np.zeros(0)
    tracks = point_tracks(executed.ground_truth(), range(executed.steps + 1), queries_N2=query_N2)
    exact = TimedTracks(points_TN2=tracks.points_TN2.astype(np.float64), visible_TN=tracks.visible_TN, times_T=times_T)
    return exact, tracks.depth_N.astype(np.float64)


def track_video(
    frames_THWC: NDArray[np.uint8],
    times_T: Sequence[float] | NDArray[Any],
    query_N2: NDArray[np.float64],
    *,
    camera_size: tuple[int, int],
    tracker: PointTracker,
) -> TimedTracks:
    """Follow pixels of frame 0 (of a camera of ``camera_size``) through a video of any size but the same shape.

    Raises ``UserError`` for a video that is not uint8 [T,H,W,3] with rising times from 0, or of another shape than the camera's picture.
    """
    import torch

    times = check_video(frames_THWC, times_T, camera_size)
    if not len(query_N2):
        shape = (len(times), 0)
        return TimedTracks(points_TN2=np.zeros((*shape, 2)), visible_TN=np.zeros(shape, bool), times_T=times)
    scale = np.array([frames_THWC.shape[2] / camera_size[1], frames_THWC.shape[1] / camera_size[0]])
    query = torch.from_numpy(((query_N2 + 0.5) * scale - 0.5).astype(np.float32))
    tracks = tracker.track(torch.from_numpy(np.ascontiguousarray(frames_THWC))[None], query[None])
    points_TN2 = (tracks.points_BTN2[0].double().numpy() + 0.5) / scale - 0.5
    return TimedTracks(points_TN2=points_TN2, visible_TN=tracks.visible_BTN[0].numpy(), times_T=times)


def same_rate(
    frames_THWC: NDArray[np.uint8], times_T: NDArray[np.float64], wanted_T: NDArray[np.float64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Of these frames the ones nearest to ``wanted_T``, each once, so that a tracker sees both videos at one rate."""
    picked = np.unique(np.abs(times_T[None] - wanted_T[:, None]).argmin(1))
    return frames_THWC[picked], times_T[picked]


def judged(
    truth: TimedTracks, floor: TimedTracks, seconds: float, followed_px: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """True places [N,2] and which points can be judged [N]: in sight, and followed in the real video to within ``followed_px``.

    Where the tracker fails on what was really rendered, it says nothing about an imagination either.
    """
    true_N2, in_sight_N = truth.at(seconds)
    floor_N2, found_N = floor.at(seconds)
    return true_N2, in_sight_N & found_N & (np.linalg.norm(floor_N2 - true_N2, axis=-1) <= followed_px)


def resize_frames(frames_THWC: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """To ``size`` (H, W): averaged by area when it shrinks."""
    import cv2

    if frames_THWC.shape[1:3] == size:
        return frames_THWC
    way = cv2.INTER_AREA if size[0] <= frames_THWC.shape[1] else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (size[1], size[0]), interpolation=way) for frame in frames_THWC])


def check_video(
    frames_THWC: NDArray[np.uint8], times_T: Sequence[float] | NDArray[Any], camera_size: tuple[int, int]
) -> NDArray[np.float64]:
    """The times as an array. ``UserError`` unless these are pictures of that camera, of any size, at rising times from 0."""
    times = np.array([float(t) for t in times_T])
    shape = frames_THWC.shape
    if frames_THWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] != len(times) or not len(times):
        got = f"{frames_THWC.dtype}{list(shape)} with {len(times)} times"
        raise UserError("video", got=got, wanted="uint8 [T,H,W,3] and a time a frame", fix="give Rollout.times_T")
    if abs(times[0]) > SAME_TIME or (np.diff(times) <= 0).any():
        fix = "the first frame is the context frame, at 0 s"
        raise UserError("times", got=times[:4].tolist(), wanted="rising seconds from 0", fix=fix)
    if abs(shape[2] / shape[1] - camera_size[1] / camera_size[0]) > 0.02:
        got, wanted = f"{shape[1]}x{shape[2]}", f"the shape of the camera's {camera_size[0]}x{camera_size[1]}"
        raise UserError("video", got=got, wanted=wanted, fix="give the camera's part of the canvas (ViewLayout.split)")
    return times
