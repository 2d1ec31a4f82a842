"""Crops and mirror images replayed on targets, against pictures that really were cropped and mirrored."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.worldmodel.data.augmentation import Crop
from physisforcing.worldmodel.data.target_shards import TargetRecipe, read_shard
from physisforcing.worldmodel.data.targets import build
from physisforcing.worldmodel.data.window_targets import load_window_targets, reduce_shard
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.regions import normalise_points, to_pixels

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)

SIZE = (240, 320)
CROPS = [
    Crop(top=24, left=40, height=180, width=240),
    Crop(top=0, left=0, height=240, width=320, flip=True),
    Crop(top=60, left=10, height=120, width=160, flip=True),
]


def blobs(points_px: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """A picture a point [N,H,W,3] uint8: a smooth spot with its centre at the point."""
    y, x = np.mgrid[: size[0], : size[1]]
    distance = (x - points_px[:, 0, None, None]) ** 2 + (y - points_px[:, 1, None, None]) ** 2
    spot = 255 * np.exp(-distance / (2 * 5.0**2))
    return torch.from_numpy(np.repeat(np.rint(spot)[..., None], 3, -1).astype(np.uint8))


def centroids(pictures: torch.Tensor) -> np.ndarray:
    light = pictures[..., 0].double().numpy()
    y, x = np.mgrid[: light.shape[1], : light.shape[2]]
    total = light.sum((1, 2))
    return np.stack([(light * x).sum((1, 2)), (light * y).sum((1, 2))], -1) / total[:, None]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("out", [(240, 320), (120, 160), (96, 96)])
def test_points_go_where_the_pictures_go(crop: Crop, out: tuple[int, int]) -> None:
    """Spots are found in the cropped, resized and mirrored pictures where their coordinates are replayed to."""
    inner = np.random.default_rng(0).uniform(0.25, 0.75, (12, 2))
    points = np.array([crop.left, crop.top]) + inner * [crop.width, crop.height]
    seen = centroids(crop.frames(blobs(points, SIZE), out))
    replayed = crop.points(normalise_points(torch.from_numpy(points), SIZE), SIZE)
    assert np.abs(to_pixels(replayed, out).numpy() - seen).max() < 0.1


def test_features_go_where_the_points_go() -> None:
    """Features that say where their token stands, in [0,1], say so of the crop's tokens too."""
    crop, grid = CROPS[2], (15, 20)
    y, x = torch.meshgrid((torch.arange(15) + 0.5) / 15, (torch.arange(20) + 0.5) / 20, indexing="ij")
    moved = crop.features(torch.stack([x, y], -1)[None], SIZE)[0]
    expected = torch.stack([x, y], -1)
    inside = crop.points(moved, SIZE)
    assert moved.shape == (*grid, 2)
    assert (inside - expected).abs()[
        1:-1, 1:-1
    ].max() < 1e-4  # linear in between, so bilinear is exact away from the border


def test_a_crop_that_leaves_the_picture_is_refused() -> None:
    for wrong in (Crop(top=-1, left=0, height=10, width=10), Crop(top=0, left=300, height=10, width=30)):
        with pytest.raises(UserError, match="crop"):
            wrong.check(SIZE)
        with pytest.raises(UserError, match="crop"):
            wrong.frames(torch.zeros(1, *SIZE, 3, dtype=torch.uint8), (64, 64))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("augmentation") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    boxes._add(writer, boxes.scene.make_truth(frames=41), 0)
    writer.finalize()
    build(LeRobotDataset(folder), TargetRecipe())
    return folder


def test_windows_with_crops(root: Path) -> None:
    windows = [(str(root), 0, 0), (str(root), 0, 0), (str(root), 0, 8), (str(root), 0, 8)]
    crops = [None, CROPS[1], None, CROPS[0]]
    plain = load_window_targets(windows, PhysicsConfig())
    cropped = load_window_targets(windows, PhysicsConfig(), crops=crops)
    for row in (0, 2):
        before, after = (targets.batch(torch.tensor([row])) for targets in (plain, cropped))
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    mirrored, whole = cropped.batch(torch.tensor([1])), plain.batch(torch.tensor([0]))
    torch.testing.assert_close(mirrored["points_BFN2"][..., 0], 1 - whole["points_BFN2"][..., 0])
    torch.testing.assert_close(mirrored["points_BFN2"][..., 1], whole["points_BFN2"][..., 1], rtol=0, atol=0)
    # queries stand on borders of tokens (every fifth column), where a mirror image takes the other side
    same = mirrored["token_mask_BFhw"] == whole["token_mask_BFhw"].flip(-1)
    assert same.float().mean() > 0.98 and whole["token_mask_BFhw"].sum() > 50
    torch.testing.assert_close(mirrored["teacher_BFhwC"], whole["teacher_BFhwC"].flip(-2), rtol=2e-3, atol=2e-3)
    part = cropped.batch(torch.tensor([3]))
    outside = (part["points_BFN2"] < 0).any(-1) | (part["points_BFN2"] >= 1).any(-1)
    assert outside[:, 0].any() and not part["select_BN"][outside[:, 0]].any(), (
        "queries outside the crop are not selected"
    )
    assert part["select_BN"].any()


def test_compact_relations_cannot_be_cropped(root: Path) -> None:
    from dataclasses import replace

    recipe = TargetRecipe()
    shard = read_shard(LeRobotDataset(root), 0, recipe)
    windows = len(shard.starts_W)
    compact = replace(
        shard,
        token_WK=np.zeros((windows, 4), np.uint16),
        count_W=np.full(windows, 4, np.int32),
        relation_WR=np.zeros((windows, 6), np.int8),
    )
    with pytest.raises(UserError, match="relations=0"):
        reduce_shard(compact, [0], 41, recipe, PhysicsConfig(), crops=[CROPS[0]])
