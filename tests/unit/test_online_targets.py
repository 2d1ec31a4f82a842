"""Teachers that look at each batch give what the cache holds, and train."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core.config import compose
from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.paths import weights_root
from physisforcing.core.types import ViewLayout
from physisforcing.worldmodel.data.target_shards import Geometry
from physisforcing.worldmodel.data.targets import TargetsCommand, resolve_recipe
from physisforcing.worldmodel.data.window_targets import load_window_targets
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.teachers.online import OnlineTeachers
from physisforcing.worldmodel.teachers.selection import Teachers, TeachersConfig
from physisforcing.worldmodel.text import _key, _store
from physisforcing.worldmodel.training.config import DataConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.worldmodel import Trainer, prepare_banks

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)


def permissive() -> TeachersConfig:
    return compose("data_targets", ["data=[x]", "teacher=permissive"], TargetsCommand).teacher


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes as real recordings are: without ground truth."""
    folder = tmp_path_factory.mktemp("online") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed in range(2):
        boxes._add(writer, boxes.scene.make_truth(frames=25 + 2 * seed), seed)
    writer.finalize()
    shutil.rmtree(folder / "ground_truth")
    return folder


def test_online_targets_are_the_cached_ones(root: Path, tmp_path: Path) -> None:
    recipe, physics = resolve_recipe(permissive(), [], Geometry(start_stride=16)), PhysicsConfig()
    options = {"recipe": recipe, "teachers": permissive(), "cache": tmp_path}
    cached = load_window_targets([(str(root), 0, 0), (str(root), 1, 16)], physics, **options)
    dataset = LeRobotDataset(root)
    steps = [recipe.steps(0, 25), recipe.steps(16, 27)]
    video = torch.from_numpy(np.stack([dataset.frames(k, steps[k].tolist()) for k in (0, 1)]))
    made = OnlineTeachers(Teachers(permissive()), physics)(video, recipe.tokens)
    stored = cached.batch(torch.tensor([0, 1]))
    assert made.keys() == stored.keys()
    near = (stored["points_BFN2"] - 0.5).abs().amax(-1) < 1
    assert (made["points_BFN2"] - stored["points_BFN2"]).abs()[near].max() < 0.5 / 64 / 240 + 1e-6
    assert torch.equal(made["visible_BFN"], stored["visible_BFN"])
    assert (made["select_BN"] == stored["select_BN"]).float().mean() > 0.99  # 1/128 pixel may decide at a threshold
    assert (made["token_mask_BFhw"] == stored["token_mask_BFhw"]).float().mean() > 0.99
    assert (made["teacher_BFhwC"] - stored["teacher_BFhwC"]).abs().max() < 5e-3 * stored["teacher_BFhwC"].abs().max()


def test_training_with_teachers_that_look_at_each_batch(root: Path, tmp_path: Path) -> None:
    sentence = "turn the cube"
    _store(tmp_path / "text" / f"{_key(sentence)}.safetensors", np.ones((3, 384), np.float16), sentence)
    config = compose(
        "train_worldmodel",
        [
            "teacher=permissive",
            "data.targets=online",
            "run.batch=2",
            "heldout_windows=4",
            "run.log_every=2",
            "backbone.num_layers=2",
            "backbone.tap=1",
        ],
        TrainWorldModelConfig,
    )
    config.codec = str(weights_root() / "vae")
    settings = {"success_only": False, "heldout": 1, "start_stride": 8, "targets": "online"}
    config.data = DataConfig(roots=[str(root)], text_cache=str(tmp_path / "text"), **settings)
    bank, heldout = prepare_banks(config, torch.device("cpu"))
    trainer = Trainer(config, bank, torch.device("cpu"))
    first, second = trainer.step(0), trainer.step(1)
    assert first["sem"] > 0 and second["loss"].isfinite()
    assert "share_pix" not in first and second["share_sem"] > 0, "gradient shares are measured where a line is logged"
    expected = trainer.forcing.meter.norms_3[2] / trainer.forcing.meter.norms_3[0]
    assert second["share_sem"] == expected, "of this step, not of an earlier one"
    assert (
        Trainer(config, bank, torch.device("cpu"))
        .forcing.phi[1]
        .weight.equal(Trainer(config, bank, torch.device("cpu")).forcing.phi[1].weight)
    )
    values = trainer.heldout(heldout)
    assert values["heldout_sem"] > 0
    assert not list(root.glob("**/*.part")) and not (root / "targets").exists()


def test_a_collage_and_separate_streams_have_the_same_targets(root: Path) -> None:
    """A head picture over two wrist pictures; each camera's targets and losses are those of its own stream."""
    layout = ViewLayout(
        names=("head", "left_wrist", "right_wrist"),
        height=192,
        width=160,
        tiles=((0, 0, 112, 160), (112, 0, 80, 80), (112, 80, 80, 80)),
    )
    frames = LeRobotDataset(root).frames(0, [0, 2, 4, 6, 8])
    streams = {
        name: np.ascontiguousarray(frames[:, k * 20 : k * 20 + height, 60 + 30 * k : 60 + 30 * k + width])
        for k, (name, (_, _, height, width)) in enumerate(zip(layout.names, layout.tiles, strict=True))
    }
    canvas = layout.compose(streams)
    for name, part in layout.split(canvas).items():
        np.testing.assert_array_equal(part, streams[name])
    teachers = OnlineTeachers(Teachers(permissive()), PhysicsConfig(), grid=(9, 12))
    targets, rects = teachers.views(torch.from_numpy(canvas)[None], (2, 12, 10), layout)
    assert rects == [(0, 0, 7, 10), (7, 0, 5, 5), (7, 5, 5, 5)]
    for (name, stream), made, rect in zip(streams.items(), targets, rects, strict=True):
        alone = teachers(torch.from_numpy(stream)[None], (2, *rect[2:]))
        for key, value in alone.items():
            torch.testing.assert_close(made[key], value, rtol=0, atol=0, msg=f"{name} {key}")
    with pytest.raises(UserError, match="canvas"):
        layout.split(canvas[:, :100])
    with pytest.raises(UserError, match=r"pictures\[head\]"):
        layout.compose({**streams, "head": streams["head"] / 255})
    heads = PhysisForcing(PhysicsConfig(phi_hidden=16, psi_hidden=16), width=8, teacher_dim=teachers.channels)
    out = heads(torch.randn(1, 240, 8), (2, 12, 10), targets, views=rects)
    assert out.loss.isfinite()


@pytest.mark.parametrize(
    ("tiles", "field"),
    [
        (((0, 0, 10, 20),), r"views\.tiles:"),
        (((0, 0, 10, 20), (5, 0, 15, 20)), r"views\.tiles\[wrist\]"),
        (((0, 0, 10, 20), (10, 0, 11, 20)), r"views\.tiles\[wrist\]"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(tiles: tuple, field: str) -> None:
    with pytest.raises(UserError, match=field):
        ViewLayout(names=("head", "wrist"), height=20, width=20, tiles=tiles)


def test_what_cannot_be_seen_in_pictures_is_refused() -> None:
    with pytest.raises(UserError, match=r"teacher\.tracker\.name"):
        OnlineTeachers(Teachers(TeachersConfig()), PhysicsConfig())
    with pytest.raises(UserError, match="bodies"):
        OnlineTeachers(Teachers(permissive()), PhysicsConfig(relations="rigid"))
    with pytest.raises(UserError, match=r"data\.targets"):
        compose("train_worldmodel", ["data.targets=sometimes"], TrainWorldModelConfig)
