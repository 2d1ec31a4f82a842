"""Windows that are encoded while a run trains, against a store made of the same data: batches, losses, a killed run, what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import drawn_clips
import tiny_paper
from physisforcing import cli
from physisforcing.core import ground_truth
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.core.video import write_mp4
from physisforcing.worldmodel.data import target_maker
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.latent_maker import LatentMaker
from physisforcing.worldmodel.data.latents import LatentsCommand, make_latents
from physisforcing.worldmodel.data.live_bank import LiveBank
from physisforcing.worldmodel.data.target_maker import TargetMaker
from physisforcing.worldmodel.teachers.selection import TeachersConfig
from physisforcing.worldmodel.text_encoders import UMT5Text
from physisforcing.worldmodel.training.banks import prepare_banks
from physisforcing.worldmodel.training.config import TrainWorldModelConfig
from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model
from ranks import fork

_other = importlib.util.spec_from_file_location("targets_of_boxes", Path(__file__).with_name("test_targets.py"))
assert _other is not None and _other.loader is not None
boxes = importlib.util.module_from_spec(_other)
_other.loader.exec_module(boxes)

CPU = torch.device("cpu")
#: Exact tracks with the errors of a learned tracker, whose draws belong to a window, and no encoder.
DRAWN = {"tracker": "degraded", "encoder": "none"}
SEEN = {"tracker": "classical", "depth": "none", "encoder": "none"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: getattr(tiny_paper, kind)(folder / kind) for kind in ("ti2v", "a14b", "cosmos3")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four episodes of moving boxes, of 25, 26, 9 and 8 frames, with the simulator's truth."""
    folder = tmp_path_factory.mktemp("boxes") / "data"
    writer = boxes.LeRobotWriter(folder, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    for seed, length in enumerate((25, 26, 9, 8)):
        boxes._add(writer, boxes.scene.make_truth(frames=length), seed)
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three filtered clips, one of them upright."""
    folder = tmp_path_factory.mktemp("clips")
    generator, rows = np.random.default_rng(0), ["video,caption"]
    for name, task, turned in (("a", "bell", 0), ("b", "bottle", 1), ("c", "blocks", 0)):
        film = drawn_clips.film(task, generator, 24)
        write_mp4(folder / f"{name}.mp4", np.rot90(film, turned, (1, 2)).copy(), drawn_clips.FPS)
        rows.append(f"{name}.mp4,{drawn_clips.TASKS[task][2][0]}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    assert cli.main(["data", "prepare", str(folder / "out"), str(folder / "table.csv"), "to=clips", "filters=[]"]) == 0
    return folder / "out"


def teachers(names: dict[str, str]) -> TeachersConfig:
    made = TeachersConfig()
    for kind, name in names.items():
        getattr(made, kind).name = name
    return made


def live(model: Path, data: Path, out: Path, names: dict[str, str] = DRAWN, **more) -> TrainWorldModelConfig:
    """A run of four updates on datasets. ``more``: fields of ``data.live``."""
    made = TrainWorldModelConfig(model=str(model), heldout_windows=2, teacher=teachers(names))
    made.data.roots, made.data.heldout, made.data.workers = [str(data)], 1, 2
    made.data.targets_cache, made.data.text_cache = str(out.parent / "targets"), str(out.parent / "text")
    options = {"buckets": ["9x96x128"], "success_only": False, "grid_rows": 3, "grid_columns": 4, **more}
    for name, value in options.items():
        setattr(made.data.live, name, value)
    made.run.out, made.run.steps, made.run.batch, made.run.device = str(out), 4, 2, "cpu"
    made.run.log_every, made.run.save_every, made.run.eval_every = 1, 2, 2
    made.optim.warmup, made.optim.lr, made.lora.rank, made.large.videos = 1, 1e-2, 2, 0
    made.flow.motion_weight, made.physics.lambda_sem = 0.0, 0.0
    made.physics.phi_hidden = made.physics.psi_hidden = made.physics.feature_dim = 16
    return made


def stored(config: TrainWorldModelConfig, store: Path, out: Path) -> TrainWorldModelConfig:
    """The same run on a store that is made of the same data."""
    data = config.data
    command = LatentsCommand(
        **dataclasses.asdict(data.live), data=data.roots, model=config.model, out=str(store), device="cpu",
        text_cache=f"{store}-text", targets=config.physics.wanted, teacher=config.teacher,
    )  # fmt: skip
    make_latents(command)
    made = live(Path(config.model), store, out)
    made.physics = config.physics
    made.data = type(data)(latents=[str(store)], heldout=data.heldout, workers=2)
    made.teacher = TeachersConfig()
    return made


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize(
    ("kind", "source", "names", "more"),
    [
        ("ti2v", "data", DRAWN, {"dtype": "fp32"}),
        ("a14b", "data", {"encoder": "none"}, {"stride": 2, "limit": 1, "buckets": ["9x48x64"]}),
        ("cosmos3", "clips", SEEN, {"buckets": ["9x64x96", "9x96x64"], "fps": 5.0}),
    ],
)
def test_batches_are_those_of_a_store(models, tmp_path, request, monkeypatch, kind, source, names, more):
    source = request.getfixturevalue(source)
    config = live(models[kind], source, tmp_path / "run", names, **more)
    wanted = prepare_banks(stored(config, tmp_path / "store", tmp_path / "other"), CPU)
    found = prepare_banks(config, CPU)
    config.data.targets, config.data.targets_cache = "online", str(tmp_path / "nothing")
    online = prepare_banks(config, CPU)
    selected = 0
    for number, bank in enumerate(wanted):
        for other in (found[number], online[number]):
            assert other.info == bank.info and other.fingerprint == bank.fingerprint
            assert [other.name(row) for row in range(len(other))] == [bank.name(row) for row in range(len(bank))]
            assert torch.equal(other.sampler().rows(2, 7, 3), bank.sampler().rows(2, 7, 3))
            with monkeypatch.context() as patched:
                patched.setattr(LiveBank, "_read", lambda *_: pytest.fail("no picture is wanted for a sentence"))
                assert other.text_tokens == bank.text_tokens
            assert other.targets.identity == bank.targets.identity
            for rows in other.sampler().groups:
                batch = bank.batch(rows)
                selected += int(batch["targets"]["select_BN"].sum())
                assert ("condition_BCFhw" in batch) == (kind == "a14b")
                assert same(other.batch(rows), batch)
                with torch.autocast("cpu", torch.bfloat16):  # as where held-out values are measured
                    assert same(other.batch(rows), batch)
            other.close()
    assert selected and not (tmp_path / "nothing").exists()


def test_each_window_of_a_batch_is_encoded_once_and_no_other(models, data, tmp_path, monkeypatch):
    config = live(models["ti2v"], data, tmp_path / "run")
    config.physics.lambda_pix, config.data.heldout = 0.0, 0
    encoded, encode = [], LatentMaker.encode
    monkeypatch.setattr(LatentMaker, "encode", lambda self, frames: encoded.append(1) or encode(self, frames))
    bank = prepare_banks(config, CPU)[0]
    monkeypatch.setattr(UMT5Text, "_encode", lambda *_: pytest.fail("sentences are embedded at the start"))
    bank.expect(torch.tensor([0, 1]))
    assert not encoded
    twice = bank.batch(torch.tensor([1, 0, 1]))
    assert len(encoded) == 2 and torch.equal(twice["latents_BCFhw"][0], twice["latents_BCFhw"][2])
    assert same(bank.batch(torch.tensor([0])), {k: v if v is None else v[1:2] for k, v in twice.items()})
    bank.close()
    monkeypatch.setattr(UMT5Text, "_load", lambda *_: pytest.fail("lengths are told by headers"))
    assert len(prepare_banks(config, CPU)[0]) == len(bank), "sentences that are there are not read at the start"
    bank.pad_sentences(twice["text"][0].any(-1).sum().item())
    assert torch.equal(twice["text"][:, : bank.text_tokens].any(-1), torch.ones(3, bank.text_tokens, dtype=torch.bool))
    with pytest.raises(UserError, match=r"^data\.roots: got 'a sentence of \d+ tokens, data episode 0 .*text_tokens="):
        bank.pad_sentences(bank.text_tokens - 1)


def test_encoders_and_teachers_compute_as_in_commands_whatever_a_run_chose(models, data, tmp_path, monkeypatch):
    found = {}

    def noted(kind: type, name: str) -> None:
        call = getattr(kind, name)

        def told(*given, **named):
            found[name] = (
                torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark, torch.is_autocast_enabled("cpu"),
                torch.is_grad_enabled(),
            )  # fmt: skip
            return call(*given, **named)

        monkeypatch.setattr(kind, name, told)

    for kind, name in ((UMT5Text, "_encode"), (TargetMaker, "finish"), (LatentMaker, "encode")):
        noted(kind, name)
    config = live(models["ti2v"], data, tmp_path / "run")
    config.data.heldout, chosen = 0, ("medium", True, True, True)
    torch.set_float32_matmul_precision(chosen[0])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            bank = prepare_banks(config, CPU)[0]
            bank.batch(torch.tensor([0]))
            noted(LatentBank, "physics_rows")
            bank.physics_rows()
        bank.close()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.pop("physics_rows") == chosen, "and the run's choice is there again"
    assert set(found.values()) == {("highest", False, False, False)} and len(found) == 3


@pytest.mark.parametrize("names", [SEEN, {"depth": "none"}])
def test_teachers_of_a_batch_decode_and_read_nothing_twice(models, data, tmp_path, monkeypatch, names):
    """With the classical tracker the pictures of the bucket, with the simulator's truth and an encoder the recorded ones."""
    config = live(models["ti2v"], data, tmp_path / "run", names)
    config.data.heldout, config.data.targets = 0, "online"
    bank = prepare_banks(config, CPU)[0]
    same_episode = [row for row, (_, window) in enumerate(bank.windows) if window.episode == 1]
    assert len(same_episode) == 2
    decoded, frames = [], LeRobotDataset.frames
    truths, load = [], ground_truth.load
    monkeypatch.setattr(
        LeRobotDataset, "frames",
        lambda self, index, steps, key: decoded.extend((index, step) for step in steps) or frames(self, index, steps, key),
    )  # fmt: skip
    monkeypatch.setattr(ground_truth, "load", lambda *given, **named: truths.append(given) or load(*given, **named))
    target_maker._loaded.cache_clear()
    for row in same_episode:
        bank.batch(torch.tensor([row]))
    assert decoded == [(1, start + step) for start in (0, 16) for step in range(9)]
    assert len(truths) == (0 if names is SEEN else 1)
    bank.close()


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "fm", "pix", "grad_norm", "heldout_fm", "heldout_pix")
    return [tuple(line.get(name) for name in names) for line in lines]


