"""Tracks of a real episode, with depth and body ids stored for every frame: points stay on their body and keep their colour."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from physisforcing.core.ground_truth import GroundTruth
from physisforcing.core.types import PointTracks
from physisforcing.envs.recording import EpisodeRecorder, record_expert
from physisforcing.worldmodel.teachers.ground_truth import point_tracks, query_grid

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def episode() -> tuple[GroundTruth, np.ndarray]:
    import physisforcing.envs.robotwin  # noqa: F401

    env = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True)
    recorder = EpisodeRecorder(ground_truth="full")
    try:
        record_expert(env.unwrapped, 0, recorder, hold_frames=1)
    finally:
        env.close()
    return recorder.ground_truth(), np.stack(recorder.images["head"])


@pytest.fixture(scope="module")
def windows(episode: tuple[GroundTruth, np.ndarray]) -> list[tuple[np.ndarray, PointTracks]]:
    truth, _ = episode
    chosen = [np.minimum(start + 2 * np.arange(17), truth.num_frames - 1) for start in (0, 16, 32, 40)]
    return [(frames, point_tracks(truth, frames)) for frames in chosen]


def _moving(truth: GroundTruth, frames: np.ndarray, tracks: PointTracks) -> np.ndarray:
    """Points of bodies that move by more than 3 cm within the window."""
    place = {int(body): k for k, body in enumerate(truth.body_ids_K)}
    path = truth.body_poses_TK7[frames, :, :3]
    far = np.linalg.norm(path - path[:1], axis=-1).max(0) > 0.03
    return np.array([body in place and bool(far[place[body]]) for body in tracks.body_N])


def test_first_frame(episode, windows) -> None:
    truth, _ = episode
    for frames, tracks in windows:
        again = point_tracks(truth, [frames[0], frames[0]]).points_TN2[1]
        known = tracks.depth_N > 0
        assert np.abs(again - query_grid((25, 25), truth.size))[known].max() < 0.01


def test_points_stay_on_their_body(episode, windows) -> None:
    truth, _ = episode
    on_body = total = moving_seen = moving_inside = 0
    for frames, tracks in windows:
        moving = _moving(truth, frames, tracks)
        for t, frame in enumerate(frames):
            pixel = np.rint(tracks.points_TN2[t]).astype(int)
            inside = ((pixel >= 0) & (pixel < [truth.size[1], truth.size[0]])).all(1)
            seen = tracks.visible_TN[t]
            assert not (seen & ~inside).any()
            ids = truth.body_id_map(int(frame))
            on_body += (ids[pixel[seen & moving, 1], pixel[seen & moving, 0]] == tracks.body_N[seen & moving]).sum()
            total += (seen & moving).sum()
            moving_seen += (seen & moving).sum()
            moving_inside += (inside & moving).sum()
    assert total > 1000
    assert on_body / total > 0.97
    # Wrong poses would not put points on other bodies but make them invisible: most must stay in sight.
    assert moving_seen / moving_inside > 0.7


def test_moving_points_keep_their_colour(episode, windows) -> None:
    """Flat-coloured links: the picture under a tracked point changes far less than under the pixel where it started."""
    _, pictures = episode
    tracked, fixed = [], []
    for frames, tracks in windows:
        moved = np.linalg.norm(tracks.points_TN2 - tracks.points_TN2[:1], axis=-1) > 12
        start = np.rint(tracks.points_TN2[0]).astype(int)
        first = pictures[frames[0]][start[:, 1], start[:, 0]].astype(int)
        for t in range(1, len(frames)):
            pick = moved[t] & tracks.visible_TN[t]
            now = np.rint(tracks.points_TN2[t][pick]).astype(int)
            picture = pictures[frames[t]].astype(int)
            tracked.append(np.abs(picture[now[:, 1], now[:, 0]] - first[pick]).mean(1))
            fixed.append(np.abs(picture[start[pick, 1], start[pick, 0]] - first[pick]).mean(1))
    error, baseline = np.concatenate(tracked), np.concatenate(fixed)
    assert len(error) > 300
    assert np.median(error) < 10 and error.mean() < 0.5 * baseline.mean()
