"""Trackers without networks: known motion, occlusion, and degraded truth that is as bad as it was asked to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from physisforcing.core.errors import UserError
from physisforcing.core.types import PointTracks
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.degraded import Degradation, degraded
from physisforcing.worldmodel.teachers.protocols import PointTracker

FRAMES, SIZE = 9, (96, 128)


def texture(seed: int = 0) -> torch.Tensor:
    """A smooth random picture, float [1,3,192,256] in 0..255."""
    noise = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed)) * 255
    return nnf.interpolate(noise, size=(192, 256), mode="bicubic", align_corners=False).clamp(0, 255)


def moving(angle: float, step: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A video that turns by ``angle`` radians and moves by ``step`` pixels a frame, and where its first pixels go: [T,N,2]."""
    rows, columns = torch.meshgrid(torch.arange(20, 80, 10.0), torch.arange(20, 110, 10.0), indexing="ij")
    query = torch.stack([columns.flatten(), rows.flatten()], -1)
    centre = torch.tensor([63.5, 47.5])
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    pixels = torch.stack([x, y], -1)
    frames, tracks = [], []
    for t in range(FRAMES):
        c, s = np.cos(angle * t), np.sin(angle * t)
        turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float32)
        shift = torch.tensor(step) * t
        source = (pixels - centre - shift) @ turn + centre + torch.tensor([64.0, 48.0])
        place = (source * 2 + 1) / torch.tensor([256.0, 192.0]) - 1
        picture = nnf.grid_sample(texture(), place[None], mode="bilinear", align_corners=False)[0]
        frames.append(picture.permute(1, 2, 0).round().to(torch.uint8))
        tracks.append((query - centre) @ turn.T + centre + shift)
    return torch.stack(frames), torch.stack(tracks)


@pytest.mark.parametrize(
    ("angle", "step", "median", "most"),
    [(0.0, (1.3, -0.6), 0.1, 0.6), (0.02, (0.4, 0.2), 0.2, 1.2), (0.0, (0.0, 0.0), 0.01, 0.1)],
    ids=["moves", "turns", "stands"],
)
def test_known_motion_is_followed(angle: float, step: tuple[float, float], median: float, most: float) -> None:
    """A patch that turns is compared with one that does not, so turning costs accuracy."""
    video, truth = moving(angle, step)
    tracker = ClassicalTracker()
    assert isinstance(tracker, PointTracker) and tracker.info.permissive
    found = tracker.track(video[None], truth[None, 0])
    torch.testing.assert_close(found.points_BTN2[0, 0], truth[0], rtol=0, atol=0)
    error = (found.points_BTN2[0] - truth).norm(dim=-1)[found.visible_BTN[0]]
    assert found.visible_BTN.float().mean() > 0.9
    assert error.median() < median and error.max() < most, (error.median(), error.max())


def test_a_point_that_is_covered_is_lost_and_others_are_not() -> None:
    video, truth = moving(0.0, (0.0, 0.0))
    video = video.clone()
    for t in range(4, FRAMES):
        video[t, 30:70, 40:80] = torch.tensor([200, 30, 30], dtype=torch.uint8)
    found = ClassicalTracker().track(video[None], truth[None, 0])
    x, y = truth[0].T
    covered = (x > 48) & (x < 72) & (y > 38) & (y < 62)
    away = (x < 30) | (x > 90)
    assert covered.any() and not found.visible_BTN[0, 4:, covered].any()
    assert found.visible_BTN[0, :4, covered].all() and found.visible_BTN[0][:, away].all()
    assert (found.confidence_BTN[0, 5:, covered] == 0).all()


def test_videos_of_a_batch_do_not_touch_each_other() -> None:
    one, truth = moving(0.0, (1.0, 0.0))
    two, _ = moving(0.01, (-0.5, 0.5))
    queries = truth[None, 0].expand(2, -1, -1)
    together = ClassicalTracker().track(torch.stack([one, two]), queries)
    for row, video in enumerate((one, two)):
        alone = ClassicalTracker().track(video[None], queries[:1])
        assert torch.equal(together.points_BTN2[row], alone.points_BTN2[0])
        assert torch.equal(together.visible_BTN[row], alone.visible_BTN[0])


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match="video"):
        ClassicalTracker().track(torch.zeros(1, 3, 8, 8, 3), torch.zeros(1, 4, 2))
    with pytest.raises(UserError, match="queries"):
        ClassicalTracker().track(torch.zeros(2, 3, 8, 8, 3, dtype=torch.uint8), torch.zeros(1, 4, 2))
    with pytest.raises(UserError, match="tolerance_px"):
        ClassicalTracker(tolerance_px=0)
    with pytest.raises(UserError, match=r"degradation\.lost"):
        Degradation(lost=2)


def exact(points: int = 4000, height: int = 240) -> PointTracks:
    generator = np.random.default_rng(0)
    place = generator.uniform(20, 200, (1, points, 2)).repeat(FRAMES, 0).astype(np.float32)
    return PointTracks(
        points_TN2=place,
        visible_TN=generator.random((FRAMES, points)) > 0.4,
        size=(height, height * 4 // 3),
        body_N=np.zeros(points, np.int32),
        depth_N=np.ones(points, np.float32),
    )


def test_degraded_tracks_have_the_errors_that_were_asked_for() -> None:
    truth, quiet = exact(), {"lost": 0.0, "drift_px": 0.0, "jitter_px": 0.0, "missed": 0.0, "imagined": 0.0}

    def error(**changes) -> np.ndarray:
        made = degraded(truth, np.random.default_rng(1), Degradation(**quiet | changes))
        assert made.teacher == "degraded" and made.points_TN2.dtype == np.float32
        np.testing.assert_array_equal(made.points_TN2[0], truth.points_TN2[0])
        return made.points_TN2 - truth.points_TN2

    assert np.abs(error()).max() == 0
    assert abs(error(jitter_px=0.5)[1:].std() - 0.5) < 0.01
    walk = error(drift_px=0.2).std(axis=(1, 2))
    np.testing.assert_allclose(walk[1:], 0.2 * np.sqrt(np.arange(2, FRAMES + 1)), rtol=0.05)
    hopped = error(lost=0.25, hop_px=12.0)
    share = (np.abs(hopped[-1]).sum(-1) > 0).mean()
    assert abs(share - 0.25) < 0.02 and abs(hopped[-1][np.abs(hopped[-1]).sum(-1) > 0].std() - 12) < 0.6
    shown = degraded(
        truth, np.random.default_rng(1), Degradation(**quiet | {"missed": 0.1, "imagined": 0.2})
    ).visible_TN
    assert abs(1 - shown[1:][truth.visible_TN[1:]].mean() - 0.1) < 0.01
    assert abs(shown[1:][~truth.visible_TN[1:]].mean() - 0.2) < 0.01


def test_degraded_tracks_depend_on_the_generator_and_scale_with_the_picture() -> None:
    one, two = (degraded(exact(50), np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one.points_TN2, two.points_TN2)
    small, large = exact(50), exact(50, height=480)
    a = degraded(small, np.random.default_rng(7)).points_TN2 - small.points_TN2
    b = degraded(large, np.random.default_rng(7)).points_TN2 - large.points_TN2
    np.testing.assert_allclose(b, 2 * a, atol=1e-4)
