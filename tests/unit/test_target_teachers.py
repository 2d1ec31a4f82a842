"""The target cache with teachers that see pictures: what is stored, by whom, on which machine, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from physisforcing.core import ground_truth
from physisforcing.core.config import compose
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.worldmodel.data import target_shards
from physisforcing.worldmodel.data.target_shards import RECIPE_FILE, Geometry, TargetRecipe, read_shard, shard_path
from physisforcing.worldmodel.data.targets import TargetsCommand, build, main, resolve_recipe
from physisforcing.worldmodel.data.window_targets import load_window_targets
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.relation import relation_matrix
from physisforcing.worldmodel.teachers.classical import ClassicalTracker
from physisforcing.worldmodel.teachers.ground_truth import query_grid
from physisforcing.worldmodel.teachers.registry import TeacherConfig, make_encoder
from physisforcing.worldmodel.teachers.selection import TeachersConfig
from ranks import fork, kill_once

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)

EPISODES = 3


def config(*overrides: str) -> TeachersConfig:
    return compose("data_targets", ["data=[x]", *overrides], TargetsCommand).teacher


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of moving boxes, with ground truth (equal ones would share a shard)."""
    folder = tmp_path_factory.mktemp("teachers") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed in range(EPISODES):
        boxes._add(writer, boxes.scene.make_truth(frames=25 + 2 * seed), seed)
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def pictures_only(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without ground truth, as real recordings are."""
    copy = tmp_path_factory.mktemp("real") / "data"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("targets", "ground_truth"))
    return copy


@pytest.fixture(scope="module")
def vjepa2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V-JEPA 2 with random weights, as a folder."""
    from transformers import VJEPA2Config, VJEPA2Model

    torch.manual_seed(0)
    settings = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "crop_size": 64}
    small = VJEPA2Config(
        **settings, frames_per_clip=8, pred_hidden_size=48, pred_num_hidden_layers=1, pred_num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("vjepa2")
    VJEPA2Model(small).save_pretrained(folder)
    return folder


def test_presets_name_their_teachers() -> None:
    names = {
        preset: [getattr(config(f"teacher={preset}"), kind).name for kind in ("tracker", "depth", "encoder")]
        for preset in ("simulator", "degraded", "permissive", "paper")
    }
    assert names == {
        "simulator": ["ground_truth", "ground_truth", "efficientnet_lite0"],
        "degraded": ["degraded", "ground_truth", "efficientnet_lite0"],
        "permissive": ["classical", "none", "efficientnet_lite0"],
        "paper": ["cotracker3", "depth_anything", "vjepa2"],
    }
    assert TargetRecipe() == resolve_recipe(config("teacher=simulator"), [])


def test_permissive_teachers_need_pictures_alone(pictures_only: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="teacher=permissive"):
        build(LeRobotDataset(pictures_only), TargetRecipe(), cache=tmp_path)
    words = ["teacher=permissive", f"cache={tmp_path}", "device=cpu", f"shard=1/{EPISODES}", "recipe.start_stride=16"]
    assert main([f"data=[{pictures_only}]", *words]) == 0
    recipe = resolve_recipe(config("teacher=permissive"), [], Geometry(start_stride=16))
    dataset = LeRobotDataset(pictures_only)
    shard = read_shard(dataset, 1, recipe, tmp_path)
    video = torch.from_numpy(dataset.frames(1, recipe.steps(16, 27).tolist()))[None]
    found = ClassicalTracker().track(video, torch.from_numpy(query_grid((25, 25), shard.size)).float()[None])
    near = found.points_BTN2[0].numpy()
    assert np.abs(shard.points_WTN2[1] / 64 - near)[np.abs(near) < 500].max() <= 0.5 / 64 + 1e-4
    np.testing.assert_array_equal(shard.visible_WTN[1], found.visible_BTN[0].numpy())
    assert shard.depth_kind == "off" and (shard.body_WN == -1).all()
    said = json.loads((shard_path(dataset, 1, recipe, tmp_path).parent / RECIPE_FILE).read_text())
    for kind in ("tracker", "depth", "encoder"):
        assert set(said[kind]) == {"name", "version", "licence", "checksum"}
        assert said[kind]["licence"] in ("Apache-2.0", "MIT")
    assert said["encoder"]["checksum"]


def test_permissive_refuses_other_licences_before_reading_them() -> None:
    chosen = config("teacher=permissive", "teacher.tracker.name=cotracker3", "teacher.tracker.path=/nowhere")
    with pytest.raises(UserError, match="CC-BY-NC"):
        resolve_recipe(chosen, [])


def test_compact_relations_are_the_cosines_of_the_encoder(root: Path, vjepa2: Path, tmp_path: Path) -> None:
    chosen = config(f"teacher.encoder.path={vjepa2}", "teacher.encoder.name=vjepa2", "teacher.relations=96")
    recipe = resolve_recipe(chosen, [])
    windows = [(str(root), 0, 0), (str(root), 2, 16)]
    options = {"cache": tmp_path, "teachers": chosen, "recipe": recipe}
    targets = load_window_targets(windows, PhysicsConfig(), **options)
    batch = targets.batch(torch.tensor([0, 1]))
    index, valid = batch["relation_index_BK"], batch["relation_valid_BK"]
    assert targets.teacher_dim == 48 and valid[0].sum() > 20
    encoder = make_encoder(TeacherConfig(name="vjepa2", path=str(vjepa2)))
    steps = recipe.steps(0, 25).tolist()
    video = torch.from_numpy(LeRobotDataset(root).frames(0, steps))[None]
    features = encoder.encode(video, recipe.tokens).flatten(1, 3)
    exact = relation_matrix(features[:, index[0]])[0]
    error = (batch["relation_BKK"][0].float() / 127 - exact)[valid[0]][:, valid[0]].abs().max()
    assert error <= 0.5 / 127 + 1e-3  # V-JEPA sees eight windows at once here, one there
    chosen_tokens = index[0][valid[0]]
    assert len(chosen_tokens.unique()) == len(chosen_tokens)
    assert batch["token_mask_BFhw"][0].flatten()[chosen_tokens].all(), "only what the losses select now"
    heads = PhysisForcing(PhysicsConfig(phi_hidden=32, psi_hidden=32), width=16, teacher_dim=targets.teacher_dim)
    hidden = torch.randn(2, 1500, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = heads(hidden, targets.grid, batch)
    out.loss.backward()
    assert out.sem > 0 and hidden.grad is not None and hidden.grad.isfinite().all()
    assert shard_path(LeRobotDataset(root), 0, recipe, tmp_path).stat().st_size < 1_000_000
    with pytest.raises(UserError, match="common"):
        load_window_targets(windows, PhysicsConfig(common="remove"), **options)


def test_features_of_a_video_encoder_belong_to_one_window(root: Path, vjepa2: Path, tmp_path: Path) -> None:
    chosen = config(f"teacher.encoder.path={vjepa2}", "teacher.encoder.name=vjepa2")
    recipe = resolve_recipe(chosen, [])
    targets = load_window_targets(
        [(str(root), 0, 8), (str(root), 0, 0)], PhysicsConfig(), recipe=recipe, teachers=chosen, cache=tmp_path
    )
    assert targets.teacher_WF.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    video = torch.from_numpy(LeRobotDataset(root).frames(0, recipe.steps(8, 25).tolist()))[None]
    expected = make_encoder(TeacherConfig(name="vjepa2", path=str(vjepa2))).encode(video, recipe.tokens)
    got = targets.batch(torch.tensor([0]))["teacher_BFhwC"]
    assert (got - expected).abs().max() < 5e-3 * expected.abs().max()


def test_degraded_tracks_do_not_depend_on_order(root: Path, tmp_path: Path) -> None:
    dataset, chosen = LeRobotDataset(root), config("teacher=degraded")
    recipe = resolve_recipe(chosen, [])
    build(dataset, recipe, teachers=chosen, cache=tmp_path / "all")
    build(dataset, recipe, teachers=chosen, cache=tmp_path / "one", episodes=[2])
    one, same = (read_shard(dataset, 2, recipe, tmp_path / name) for name in ("one", "all"))
    np.testing.assert_array_equal(one.points_WTN2, same.points_WTN2)
    build(dataset, TargetRecipe(), cache=tmp_path / "exact", episodes=[0])
    first, second = (
        read_shard(dataset, 0, recipe, tmp_path / "all"),
        read_shard(dataset, 0, TargetRecipe(), tmp_path / "exact"),
    )
    moved = np.abs(first.points_WTN2.astype(int) - second.points_WTN2).max(-1) / 64
    assert (moved[:, 0] == 0).all(), "queries are given"
    assert 0.2 < np.median(moved[:, 1:]) < 3
    worse = config("teacher=degraded", "teacher.errors.jitter_px=2")
    assert resolve_recipe(worse, []).digest() != recipe.digest()


def test_targets_travel_to_a_machine_without_the_weights(root: Path, vjepa2: Path, tmp_path: Path) -> None:
    with_weights = config(
        f"teacher.encoder.path={vjepa2}",
        "teacher.encoder.name=vjepa2",
        "teacher.relations=32",
        "teacher.depth.name=none",
    )
    recipe = resolve_recipe(with_weights, [])
    build(LeRobotDataset(root), recipe, teachers=with_weights, cache=tmp_path, episodes=[0])
    there = config("teacher.encoder.name=vjepa2", "teacher.relations=32", "teacher.depth.name=none")
    assert resolve_recipe(there, [tmp_path]) == recipe
    with pytest.raises(UserError, match=r"teacher\.encoder\.path"):
        resolve_recipe(there, [tmp_path / "empty"])
    with pytest.raises(UserError, match=r"teacher\.encoder\.path"):
        resolve_recipe(there, [tmp_path], Geometry(grid_rows=5))
    other = tmp_path / "0123456789abcdef"
    other.mkdir()
    described = recipe.describe()
    described["encoder"] = {**described["encoder"], "checksum": "0" * 64}
    (other / RECIPE_FILE).write_text(json.dumps(described))
    with pytest.raises(UserError, match="found"):
        resolve_recipe(there, [tmp_path])


def test_parts_and_processes_make_the_same_targets(root: Path, tmp_path: Path) -> None:
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    build(dataset, recipe, cache=tmp_path / "alone")
    for part in (0, 1):
        assert main([f"data=[{root}]", f"cache={tmp_path / 'parts'}", f"shard={part}/2", "device=cpu"]) == 0
        made = len(list((tmp_path / "parts").glob("*/*.safetensors")))
        assert made == (2 if part == 0 else 3)
    done = build(dataset, recipe, cache=tmp_path / "processes", processes=2, workers=1)
    assert (done.computed, done.cached) == (3, 0)
    for index in range(EPISODES):
        alone, *others = (
            read_shard(dataset, index, recipe, tmp_path / name) for name in ("alone", "parts", "processes")
        )
        for other in others:
            np.testing.assert_array_equal(other.points_WTN2, alone.points_WTN2)
            # another number of threads rounds convolutions differently
            np.testing.assert_allclose(other.features_EhwC, alone.features_EhwC, rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="shard"):
        main([f"data=[{root}]", "shard=2/2"])


def test_a_killed_run_continues(root: Path, tmp_path: Path) -> None:
    words = [f"data=[{root}]", f"cache={tmp_path}", "workers=1", "device=cpu"]
    process = fork(lambda: main(words), "the copy")
    kill_once(process, lambda: list(tmp_path.glob("*/*.safetensors")), within_s=60)
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    kept = len(list(tmp_path.glob("*/*.safetensors")))
    done = build(dataset, recipe, cache=tmp_path)
    assert kept >= 1 and (done.computed, done.cached) == (EPISODES - kept, kept)
    for index in range(EPISODES):
        read_shard(dataset, index, recipe, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (pip install 'physisforcing[ray]')")
def test_ray_tasks_make_the_same_targets(root: Path, tmp_path: Path) -> None:
    import ray

    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    build(dataset, recipe, cache=tmp_path / "alone")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        done = build(dataset, recipe, cache=tmp_path / "ray", workers=1, ray=True)
    finally:
        ray.shutdown()
    assert done.computed == EPISODES
    for index in range(EPISODES):
        alone, there = (read_shard(dataset, index, recipe, tmp_path / name) for name in ("alone", "ray"))
        np.testing.assert_array_equal(there.points_WTN2, alone.points_WTN2)


def test_ray_that_is_missing_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"physisforcing\[ray\]"):
        build(LeRobotDataset(root), TargetRecipe(), cache=tmp_path, ray=True)


def test_shards_are_mapped_and_checked_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    build(dataset, recipe, cache=tmp_path)
    passes: list[int] = []
    whole = target_shards._payload
    monkeypatch.setattr(target_shards, "_payload", lambda arrays: passes.append(1) or whole(arrays))
    first = read_shard(dataset, 0, recipe, tmp_path)
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "safetensors" in line]
    path = shard_path(dataset, 0, recipe, tmp_path)
    assert str(path) in mapped, "arrays are pages of the file"
    assert not first.features_EhwC.flags.owndata
    read_shard(dataset, 0, recipe, tmp_path)
    assert len(passes) == 1
    del first
    changed = bytearray(path.read_bytes())
    changed[-50] ^= 1
    path.unlink()
    path.write_bytes(bytes(changed))
    with pytest.raises(DatasetError, match="checksum"):
        read_shard(dataset, 0, recipe, tmp_path)


def test_compact_relations_keep_what_the_losses_select(root: Path, tmp_path: Path) -> None:
    """A tracker that errs makes the background move: K places must not be filled with it."""
    chosen = config("teacher=degraded", "teacher.errors.drift_px=1.5", "teacher.relations=96")
    recipe = resolve_recipe(chosen, [])
    options = {"recipe": recipe, "teachers": chosen, "cache": tmp_path}
    windows = [(str(root), 0, 0), (str(root), 1, 8), (str(root), 2, 0)]
    targets = load_window_targets(windows, PhysicsConfig(), **options)
    batch = targets.batch(torch.arange(3))
    wanted = batch["token_mask_BFhw"].flatten(1).sum(1).clamp(max=96)
    assert (wanted > 10).all() and torch.equal(batch["relation_valid_BK"].sum(1), wanted)
    for wider in ({"min_motion": 0.0}, {"visible_steps": False}, {"motion": "net"}, {"dead_zone": 0.0}):
        with pytest.raises(UserError, match=f"physics.{next(iter(wider))}"):
            load_window_targets(windows, PhysicsConfig(**wider), **options)


def test_teachers_that_are_not_the_recipes_are_refused(root: Path, vjepa2: Path, tmp_path: Path) -> None:
    chosen = config(f"teacher.encoder.path={vjepa2}", "teacher.encoder.name=vjepa2")
    dataset = LeRobotDataset(root)
    with pytest.raises(UserError, match=r"teacher\.encoder"):
        build(dataset, TargetRecipe(), teachers=chosen, cache=tmp_path)
    recipe = resolve_recipe(chosen, [])
    other = tmp_path / "vjepa2"
    shutil.copytree(vjepa2, other)
    from transformers import VJEPA2Model

    torch.manual_seed(1)
    VJEPA2Model(VJEPA2Model.from_pretrained(vjepa2).config).save_pretrained(other)
    swapped = config(f"teacher.encoder.path={other}", "teacher.encoder.name=vjepa2")
    with pytest.raises(UserError, match=r"teacher\.encoder"):
        build(dataset, recipe, teachers=swapped, cache=tmp_path)
    with pytest.raises(UserError, match=r"teacher\.tracker"):
        build(dataset, TargetRecipe(), teachers=config("teacher=degraded"), cache=tmp_path, processes=2)
    assert not list(tmp_path.glob("*/*.safetensors.part")) and not list(tmp_path.glob("????????????????/*.safetensors"))
    made = load_window_targets([(str(root), 0, 0)], PhysicsConfig(), teachers=chosen, cache=tmp_path)
    assert made.teacher_dim == 48 and (tmp_path / recipe.digest()).is_dir(), "the recipe follows from the teachers"


def test_a_found_recipe_must_be_what_was_said(vjepa2: Path, tmp_path: Path) -> None:
    words = ["teacher.encoder.name=vjepa2", "teacher.tracker.name=degraded"]
    recipe = resolve_recipe(config(*words, f"teacher.encoder.path={vjepa2}"), [])
    (tmp_path / recipe.digest()).mkdir()
    (tmp_path / recipe.digest() / RECIPE_FILE).write_text(json.dumps(recipe.describe()))
    assert resolve_recipe(config(*words), [tmp_path]) == recipe
    for other in (
        "teacher.errors.drift_px=5",
        "teacher.encoder.dtype=float16",
        f"teacher.encoder.checksum={'cd' * 32}",
    ):
        with pytest.raises(UserError, match=r"teacher\.encoder\.path"):
            resolve_recipe(config(*words, other), [tmp_path])
    described = recipe.describe()
    described["encoder"]["licence"] = "CC-BY-NC-4.0"
    (tmp_path / recipe.digest() / RECIPE_FILE).write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"teacher\.encoder\.path"):
        resolve_recipe(config(*words, "teacher.permissive_only=true"), [tmp_path])


