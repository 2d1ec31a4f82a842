"""``physis data latents``: what a store holds, against the encoders and targets read another way; buckets; a killed run; what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

import drawn_clips
import tiny_large
from physisforcing import cli
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.video import write_mp4
from physisforcing.worldmodel.data import latent_shards
from physisforcing.worldmodel.data.buckets import Bucket, choose
from physisforcing.worldmodel.data.clips.decode import cover
from physisforcing.worldmodel.data.clips.manifest import ClipManifest
from physisforcing.worldmodel.data.latent_maker import LatentMaker
from physisforcing.worldmodel.data.latent_shards import read_store, read_window
from physisforcing.worldmodel.data.latent_sources import ClipEpisodes, SizedEpisodes
from physisforcing.worldmodel.data.latents import LatentsCommand, make_latents
from physisforcing.worldmodel.data.target_shards import Geometry, open_shard
from physisforcing.worldmodel.data.targets import resolve_recipe
from physisforcing.worldmodel.data.window_targets import load_window_targets
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.pipeline_vae import load_vae
from physisforcing.worldmodel.teachers.registry import TeacherConfig
from physisforcing.worldmodel.teachers.selection import TeachersConfig
from physisforcing.worldmodel.text_encoders import CosmosText, UMT5Text
from physisforcing.worldmodel.training.banks import open_stores
from ranks import fork, kill_once

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)

KINDS = ("ti2v", "a14b", "cosmos3")
SMALL = ["9x64x96"]
NO_ENCODER = TeachersConfig(encoder=TeacherConfig(name="none"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_large.pipeline(folder, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Three episodes of moving boxes, of 41, 25 and 9 frames, with the simulator's truth."""
    folder = tmp_path_factory.mktemp("boxes") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed, length in enumerate((41, 25, 9)):
        boxes._add(writer, boxes.scene.make_truth(frames=length), seed)
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Filtered clips, one of them upright and one short."""
    folder = tmp_path_factory.mktemp("clips")
    generator, rows = np.random.default_rng(0), ["video,caption"]
    for name, task, turned, frames in (("a", "bell", 0, 24), ("b", "bottle", 1, 24), ("c", "blocks", 0, 14)):
        film = drawn_clips.film(task, generator, frames)
        write_mp4(folder / f"{name}.mp4", np.rot90(film, turned, (1, 2)).copy(), drawn_clips.FPS)
        rows.append(f"{name}.mp4,{drawn_clips.TASKS[task][2][0]}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    assert cli.main(["data", "prepare", str(folder / "out"), str(folder / "table.csv"), "to=clips", "filters=[]"]) == 0
    return folder / "out"


def command(model: Path, data: Path, out: Path, **more) -> LatentsCommand:
    options = {"buckets": SMALL, "targets": False, "success_only": False, "device": "cpu", "dtype": "fp32"} | more
    return LatentsCommand(
        data=[str(data)], model=str(model), out=str(out), text_cache=str(out.parent / "text"), **options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_sentences_are_those_of_the_pipeline(models, dataset, tmp_path, kind):
    model = models[kind]
    made = make_latents(command(model, dataset, tmp_path / "store"))
    assert made["windows"] == 3 + 2 + 1 and made["buckets"] == {"9x64x96": 6} and made["missing"] == 0
    info, windows = read_store(tmp_path / "store")
    assert [(w.episode, w.start) for w in windows] == [(0, 0), (0, 16), (0, 32), (1, 0), (1, 16), (2, 0)]
    assert info.conditioned == (kind == "a14b") and info.fps == pytest.approx(50 / 3)
    vae, window = load_vae(model / "vae"), windows[1]
    frames = LeRobotDataset(dataset).frames(0, list(range(16, 25)))
    video = torch.from_numpy(np.stack([cover(frame, (64, 96)) for frame in frames])).movedim(-1, 0)[None]
    video = video.float() / 127.5 - 1
    kept = read_window(tmp_path / "store", window)
    assert torch.equal(kept["latents_CFhw"], vae.encode(video)[0])
    if kind == "a14b":
        grey = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], 2)
        assert torch.equal(kept["condition_CFhw"], vae.encode(grey)[0])
    if kind == "cosmos3":
        ids = CosmosText(model).pair("turn the cube", "", frames=9, height=64, width=96, fps=50 / 3)[0][0]
        assert torch.equal(kept["text_L"], ids)
    else:
        assert torch.equal(kept["text_LD"], UMT5Text(model, cache=tmp_path / "text").tokens("turn the cube"))


def test_the_statistics_of_latents_lie_where_the_autoencoder_does(models):
    maker = LatentMaker(models["ti2v"], device=torch.device("meta"), dtype=torch.float32)
    maker.load()
    scale = maker._vae.scale
    assert maker._vae.vae.device.type == scale._mean.device.type == scale._std.device.type == "meta"


def test_targets_are_those_of_the_dataset(models, dataset, tmp_path):
    store = tmp_path / "store"
    buckets = ["9x192x256", "17x192x256"]
    made = make_latents(
        command(
            models["ti2v"],
            dataset,
            store,
            buckets=buckets,
            targets=True,
            teacher=NO_ENCODER,
            grid_rows=5,
            grid_columns=6,
        )
    )
    assert made["buckets"] == {"17x192x256": 2 + 1, "9x192x256": 1} and made["target_bytes"] > 0
    windows = read_store(store)[1]
    shutil.move(store, tmp_path / "moved")
    physics = PhysicsConfig(lambda_sem=0.0)
    bank = open_stores([tmp_path / "moved"], 0, torch.device("cpu"), physics)[0]
    geometry = Geometry(
        frames=17, stride=1, start_stride=24, grid_rows=5, grid_columns=6, token_rows=6, token_columns=8
    )
    recipe = resolve_recipe(NO_ENCODER, [], geometry)
    known = [row for row, window in enumerate(windows) if window.shape[1] == 5]
    assert [windows[row].start for row in known] == [0, 24, 0]
    asked = [(str(dataset), windows[row].episode, windows[row].start) for row in known]
    wanted = load_window_targets(asked, physics, recipe=recipe, teachers=NO_ENCODER, cache=tmp_path / "again")
    found, wanted = bank.batch(torch.tensor(known))["targets"], wanted.batch(torch.arange(3))
    assert found.keys() == wanted.keys() and wanted["select_BN"].any()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_clips_are_seen_at_the_rate_and_shape_of_their_bucket(models, clips, tmp_path):
    teachers = TeachersConfig(
        **{
            kind: TeacherConfig(name=name)
            for kind, name in (("tracker", "classical"), ("depth", "none"), ("encoder", "none"))
        }
    )
    made = make_latents(
        command(
            models["ti2v"],
            clips,
            tmp_path / "store",
            buckets=["9x64x96", "9x96x64"],
            fps=5.0,
            targets=True,
            teacher=teachers,
            grid_rows=3,
            grid_columns=4,
        )
    )
    assert made["buckets"] == {"9x64x96": 1, "9x96x64": 1}
    assert {why: len(names) for why, names in made["left_out"].items()} == {"too short": 1}
    info, windows = read_store(tmp_path / "store")
    assert info.fps == 5.0 and windows[0].caption == "press the yellow bell" and windows[0].shape == (8, 3, 4, 6)
    video = ClipManifest(clips).frames(0, fps=5.0, size=(64, 96), num_frames=9)
    vae = load_vae(models["ti2v"] / "vae")
    wanted = vae.encode(torch.from_numpy(video).movedim(-1, 0)[None].float() / 127.5 - 1)[0]
    assert torch.equal(read_window(tmp_path / "store", windows[0])["latents_CFhw"], wanted)
    recipe, shard = open_shard(tmp_path / "store" / windows[1].targets)
    assert shard.size == (96, 64) and recipe.tokens == (3, 3, 2)


def test_a_rate_is_part_of_what_a_clip_is(clips):
    slow, fast = ClipEpisodes(clips, 5.0), ClipEpisodes(clips, 10.0)
    assert (slow.episode(0).length, fast.episode(0).length) == (12, 24)
    assert slow.content_hash(0) != fast.content_hash(0) != fast.content_hash(1)
    np.testing.assert_array_equal(slow.frames(0, [3, 1, 3]), fast.frames(0, [6, 2, 6]))
    sized = [SizedEpisodes(slow, size, "observation.images.head") for size in ((64, 96), (96, 64))]
    assert sized[0].content_hash(0) != sized[1].content_hash(0)
    assert sized[1].frames(0, [0]).shape == (1, 96, 64, 3)


def test_the_longest_bucket_that_is_filled_then_the_nearest_shape():
    stride, patch = (4, 16, 16), (1, 2, 2)
    buckets = [Bucket.parse(text, stride, patch) for text in ("81x480x640", "49x480x640", "49x640x480", "49x256x256")]
    assert choose(buckets, 100, (480, 640)).name == "81x480x640"
    assert choose(buckets, 80, (480, 640)).name == "49x480x640"
    assert choose(buckets, 49, (720, 405)).name == "49x640x480"
    assert choose(buckets, 49, (300, 310)).name == "49x256x256"
    assert choose(buckets, 48, (480, 640)) is None
    for text, near in (("80x480x640", "81x480x640"), ("81x470x650", "81x480x640"), ("1x32x32", "5x32x32")):
        with pytest.raises(UserError, match=rf"buckets.*buckets=\[{near}\]"):
            Bucket.parse(text, stride, patch)
    with pytest.raises(UserError, match="FRAMESxROWSxCOLUMNS"):
        Bucket.parse("480p", stride, patch)


def test_a_store_grows_and_keeps_what_it_has(models, dataset, clips, tmp_path):
    store, out = tmp_path / "store", []
    first = command(models["ti2v"], dataset, store, limit=1)
    out.append(make_latents(first))
    again = make_latents(first)
    assert (out[0]["computed"], again["computed"], again["windows"]) == (3, 0, 3)
    more = make_latents(command(models["ti2v"], dataset, store, limit=2))
    assert (more["computed"], more["windows"]) == (4, 5), "the shortest episode has no more windows than it had"
    starts = [(window.episode, window.start) for window in read_store(store)[1]]
    assert sorted(starts) == [(0, 0), (0, 16), (1, 0), (1, 16), (2, 0)], "no window is there twice"
    named = {window.shard for window in read_store(store)[1]}
    assert len(more["unlisted"]) == 2 and not named & set(more["unlisted"])
    assert all((store / shard).is_file() for shard in more["unlisted"])
    with pytest.raises(UserError, match=r"5 frames a second.*16\.67"):
        make_latents(command(models["ti2v"], clips, store, fps=5.0))
    with pytest.raises(UserError, match=r"data\.latents: (kind|latents|channels)"):
        make_latents(command(models["a14b"], dataset, store))


def _correct_clips(clips: Path, dataset: Path, folder: Path) -> tuple[Path, Path]:
    """-> (a copy of the clips, the same with another caption)."""
    for name in ("before", "after"):
        shutil.copytree(clips.parent, folder / name)
    table = folder / "after" / "out" / "clips.jsonl"
    table.write_text(table.read_text().replace("press the yellow bell", "turn the cube back"))
    return folder / "before" / "out", folder / "after" / "out"


def _correct_dataset(clips: Path, dataset: Path, folder: Path) -> tuple[Path, Path]:
    """-> (the dataset, a copy of it with another sentence)."""
    shutil.copytree(dataset, folder / "after")
    for path in (folder / "after" / "meta").rglob("*.parquet"):
        rows = json.dumps(parquet.read_table(path).to_pylist()).replace("turn the cube", "turn the cube back")
        parquet.write_table(pyarrow.Table.from_pylist(json.loads(rows), parquet.read_schema(path)), path)
    return dataset, folder / "after"


@pytest.mark.parametrize("correct", [_correct_clips, _correct_dataset])
def test_a_corrected_sentence_replaces_the_one_before(models, dataset, clips, tmp_path, correct):
    before, after = correct(clips, dataset, tmp_path / "data")
    store = tmp_path / "store"
    made = [
        make_latents(command(models["ti2v"], data, store, fps=5.0, buckets=["9x64x96"])) for data in (before, after)
    ]
    windows, text = read_store(store)[1], UMT5Text(models["ti2v"], cache=tmp_path / "text")
    assert made[0]["windows"] == made[1]["windows"] == len(windows) and made[1]["computed"] > 0
    assert "turn the cube back" in {window.caption for window in windows}
    assert not {"press the yellow bell", "turn the cube"} & {window.caption for window in windows}
    for window in windows:
        assert torch.equal(read_window(store, window)["text_LD"], text.tokens(window.caption))


def test_an_episode_that_is_given_twice_is_kept_once(models, dataset, tmp_path):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    twice = command(models["ti2v"], dataset, tmp_path / "store", limit=1)
    twice.data.append(str(copy))
    made = make_latents(twice)
    windows = read_store(tmp_path / "store")[1]
    assert len(windows) == len({window.identity for window in windows}) == made["windows"] == 3
    assert made["left_out"] == {"there already": [f"{copy} episode {index}" for index in range(3)]}


def test_rates_that_differ_by_rounding_are_one(models, dataset, tmp_path):
    rounded = shutil.copytree(dataset, tmp_path / "rounded")
    info = json.loads((rounded / "meta" / "info.json").read_text())
    (rounded / "meta" / "info.json").write_text(json.dumps(info | {"fps": 16.6}))
    make_latents(command(models["cosmos3"], dataset, tmp_path / "store", limit=1))
    made = make_latents(command(models["cosmos3"], rounded, tmp_path / "store", limit=1))
    assert made["computed"] == 0 and read_store(tmp_path / "store")[0].fps == pytest.approx(50 / 3)


def test_clips_slower_than_the_store_are_named(models, clips, tmp_path):
    made = make_latents(command(models["ti2v"], clips, tmp_path / "store", fps=2.0 * drawn_clips.FPS, limit=1))
    assert len(made["repeating"]) == 3 == made["windows"]
    made = make_latents(command(models["ti2v"], clips, tmp_path / "other", fps=float(drawn_clips.FPS), limit=1))
    assert made["repeating"] == []


def test_machines_share_a_store(models, dataset, tmp_path):
    parts = [make_latents(command(models["ti2v"], dataset, tmp_path / "store", shard=f"{k}/2")) for k in (0, 1)]
    assert [part["missing"] for part in parts] == [2, 0] and parts[1]["windows"] == 6


def test_the_last_list_of_two_machines_has_the_windows_of_both(models, dataset, tmp_path, monkeypatch):
    """The first machine has looked what is there; before it writes its list, the second one ends."""
    store, write, inside = tmp_path / "store", latent_shards.write_store, []

    def late(folder, info, windows):
        windows = list(windows)
        if not inside:
            inside.append(1)
            assert make_latents(command(models["ti2v"], dataset, store, shard="1/2"))["missing"] == 0
        write(folder, info, windows)

    monkeypatch.setattr(latent_shards, "write_store", late)
    assert make_latents(command(models["ti2v"], dataset, store, shard="0/2"))["missing"] == 0
    assert len(read_store(store)[1]) == 6


def test_targets_that_are_not_there_yet_are_counted(models, dataset, tmp_path):
    options = {"targets": True, "teacher": NO_ENCODER, "buckets": ["9x96x128"], "grid_rows": 2, "grid_columns": 2}
    made = make_latents(command(models["ti2v"], dataset, tmp_path / "store", **options))
    assert (made["windows"], made["without_targets"]) == (6, 0) and made["seconds_a_window"]["targets"] > 0
    gone = tmp_path / "store" / next(w.targets for w in read_store(tmp_path / "store")[1] if w.episode == 1)
    gone.unlink()
    other = make_latents(command(models["ti2v"], dataset, tmp_path / "store", shard="0/2", **options))
    assert (other["windows"], other["without_targets"], other["computed"]) == (6, 2, 0)
    assert {w.target_row for w in read_store(tmp_path / "store")[1] if not w.targets} == {-1}
    again = make_latents(command(models["ti2v"], dataset, tmp_path / "store", shard="1/2", **options))
    assert again["without_targets"] == 0 and gone.is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"buckets": ["81x64x96"]}, r"buckets.*3 episodes left out.*fewer frames"),
        ({"dtype": "fp16"}, r"dtype.*fp16"),
        ({"camera": "front"}, r"camera.*front"),
        ({"targets": True, "teacher": NO_ENCODER}, r"buckets.*9x64x96 of pictures of 240x320.*recorded shape"),
        ({"stride": 0}, r"stride.*0"),
        ({"device": "gpu"}, r"device.*gpu.*device=cpu"),
        (
            {"targets": True, "teacher": NO_ENCODER, "buckets": ["9x192x256"], "start_stride": 5},
            r"start_stride.*5 on.*8",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(models, dataset, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        make_latents(command(models["ti2v"], dataset, tmp_path / "store", **more))
    assert not (tmp_path / "store").exists()


def test_truth_that_was_not_recorded_is_missed_before_any_work(models, dataset, tmp_path):
    bare = shutil.copytree(dataset, tmp_path / "bare", ignore=shutil.ignore_patterns("ground_truth"))
    options = {"targets": True, "teacher": NO_ENCODER, "buckets": ["9x192x256"]}
    with pytest.raises(DatasetError, match=r"ground truth of episode 0.*teacher=permissive"):
        make_latents(command(models["ti2v"], bare, tmp_path / "store", **options))
    assert not (tmp_path / "store").exists()


def test_failures_are_left_out_and_counted(models, dataset, tmp_path):
    with pytest.raises(UserError, match=r"3 episodes left out"):
        make_latents(command(models["ti2v"], dataset, tmp_path / "store", success_only=True))


def test_a_killed_command_goes_on_to_the_same_bytes(models, dataset, tmp_path):
    words = [f"data=[{dataset}]", f"model={models['a14b']}", "buckets=[9x96x128]", "success_only=false", "device=cpu"]
    words += [f"text_cache={tmp_path / 'text'}", "teacher.encoder.name=none", "grid_rows=4", "grid_columns=4"]
    assert cli.main(["data", "latents", *words, f"out={tmp_path / 'whole'}"]) == 0
    process = fork(lambda: cli.main(["data", "latents", *words, f"out={tmp_path / 'killed'}"]), "the copy")
    kill_once(process, lambda: list(tmp_path.glob("killed/9x*/*.safetensors")), within_s=60)
    done = len(list(tmp_path.glob("killed/9x*/*.safetensors")))
    assert 1 <= done < 3 and not (tmp_path / "killed" / "windows.jsonl").exists()
    assert cli.main(["data", "latents", *words, f"out={tmp_path / 'killed'}"]) == 0
    files = {
        name: {
            p.relative_to(tmp_path / name): p.read_bytes()
            for p in (tmp_path / name).rglob("*.*")
            if not p.name.endswith(".part")
        }
        for name in ("whole", "killed")
    }
    assert files["whole"] == files["killed"] and len(files["whole"]) >= 2 + 3 + 3


def test_the_summary_is_for_machines_too(models, dataset, tmp_path, capsys):
    words = [f"data=[{dataset}]", f"model={models['ti2v']}", "buckets=[9x64x96]", "success_only=false", "targets=false"]
    assert cli.main(["data", "latents", *words, f"out={tmp_path / 's'}", f"text_cache={tmp_path / 't'}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["windows"] == said["computed"] == 6 and said["latent_bytes"] > 0
    assert set(said["seconds_a_window"]) == {"pictures", "latents", "text"}
