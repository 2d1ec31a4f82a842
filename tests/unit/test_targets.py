"""Cached targets: content-addressed, resumable, whole or refused; and the in-memory rows a trainer reads."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core import ground_truth
from physisforcing.core.config import compose
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.paths import weights_root
from physisforcing.worldmodel.data.target_shards import SUBPIXELS, TargetRecipe, read_shard, shard_path, subpixels_of
from physisforcing.worldmodel.data.targets import build, main
from physisforcing.worldmodel.data.window_targets import load_window_targets
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.teachers.frame_encoder import FrameEncoder
from physisforcing.worldmodel.teachers.ground_truth import point_tracks
from physisforcing.worldmodel.text import _key, _store
from physisforcing.worldmodel.training.config import DataConfig, TrainWorldModelConfig
from physisforcing.worldmodel.training.worldmodel import prepare_banks

_scene = importlib.util.spec_from_file_location("scene_of_boxes", Path(__file__).with_name("test_tracks.py"))
assert _scene is not None and _scene.loader is not None
scene = importlib.util.module_from_spec(_scene)
_scene.loader.exec_module(scene)

COLOURS = np.array([[90, 110, 90], [150, 120, 90], [200, 40, 40], [40, 60, 200]], np.uint8)
LENGTH = 41


def _add(writer: LeRobotWriter, truth: ground_truth.GroundTruth, seed: int) -> None:
    length = truth.num_frames
    nearest = [truth.body_id_map(truth.nearest_stored(t)) for t in range(length)]
    state = np.linspace(0, 1, length * 14, dtype=np.float32).reshape(length, 14)
    success = np.zeros(length, bool)
    columns = {
        "observation.state": state,
        "observation.state_measured": state,
        "action": state,
        "next.success": success,
    }
    writer.add_episode(
        columns=columns,
        frames={HEAD: COLOURS[np.stack(nearest)]},
        instruction="turn the cube",
        task_name="boxes",
        seed=seed,
        success=False,
        scene_hash=f"hash{seed}",
        policy="expert",
        embodiment="none",
        assets_version="1",
        attachments={GROUND_TRUTH_PATH: lambda path: ground_truth.save(path, truth)},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets") / "data"
    writer = LeRobotWriter(folder, robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed, length in ((0, LENGTH), (1, 25)):
        _add(writer, scene.make_truth(frames=length), seed)
    writer.finalize()
    build(LeRobotDataset(folder), TargetRecipe())
    return folder


def test_a_second_run_computes_nothing(root: Path) -> None:
    done = build(LeRobotDataset(root), TargetRecipe())
    assert (done.computed, done.cached, done.windows) == (0, 2, 6 + 4)
    assert main([f"data=[{root}]", "device=cpu"]) == 0


def test_an_interrupted_run_continues(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    dataset, recipe = LeRobotDataset(copy), TargetRecipe()
    kept, lost = shard_path(dataset, 0, recipe), shard_path(dataset, 1, recipe)
    before, expected = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    lost.with_name(f".{lost.name}.1.part").write_bytes(expected[:100])
    done = build(dataset, recipe)
    assert (done.computed, done.cached) == (1, 1)
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == expected, "the same input gives the same bytes"


def test_stored_tracks_are_the_tracks(root: Path) -> None:
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    shard = read_shard(dataset, 0, recipe)
    truth = scene.make_truth(frames=LENGTH)
    np.testing.assert_array_equal(shard.starts_W, [0, 8, 16, 24, 32, 40])
    for place, start in enumerate(shard.starts_W):
        tracks = point_tracks(truth, np.minimum(start + 2 * np.arange(17), LENGTH - 1))
        near = np.abs(tracks.points_TN2) < 500
        difference = np.abs(shard.points_WTN2[place] / SUBPIXELS - tracks.points_TN2)[near]
        assert difference.max() <= 0.5 / SUBPIXELS + 1e-4
        np.testing.assert_array_equal(shard.visible_WTN[place], tracks.visible_TN)
        np.testing.assert_array_equal(shard.depth_WN[place], tracks.depth_N)


def test_teacher_rows_are_features_of_the_last_frame_of_each_latent_frame(root: Path) -> None:
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    targets = load_window_targets([(str(root), 0, 8), (str(root), 1, 16)], PhysicsConfig(), recipe=recipe)
    for row, (episode, steps) in enumerate(((0, [8, 16, 24, 32, 40]), (1, [16, 24, 24, 24, 24]))):
        frames = torch.from_numpy(dataset.frames(episode, steps))
        expected = FrameEncoder()(frames).permute(0, 2, 3, 1)
        got = targets.batch(torch.tensor([row]))["teacher_BFhwC"][0]
        assert got.shape == (5, 15, 20, 112)
        assert (got - expected).abs().max() < 5e-3 * expected.abs().max()  # float16


def test_rows_of_windows(root: Path) -> None:
    windows = [(str(root), 1, 0), (str(root), 0, 16), (str(root), 0, 0), (str(root), 1, 24)]
    targets = load_window_targets(windows, PhysicsConfig())
    assert (len(targets), targets.grid, targets.teacher_dim) == (4, (5, 15, 20), 112)
    for row, window in enumerate(windows):
        alone = load_window_targets([window], PhysicsConfig()).batch(torch.tensor([0]))
        together = targets.batch(torch.tensor([row]))
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=0, atol=0)
    last = targets.batch(torch.tensor([3]))
    assert not last["select_BN"].any() and not last["token_mask_BFhw"].any(), "one repeated frame shows no motion"
    first = targets.batch(torch.tensor([2]))
    bodies = point_tracks(scene.make_truth(frames=LENGTH), TargetRecipe().steps(0, LENGTH).tolist()).body_N
    selected = first["select_BN"][0].numpy()
    assert selected.sum() >= 8 and set(bodies[selected]) <= {2, 3}, "only what moves is selected, never the table"


def test_another_cache_folder(root: Path, tmp_path: Path) -> None:
    windows = [(str(root), 1, 8)]
    here = load_window_targets(windows, PhysicsConfig())
    there = load_window_targets(windows, PhysicsConfig(), cache=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").glob("*/*.safetensors"))) == 1
    torch.testing.assert_close(here.points_WFN2, there.points_WFN2, rtol=0, atol=0)


def test_training_finds_the_targets_of_the_command_in_another_folder(root: Path, tmp_path: Path) -> None:
    copy, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("targets"))
    assert main([f"data=[{copy}]", f"cache={cache}", "device=cpu"]) == 0
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*/*.safetensors")}
    assert len(made) == 2
    sentence = "turn the cube"  # a cache that was filled elsewhere: no encoder is loaded
    _store(tmp_path / "text" / f"{_key(sentence)}.safetensors", np.ones((3, 384), np.float16), sentence)
    config = TrainWorldModelConfig(codec=str(weights_root() / "vae"))
    config.data = DataConfig(
        roots=[str(copy)],
        success_only=False,
        heldout=1,
        start_stride=8,
        targets_cache=str(cache),
        text_cache=str(tmp_path / "text"),
    )
    banks = prepare_banks(config, torch.device("cpu"))
    assert sorted(bank.targets.row_W.tolist() for bank in banks) == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*/*.safetensors")} == made, "nothing computed again"
    assert not (copy / "targets").exists(), "nothing is written beside the data"


def test_the_training_config_names_the_folder_of_targets() -> None:
    config = compose("train_worldmodel", ["data.targets_cache=elsewhere"], TrainWorldModelConfig)
    assert config.data.targets_cache == "elsewhere"
    with pytest.raises(UserError, match=r"recipe\.stride"):
        main(["data=[x]", "recipe.strid=4"])


def test_a_loss_step_runs_on_loaded_targets(root: Path) -> None:
    targets = load_window_targets([(str(root), 0, 0), (str(root), 1, 24)], PhysicsConfig())
    heads = PhysisForcing(PhysicsConfig(phi_hidden=32, psi_hidden=32), width=16, teacher_dim=targets.teacher_dim)
    hidden = torch.randn(2, 1500, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = heads(hidden, targets.grid, targets.batch(torch.tensor([0, 1])))
    out.loss.backward()
    assert 0 < out.pix < 1 and 0 < out.sem < 2
    assert hidden.grad is not None and hidden.grad[0].abs().sum() > 0
    assert hidden.grad[1].abs().sum() == 0, "a static window adds nothing"


def test_region_options_need_no_new_targets(root: Path) -> None:
    window = [(str(root), 0, 0)]
    some = load_window_targets(window, PhysicsConfig(select="topk", top_k=5), build_missing=False)
    assert some.select_WN.sum() == 5


def test_damaged_and_foreign_shards_are_refused(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    dataset, recipe = LeRobotDataset(copy), TargetRecipe()
    first, second = shard_path(dataset, 0, recipe), shard_path(dataset, 1, recipe)
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(DatasetError, match="episode 0"):
        read_shard(dataset, 0, recipe)
    changed = bytearray(whole)
    changed[-50] ^= 1
    first.write_bytes(bytes(changed))
    with pytest.raises(DatasetError, match="checksum"):
        read_shard(dataset, 0, recipe)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DatasetError, match="something else"):
        read_shard(dataset, 0, recipe)
    first.unlink()
    with pytest.raises(DatasetError, match="physis data targets"):
        load_window_targets([(str(copy), 0, 0)], PhysicsConfig(), build_missing=False)


def test_wrong_starts_and_missing_truth_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="start_stride"):
        load_window_targets([(str(root), 0, 4)], PhysicsConfig())
    copy = tmp_path / "data"
    shutil.copytree(root, copy)
    ground_truth.episode_path(copy, 0).unlink()
    with pytest.raises(DatasetError, match="ground truth"):
        build(LeRobotDataset(copy), TargetRecipe())
    with pytest.raises(UserError, match=r"recipe\.frames"):
        TargetRecipe(frames=16)


@pytest.mark.parametrize(("size", "unit"), [((240, 320), 64), ((512, 512), 64), ((480, 640), 32), ((1080, 1920), 16)])
def test_tracks_over_larger_pictures_are_stored_more_coarsely(size: tuple[int, int], unit: int) -> None:
    assert subpixels_of(size) == unit
    assert (max(size) - 0.5) * unit <= np.iinfo(np.int16).max


def test_the_recipe_is_part_of_the_key(root: Path) -> None:
    dataset = LeRobotDataset(root)
    paths = {shard_path(dataset, 0, r) for r in (TargetRecipe(), TargetRecipe(stride=4), TargetRecipe(grid_rows=5))}
    assert len(paths) == 3