def test_what_targets_cannot_serve_is_refused(pictures_only: Path, tmp_path: Path) -> None:
    window, permissive = [(str(pictures_only), 0, 0)], config("teacher=permissive", "teacher.encoder.name=none")
    recipe = resolve_recipe(permissive, [], Geometry(start_stride=24))
    options = {"recipe": recipe, "teachers": permissive, "cache": tmp_path}
    with pytest.raises(UserError, match="bodies"):
        load_window_targets(window, PhysicsConfig(relations="rigid"), **options)
    with pytest.raises(UserError, match="encoder"):
        load_window_targets(window, PhysicsConfig(), **options)
    targets = load_window_targets(window, PhysicsConfig(lambda_sem=0), **options)
    assert targets.select_WN.any() and targets.teacher_dim == 0
    heads = PhysisForcing(PhysicsConfig(lambda_sem=0, phi_hidden=16, psi_hidden=16), width=8, teacher_dim=4)
    out = heads(torch.randn(1, 1500, 8), targets.grid, targets.batch(torch.tensor([0])))
    assert out.pix > 0 and out.sem == 0, "the trajectory loss needs no encoder"
    for wrong in ("teacher.relations=1", "teacher.common=some", "teacher.tracker.name=classicl"):
        with pytest.raises(UserError):
            config(wrong)


