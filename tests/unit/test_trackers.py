"""The classical tracker on pictures with known motion, and degraded tracks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.degraded import TrackErrors, degrade
from physisforcing.worldmodel.teachers.protocols import PointTracker

SIZE = (120, 160)


def texture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth random colours, float32 [H,W,3] in 0-255."""
    import cv2

    noise = np.random.default_rng(seed).normal(size=(*size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255)


def sprite_over(background: np.ndarray, motions: list[np.ndarray], half: int) -> np.ndarray:
    """A textured square of 2 ``half`` pixels a side, moved by 2x3 matrices, before a background: uint8 [T,H,W,3]."""
    import cv2

    front, mask = texture(7, background.shape[:2]), np.zeros(background.shape[:2], np.float32)
    mask[60 - half : 60 + half, 80 - half : 80 + half] = 1
    frames, side = [], background.shape[1::-1]
    for motion in motions:
        moved, covers = cv2.warpAffine(front, motion, side), cv2.warpAffine(mask, motion, side)[..., None]
        frames.append(np.rint(covers * moved + (1 - covers) * background).astype(np.uint8))
    return np.stack(frames)


def turning(angle: float, shift: tuple[float, float]) -> np.ndarray:
    """2x3 matrix: a turn around (80, 60), then a shift."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = np.array([80.0, 60.0])
    return np.concatenate([turn, (centre - turn @ centre + shift)[:, None]], 1)


def track(video: np.ndarray, queries: np.ndarray):
    return ClassicalTracker().track(torch.from_numpy(video)[None], torch.from_numpy(queries.astype(np.float32))[None])


def grid(x: range, y: range) -> np.ndarray:
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2).astype(np.float32)


@pytest.mark.parametrize(("angle", "shift"), [(0.0, (1.3, 0.7)), (0.03, (0.0, 0.0)), (-0.02, (1.0, -0.5))])
def test_flow_follows_a_known_motion(angle: float, shift: tuple[float, float]) -> None:
    motions = [turning(angle * t, (shift[0] * t, shift[1] * t)) for t in range(17)]
    queries = grid(range(68, 93, 6), range(48, 73, 6))
    found = track(sprite_over(texture(1), motions, half=22), queries)
    expected = np.stack([queries @ motion[:, :2].T + motion[:, 2] for motion in motions])
    error = np.linalg.norm(found.points_BTN2[0].numpy() - expected, axis=-1)
    assert np.median(error[-1]) < 0.3
    assert error.max() < 1.0
    assert found.visible_BTN.float().mean() > 0.98
    assert torch.equal(found.points_BTN2[0, 0], torch.from_numpy(queries))


def test_background_stays_and_covered_points_are_hidden() -> None:
    """A square passes over still points: hidden while it covers them, seen again where they were once it has passed."""
    motions = [turning(0.0, (-78.0 + 9.0 * t, 0.0)) for t in range(17)]
    queries = grid(range(64, 97, 8), range(48, 73, 8))
    found = track(sprite_over(texture(1), motions, half=20), queries)
    centre = 80 + np.array([motion[0, 2] for motion in motions])
    reach = np.abs(queries[None, :, 0] - centre[:, None])
    covered, clear = reach < 16, reach > 26
    visible = found.visible_BTN[0].numpy()
    assert covered.any(0).all() and clear[-1].all()
    assert (~visible[covered]).mean() > 0.8
    assert visible[clear].mean() > 0.95
    error = np.linalg.norm(found.points_BTN2[0].numpy() - queries, axis=-1)
    assert np.quantile(error[clear & visible], 0.99) < 1.0
    confidence = found.confidence_BTN[0].numpy()
    assert confidence[clear & visible].mean() > 0.6 > 0.3 > confidence[covered].mean()


def test_a_plain_table_stays_under_a_moving_shadow_and_a_plain_body_moves() -> None:
    x, y = np.meshgrid(np.arange(160), np.arange(120))
    frames = []
    for t in range(17):
        shadow = 30 * np.exp(-(((x - 50 - 3 * t) ** 2 + (y - 90) ** 2) / 300))
        body = (np.abs(x - 50 - 3 * t) < 14) & (np.abs(y - 50) < 14)
        frames.append(np.where(body, 90, 235 - shadow)[..., None].repeat(3, -1).round().astype(np.uint8))
    table, body = grid(range(10, 151, 10), range(85, 116, 10)), grid(range(42, 59, 8), range(42, 59, 8))
    found = track(np.stack(frames), np.concatenate([table, body]))
    points = found.points_BTN2[0].numpy()
    assert (points[:, : len(table)] == table).all()
    error = np.linalg.norm(points[-1, len(table) :] - body - [48.0, 0.0], axis=-1)
    assert np.median(error) < 1.0
    assert error.max() < 3.0


def test_points_that_leave_are_hidden() -> None:
    motions = [turning(0.0, (6.0 * t, 0.0)) for t in range(17)]
    found = track(sprite_over(texture(1), motions, half=20), grid(range(72, 89, 8), range(52, 69, 8)))
    assert found.visible_BTN[0, 5].all()
    assert not found.visible_BTN[0, -1].any()


def test_classical_is_deterministic_in_batches_and_threads() -> None:
    import cv2

    videos = [sprite_over(texture(k), [turning(0.02 * t, (t, 0.0)) for t in range(5)], half=22) for k in (1, 2)]
    queries = torch.from_numpy(grid(range(20, 141, 20), range(20, 101, 20)))[None].repeat(2, 1, 1)
    both = ClassicalTracker().track(torch.from_numpy(np.stack(videos)), queries)
    assert both.points_BTN2.shape == (2, 5, 35, 2) and both.points_BTN2.dtype == torch.float32
    assert both.visible_BTN.dtype == torch.bool and both.confidence_BTN.dtype == torch.float32
    assert both.confidence_BTN.min() >= 0 and both.confidence_BTN.max() <= 1
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        for k in range(2):
            single = ClassicalTracker().track(torch.from_numpy(videos[k])[None], queries[:1])
            assert torch.equal(single.points_BTN2[0], both.points_BTN2[k])
            assert torch.equal(single.visible_BTN[0], both.visible_BTN[k])
    finally:
        cv2.setNumThreads(threads)


def test_protocol_and_licence() -> None:
    tracker = ClassicalTracker()
    assert isinstance(tracker, PointTracker) and tracker.info.permissive
    assert tracker.info.key.startswith("classical/")


@pytest.mark.parametrize(
    ("video", "queries", "field"),
    [
        (torch.zeros(1, 3, 32, 32, 3), torch.zeros(1, 4, 2), "video"),
        (torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 4, 2), "video"),
        (torch.zeros(1, 3, 8, 32, 3, dtype=torch.uint8), torch.zeros(1, 4, 2), "video"),
        (torch.zeros(2, 3, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 4, 2), "queries"),
        (torch.zeros(1, 3, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 4, 3), "queries"),
        (torch.zeros(1, 3, 32, 32, 3, dtype=torch.uint8), torch.zeros(1, 0, 2), "queries"),
    ],
)
def test_wrong_requests_are_refused(video: torch.Tensor, queries: torch.Tensor, field: str) -> None:
    with pytest.raises(UserError) as caught:
        ClassicalTracker().track(video, queries)
    assert caught.value.field == field


def exact(frames: int = 17, count: int = 4000, size: tuple[int, int] = (240, 320)) -> PointTracks:
    """Points that move on straight lines; body 1 left, body 2 right; every 7th point hidden in the second half."""
    generator = np.random.default_rng(3)
    start, speed = generator.uniform(0, 200, (count, 2)), generator.normal(0, 1.5, (count, 2))
    visible = np.ones((frames, count), bool)
    visible[frames // 2 :, ::7] = False
    return PointTracks(
        points_TN2=(start + np.arange(frames)[:, None, None] * speed).astype(np.float32),
        visible_TN=visible,
        size=size,
        body_N=np.where(start[:, 0] < 100, 1, 2).astype(np.int32),
        depth_N=np.ones(count, np.float32),
    )


@pytest.mark.parametrize("size", [(240, 320), (120, 160)])
def test_degraded_errors_have_the_magnitudes_asked_for(size: tuple[int, int]) -> None:
    truth, none = exact(size=size), {"false_hidden": 0.0, "false_visible": 0.0, "failures": 0.0}
    scale = size[0] / 240
    walk = degrade(truth, np.random.default_rng(0), TrackErrors(drift_px=0.4, jitter_px=0.0, **none))
    error = (walk.points_TN2 - truth.points_TN2).std(axis=(1, 2))
    np.testing.assert_allclose(error, 0.4 * scale * np.sqrt(np.arange(17)), rtol=0.04, atol=1e-5)
    jitter = degrade(truth, np.random.default_rng(0), TrackErrors(drift_px=0.0, jitter_px=0.7, **none))
    error = (jitter.points_TN2 - truth.points_TN2)[1:]
    np.testing.assert_allclose(error.std(axis=(1, 2)), 0.7 * scale, rtol=0.04)
    assert abs(np.corrcoef(error[3, :, 0], error[4, :, 0])[0, 1]) < 0.05
    assert np.array_equal(walk.visible_TN, truth.visible_TN)


def test_degraded_visibility_and_failures_have_the_rates_asked_for() -> None:
    truth = exact()
    errors = TrackErrors(drift_px=0, jitter_px=0, false_hidden=0.1, false_visible=0.3, failures=0)
    found, seen = degrade(truth, np.random.default_rng(0), errors).visible_TN[1:], truth.visible_TN[1:]
    assert abs((~found[seen]).mean() - 0.1) < 0.01 and abs(found[~seen].mean() - 0.3) < 0.02
    errors = TrackErrors(drift_px=0, jitter_px=0, false_hidden=0, false_visible=0, failures=0.2)
    failed = degrade(truth, np.random.default_rng(0), errors)
    away = (failed.points_TN2 != truth.points_TN2).any(-1)
    assert abs(away.any(0).mean() - 0.2) < 0.02
    assert (np.diff(away.astype(int), axis=0) >= 0).all()  # a point that has jumped stays where it went
    point = int(np.flatnonzero(away.any(0))[0])
    followed = np.flatnonzero((truth.points_TN2[-1] == failed.points_TN2[-1, point]).all(-1))
    assert truth.body_N[followed[0]] != truth.body_N[point]


def test_degraded_is_deterministic_keeps_frame_0_and_says_so() -> None:
    truth = exact(count=500)
    first, again = (degrade(truth, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(first.points_TN2, again.points_TN2) and np.array_equal(first.visible_TN, again.visible_TN)
    assert first.teacher == "degraded" and truth.teacher == "ground_truth"
    assert first.points_TN2.dtype == np.float32 and first.points_TN2.shape == truth.points_TN2.shape
    assert np.array_equal(first.points_TN2[0], truth.points_TN2[0])
    assert np.array_equal(first.visible_TN[0], truth.visible_TN[0])
    assert not np.array_equal(first.points_TN2, degrade(truth, np.random.default_rng(6)).points_TN2)
    alone = degrade(exact(frames=1, count=3), np.random.default_rng(0))
    assert np.array_equal(alone.points_TN2, exact(frames=1, count=3).points_TN2)


def test_degraded_defaults_lie_between_the_published_scores() -> None:
    """delta_avg of the README of co-tracker, on the scale of TAP-Vid's 256x256 pictures: 78.0 and 85.0."""
    truth = exact()
    found = degrade(truth, np.random.default_rng(0))
    error = np.linalg.norm((found.points_TN2 - truth.points_TN2) * [256 / 320, 256 / 240], axis=-1)[1:]
    error = error[truth.visible_TN[1:]]
    assert 0.78 < np.mean([(error < px).mean() for px in (1, 2, 4, 8, 16)]) < 0.85


@pytest.mark.parametrize("wrong", [{"drift_px": -1.0}, {"failures": 1.5}, {"jitter_px": float("nan")}])
def test_degraded_refuses_impossible_magnitudes(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError) as caught:
        degrade(exact(count=3), np.random.default_rng(0), TrackErrors(**wrong))
    assert caught.value.field in wrong