def test_a_run_equals_that_of_a_store_also_killed_and_continued_with_either(models, data, tmp_path, capfd):
    config = live(models["ti2v"], data, tmp_path / "live")
    reference = stored(config, tmp_path / "store", tmp_path / "stored")
    wanted = load_file(train_world_model(reference) / "physics_heads.safetensors")
    assert len(losses(tmp_path / "stored")) == 4 + 3
    capfd.readouterr()
    child = fork(lambda: kill_itself(config), "the copy")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert "data.roots: 5 windows\n  left out, too short: 1" in capfd.readouterr().err
    run = tmp_path / "live"
    assert (run / "last").readlink() == Path("step-000002")
    os.rename(run, tmp_path / "kept")
    for name, settings in (("live", config), ("stored again", reference)):
        shutil.copytree(tmp_path / "kept", tmp_path / name, symlinks=True)
        settings.run.out, settings.run.resume = str(tmp_path / name), True
        found = load_file(train_world_model(settings) / "physics_heads.safetensors")
        assert losses(tmp_path / name) == losses(tmp_path / "stored")
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    config.data.live.limit = 1
    with pytest.raises(UserError, match=r"data\.roots: got 'windows .*how windows are made"):
        train_world_model(config)


def kill_itself(config: TrainWorldModelConfig) -> None:
    """Train in a process that dies in its third update."""
    step = Trainer.step

    def dies(self: Trainer, number: int):
        made = step(self, number)
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    Trainer.step = dies  # type: ignore[method-assign]
    train_world_model(config)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: setattr(c.data, "latents", ["x"]), UserError, r"^data\.roots: got .* and data\.latents\. Fix: .*leave one out"),
        (lambda c: (setattr(c.data, "latents", ["x"]), setattr(c.data, "roots", [])), UserError, r"^data\.text_cache: .*data\.latents hold their windows"),
        (lambda c: setattr(c.data, "roots", []), UserError, r"data\.latents: got 'no store'.*data\.roots"),
        (lambda c: setattr(c.data, "limit", 3), UserError, r"data\.limit: got 3, .*data\.live\.limit="),
        (lambda c: setattr(c.data.live, "buckets", ["9x96x130"]), UserError, r"^data\.live\.buckets: .*data\.live\.buckets=\[9x96x128\]"),
        (lambda c: setattr(c.data.live, "buckets", ["9x64x64"]), UserError, r"buckets: .*recorded shape"),
        (lambda c: setattr(c.data.live, "buckets", ["49x96x128"]), UserError, r"^data\.live\.buckets: got '4 episodes left out'"),
        (lambda c: setattr(c.data.live, "dtype", "fp16"), UserError, r"^data\.live\.dtype: got 'fp16'"),
        (lambda c: setattr(c.data.live, "start_stride", 3), UserError, r"^data\.live\.start_stride: .*data\.live\.start_stride="),
        (lambda c: setattr(c.data.live, "camera", "wrist"), UserError, r"^data\.live\.camera: got 'wrist'"),
        (lambda c: setattr(c.data.live, "limit", 0), UserError, r"^data\.live\.limit: got 0, .*write data\.live\.limit=1"),
        (lambda c: setattr(c.data.live, "canvas", "libero"), UserError, r"^data\.live\.canvas: .*for data\.live\.canvas=libero\. .*data\.live\.canvas=head"),
        (lambda c: setattr(c.data.live, "canvas", "two"), UserError, r"^data\.live\.canvas: got 'two'"),
        (lambda c: setattr(c.data, "heldout", 3), UserError, r"^data\.heldout: got 3, .*the 3 episodes"),
        (lambda c: setattr(c, "model", ""), UserError, r"^large\.videos: .*without model="),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(models, data, tmp_path, change, error, message):
    config = live(models["ti2v"], data, tmp_path / "run")
    change(config)
    with pytest.raises(error, match=message):
        train_world_model(config)