def test_the_sign_of_depth_follows_its_teacher(root: Path, tmp_path: Path) -> None:
    """Depth-Anything says larger is nearer, the simulator larger is farther: both must prefer what is near."""
    dataset, recipe = LeRobotDataset(root), TargetRecipe()
    build(dataset, recipe, cache=tmp_path)
    shard = read_shard(dataset, 0, recipe, tmp_path)
    physics = PhysicsConfig(select="topk", top_k=12, min_motion=0.005)
    from physisforcing.worldmodel.data.window_targets import reduce_shard

    metric = reduce_shard(shard, [0], 25, recipe, physics).select_WN
    depth = shard.depth_WN.copy()
    shard.depth_WN, shard.depth_kind = np.where(depth > 0, depth.max() - depth, 0).astype(np.float32), "disparity"
    assert torch.equal(reduce_shard(shard, [0], 25, recipe, physics).select_WN, metric)
    wrong = PhysicsConfig(select="topk", top_k=12, min_motion=0.005, depth="metric")
    assert not torch.equal(reduce_shard(shard, [0], 25, recipe, wrong).select_WN, metric)


def test_ground_truth_of_another_length_is_refused(root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("targets"))
    ground_truth.save(ground_truth.episode_path(copy, 0), boxes.scene.make_truth(frames=17))
    with pytest.raises(DatasetError, match="17 frames"):
        build(LeRobotDataset(copy), TargetRecipe())