def test_only_the_tasks_that_are_asked_for_are_prepared(models, data, tmp_path, capsys):
    other = tmp_path / "other"
    writer = boxes.LeRobotWriter(other, boxes.robot_features([f"joint{i}" for i in range(14)]), robot_type="boxes")
    add = writer.add_episode
    writer.add_episode = lambda **given: add(**given | {"task_name": "spheres", "instruction": "roll them"})
    boxes._add(writer, boxes.scene.make_truth(frames=17), 9)
    writer.finalize()
    shutil.rmtree(other / "ground_truth")
    config = live(models["ti2v"], data, tmp_path / "run")
    config.data.heldout = 0
    alone = prepare_banks(config, CPU)[0].fingerprint
    shutil.rmtree(tmp_path / "text")
    config.data.roots.append(str(other))
    with pytest.raises(DatasetError, match=r"ground truth of episode 0: got 'none'"):
        prepare_banks(config, CPU)
    config.data.tasks = ["boxes"]
    capsys.readouterr()
    assert prepare_banks(config, CPU)[0].fingerprint == alone
    assert "  left out, 1 episodes of 1 other tasks (spheres); data.tasks=[] takes all\n" in capsys.readouterr().err
    assert len(list((tmp_path / "text").iterdir())) == 1, "no sentence of the other task"
    config.data.tasks = ["sphere"]
    with pytest.raises(UserError, match=r"data\.tasks: got 'sphere'.*did you mean 'spheres'"):
        prepare_banks(config, CPU)


def test_data_without_truth_or_of_another_rate_is_refused(models, data, clips, tmp_path):
    config = live(models["ti2v"], clips, tmp_path / "run")
    with pytest.raises(DatasetError, match=r"ground truth of episode 0: got 'none'.*teacher=permissive"):
        train_world_model(config)
    config.data.roots = [str(data), str(clips)]
    with pytest.raises(
        UserError, match=r"data\.roots: .*out: got '16 frames a second', .*data\.live\.stride= or data\.live\.fps="
    ):
        train_world_model(config)


def test_the_benchmark_compares_equal_batches(models, data, tmp_path, monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import paper_live

    words = ["--data", str(data), "--work", str(tmp_path), "--model", str(models["ti2v"]), "--tiny", "--updates", "3"]
    more = ["data.live.success_only=false", "physics.phi_hidden=16", "physics.psi_hidden=16"]
    words += ["--turns", "1", "--json", str(tmp_path / "live.json"), "--more", *more]
    monkeypatch.setattr(sys, "argv", ["paper_live.py", *words])
    paper_live.main()
    lines = {line["claim"]: line for line in json.loads((tmp_path / "live.json").read_text())}
    assert lines.keys() == {f"training/pf_wan_5b/{arm}_step_ms" for arm in ("store", "live")}
    assert all(line["value"] > 0 and line["against"]["equal_batches"] == 1.0 for line in lines.values())
