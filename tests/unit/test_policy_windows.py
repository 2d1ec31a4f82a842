"""Windows that a policy is trained on: canvases, actions and masks of a latent store and of the small models, against the dataset itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny_large
import tiny_training
from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.lerobot import LeRobotDataset, LeRobotWriter
from physisforcing.core.lerobot_format import robot_features
from physisforcing.envs.recording import EpisodeRecorder
from physisforcing.policy.backbone import build_policy
from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.objective import draw, policy_losses
from physisforcing.policy.recordings import Recordings
from physisforcing.policy.training_config import TrainPolicyConfig
from physisforcing.policy.training_start import prepare_policy_banks
from physisforcing.policy.windows import PolicyBank, episode_statistics, latent_banks
from physisforcing.worldmodel.data.batches import WindowBank
from physisforcing.worldmodel.data.canvas import compose
from physisforcing.worldmodel.data.latent_bank import LatentBank
from physisforcing.worldmodel.data.latent_shards import read_store, read_window
from physisforcing.worldmodel.data.latents import LatentsCommand, make_latents
from physisforcing.worldmodel.data.windows import Episode, WindowTable, read_episodes
from physisforcing.worldmodel.pipeline_vae import load_vae
from physisforcing.worldmodel.training.banks import open_datasets, open_stores

CPU = torch.device("cpu")
CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
JOINTS = 3
LENGTHS = (45, 34, 20)
#: Pixels of a quarter of RoboTwin's canvas.
SMALL = "9x192x160"


def write(
    folder: Path,
    lengths: tuple[int, ...] = LENGTHS,
    *,
    fps: float = 50.0,
    joints: int = JOINTS,
    cameras: tuple[str, ...] = CAMERAS,
    without: str = "",
) -> Path:
    """A dataset as others record them: its actions are no states. ``without``: a column that is left out."""
    features = robot_features([f"j{k}" for k in range(joints)], cameras=cameras, height=48, width=64, fps=fps)
    features.pop(without, None)
    features.pop("observation.state_measured")
    writer = LeRobotWriter(folder, features, robot_type="drawn", fps=fps)
    for number, length in enumerate(lengths):
        draw = np.random.default_rng([number, joints])
        columns: dict[str, Any] = {
            "observation.state": draw.normal(size=(length, joints)).astype(np.float32),
            "action": (10 + draw.normal(size=(length, joints))).astype(np.float32),
            "next.success": np.ones(length, bool),
        }
        columns.pop(without, None)
        shade = np.arange(length, dtype=np.uint8)[:, None, None, None] * 4
        frames = {
            f"observation.images.{camera}": np.broadcast_to(shade + place * 20, (length, 48, 64, 3)).astype(np.uint8)
            for place, camera in enumerate(cameras)
        }
        writer.add_episode(
            columns=columns, frames=frames, instruction="stack them", task_name="stack", seed=number, success=True,
            scene_hash=f"{number}", policy="expert", embodiment="drawn", assets_version="1",
        )  # fmt: skip
    writer.finalize()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_large.pipeline(tmp_path_factory.mktemp("model"), "ti2v")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "robot")


def command(model: Path, data: list[Path], out: Path, **more: Any) -> LatentsCommand:
    options = {
        "buckets": [SMALL], "stride": 4, "start_stride": 8, "past_end": True, "canvas": "robotwin", "targets": False,
        "device": "cpu", "dtype": "fp32", "text_cache": str(out.parent / "text"),
    } | more  # fmt: skip
    return LatentsCommand(data=[str(folder) for folder in data], model=str(model), out=str(out), **options)


@pytest.fixture(scope="module")
def store(model, dataset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "latents"
    made = make_latents(command(model, [dataset], out))
    assert made["without_actions"] == 0 and not made["left_out"]
    return out


def opened(store: Path, heldout: int = 0) -> tuple[LatentBank, LatentBank | None]:
    return open_stores([store], heldout, CPU, None)


def policy_bank(bank: LatentBank, chunk: int = 32) -> PolicyBank:
    recordings = Recordings.of_latents(bank)
    return PolicyBank.of_recordings(bank, recordings, recordings.statistics("zscore"), chunk)


def test_a_store_has_every_start_that_shows_two_pictures(store: Path) -> None:
    """Of 45, 34 and 20 frames, in steps of 8 while 4 more are left; a window covers 33."""
    _, windows = read_store(store)
    assert [(w.episode, w.start) for w in windows] == (
        [(0, start) for start in range(0, 41, 8)] + [(1, start) for start in range(0, 30, 8)] + [(2, 0), (2, 8)]
    )
    assert {w.shape for w in windows} == {(8, 3, 12, 10)} and len({w.actions for w in windows}) == 3


def test_training_sees_the_canvas_that_acting_sees(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Latents of a window, past the end of its episode, are those of the canvases that ``compose`` makes of pictures; no pixel is resized
    again, and no other picture is read."""
    make_latents(command(model, [dataset], tmp_path / "s", buckets=["9x384x320"], limit=1))
    info, windows = read_store(tmp_path / "s")
    window, source = next(w for w in windows if w.episode == 2), LeRobotDataset(dataset)
    steps = np.minimum(np.arange(0, 33, 4), 19)
    frames = {name: source.frames(2, steps.tolist(), f"observation.images.{name}") for name in CAMERAS}
    canvases = np.stack([compose("robotwin", {name: rows[k] for name, rows in frames.items()}) for k in range(9)])
    video = torch.from_numpy(canvases).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    kept = read_window(tmp_path / "s", window)["latents_CFhw"]
    assert torch.equal(kept, load_vae(model / "vae").encode(video)[0]) and info.canvas == "robotwin"
    training, heldout = latent_banks(*opened(tmp_path / "s", 1), "zscore", 32)
    assert heldout is not None and (len(training), len(heldout), training.hz) == (2, 1, 50.0)
    held = {window.episode for _, window in heldout.bank.windows}  # type: ignore[union-attr]
    rows = np.concatenate([source.columns(k)["action"][:-1] for k in range(3) if k not in held])
    for bank in (training, heldout):
        np.testing.assert_allclose(bank.statistics.action.offset_D, rows.astype(np.float64).mean(0), rtol=1e-12)
    assert training.statistics.episodes == 2


def test_a_batch_has_the_actions_of_its_windows_and_says_what_lies_past_the_end(store: Path, dataset: Path) -> None:
    bank, source = policy_bank(opened(store)[0]), LeRobotDataset(dataset)
    names = [bank.name(row) for row in range(len(bank))]
    assert names[6] == "robot episode 1 from step 0" and (bank.stride, bank.hz) == (4, 50.0)
    found = bank.batch(torch.arange(len(bank)))
    statistics = bank.statistics
    for row, (_, window) in enumerate(bank.bank.windows):  # type: ignore[union-attr]
        columns, length, start = source.columns(window.episode), LENGTHS[window.episode], window.start
        taken = [min(start + p, length - 2) for p in range(32)]
        back = statistics.action.denormalise(found["actions_BPA"][row])
        torch.testing.assert_close(back, torch.from_numpy(columns["action"][taken]), rtol=1e-6, atol=0)
        assert found["action_valid_BP"][row].tolist() == [start + p < length - 1 for p in range(32)]
        state = statistics.state.denormalise(found["state_BA"][row])
        torch.testing.assert_close(state, torch.tensor(columns["observation.state"][start]), rtol=1e-5, atol=1e-6)
        pictures = [[0], [4, 8, 12, 16], [20, 24, 28, 32]]
        assert found["frame_valid_BF"][row].tolist() == [any(start + s < length for s in some) for some in pictures]
    assert not found["frame_valid_BF"][-1].all() and found["frame_valid_BF"][:, 0].all()
    assert found["text"].shape[:2] == (12, 512) and found["latents_BCFhw"].shape == (12, 8, 3, 12, 10)
    assert found["targets"] is None and bank.text_tokens == 513
    assert bank.fingerprint == bank.bank.fingerprint  # type: ignore[union-attr]
    bank.close()


def test_a_run_without_a_store_has_the_same_batches(model: Path, dataset: Path, store: Path, tmp_path: Path) -> None:
    config = tiny_large.config(model, [], tmp_path / "run")
    config.data.roots, config.data.latents, config.data.heldout = [str(dataset)], [], 0
    config.data.text_cache = str(store.parent / "text")
    for name in ("buckets", "stride", "start_stride", "past_end", "canvas", "dtype"):
        setattr(config.data.live, name, getattr(command(model, [dataset], store), name))
    live, kept = policy_bank(open_datasets(config, CPU, None, quiet=True)[0]), policy_bank(opened(store)[0])
    rows = torch.tensor([11, 5])
    ours, theirs = live.batch(rows), kept.batch(rows)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name != "targets")
    assert live.fingerprint == kept.fingerprint


def test_a_large_policy_learns_of_a_batch_what_its_masks_allow(model: Path, store: Path) -> None:
    """Losses of the last two windows, 20 and 12 of whose 33 rows exist: what is masked may be anything, what is not may not."""
    config = PolicyModelConfig(
        action_dim=JOINTS, state_dim=JOINTS, width=16, ffn_dim=24, steps_per_latent=16.0, proprioception="linear"
    )
    policy, _ = build_policy(model, config, seed=0)
    bank = policy_bank(opened(store)[0])
    rows = torch.tensor([10, 11])
    noise = draw(bank.latent_shape(rows), config, torch.Generator().manual_seed(1))

    def losses(change: str, valid: bool) -> tuple[float, float]:
        batch = bank.batch(rows)
        if change:
            mask = batch["action_valid_BP" if change == "actions_BPA" else "frame_valid_BF"]
            mask = (mask if valid else ~mask).double()
            shape = (2, -1, 1) if change == "actions_BPA" else (2, 1, -1, 1, 1)
            batch[change] = batch[change] + mask.view(shape).float()
        terms, _ = policy_losses(policy, batch, noise)
        return float(terms["action"]), float(terms["video"])

    policy.expert.proj_out.weight.data.zero_()
    policy.transformer.proj_out.weight.data.zero_()
    before = losses("", True)
    assert all(np.isfinite(before)) and min(before) > 0
    assert losses("actions_BPA", False) == before and losses("latents_BCFhw", False) == before
    assert losses("actions_BPA", True)[0] != before[0] and losses("latents_BCFhw", True)[1] != before[1]


def test_sentences_may_be_shorter_than_the_backbone_takes(store: Path) -> None:
    bank, _ = opened(store)
    whole = bank.batch(torch.tensor([0]))["text"]
    length = int((whole[0] != 0).any(-1).sum())
    bank.sentence_tokens = length
    assert torch.equal(policy_bank(bank).batch(torch.tensor([0]))["text"], whole[:, :length])
    bank.sentence_tokens = length - 1
    with pytest.raises(UserError, match=f"a sentence of {length} tokens"):
        bank.batch(torch.tensor([0]))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"without": "action"}, r"actions of other episode 0: got 'none'.*the columns observation\.state and action"),
        ({"joints": 4}, r"observation\.state of other episode 0: got '4 numbers', .*3, as robot episode 0"),
        ({"cameras": CAMERAS[:2]}, r"canvas: .*right_wrist"),
    ],
)
def test_datasets_that_cannot_be_are_named(
    model: Path, dataset: Path, tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    data = [dataset, write(tmp_path / "other", (36,), **other)]

    def made() -> PolicyBank:
        make_latents(command(model, data, tmp_path / "s", limit=1))
        return policy_bank(opened(tmp_path / "s")[0])

    with pytest.raises((DatasetError, UserError), match=message):
        made()


def test_windows_without_actions_are_counted(model: Path, tmp_path: Path, capsys) -> None:
    data = write(tmp_path / "other", (36,), without="action")
    words = [f"data=[{data}]", f"model={model}", f"out={tmp_path / 's'}", f"text_cache={tmp_path / 'text'}"]
    words += ["canvas=robotwin", f"buckets=[{SMALL}]", "stride=4", "targets=false", "device=cpu"]
    from physisforcing import cli

    assert cli.main(["data", "latents", *words]) == 0
    assert "1 windows have no states and actions" in capsys.readouterr().out


@pytest.mark.parametrize(("slow", "stride"), [(25.0, 4), (40.0, 4), (25.0, 2)])
def test_rates_that_differ_are_refused(model: Path, dataset: Path, tmp_path: Path, slow: float, stride: int) -> None:
    """Also where both show the same pictures a second: 50 Hz at every 4th and 25 Hz at every 2nd, whose chunks last half and twice as long."""
    other, text = (
        write(tmp_path / "slow", (36,), fps=slow),
        r"rate of slow episode 0: got '25 rows a second', .*robot epis",
    )
    if stride == 4:
        with pytest.raises(UserError, match=rf"slow: got '{slow / 4:g} frames a second', wanted 12.5 as .*robot"):
            make_latents(command(model, [dataset, other], tmp_path / "s", limit=1))
        return
    make_latents(command(model, [dataset], tmp_path / "s", limit=1))
    make_latents(command(model, [other], tmp_path / "s", limit=1, stride=stride))
    with pytest.raises(DatasetError, match=text):
        policy_bank(opened(tmp_path / "s")[0])


def test_other_pictures_than_those_of_the_canvas_are_refused(store: Path, model: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match=r"pictures of 192x160', wanted 384x320"):
        latent_banks(*opened(store), "zscore", 32)
    bank = opened(store)[0]
    bank.info = dataclasses.replace(bank.info, canvas="")
    with pytest.raises(UserError, match="pictures of one camera"):
        latent_banks(bank, None, "zscore", 32)
    bank.info = dataclasses.replace(bank.info, kind="cosmos3")
    with pytest.raises(UserError, match="latents of Cosmos3"):
        policy_bank(bank)
    with pytest.raises(UserError, match=r"policy\.chunk: got 33.*1 to 32"):
        policy_bank(opened(store)[0], 33)
    with pytest.raises(UserError, match="canvas of this command: got '', wanted 'robotwin'"):
        make_latents(command(model, [dataset], store, canvas="", camera="cam_high"))


def test_a_store_from_before_says_what_to_do_and_gets_its_actions(
    model: Path, dataset: Path, store: Path, tmp_path: Path
) -> None:
    import shutil

    old = tmp_path / "old"
    shutil.copytree(store, old)
    shutil.rmtree(old / "actions")
    lines = [json.loads(line) for line in (old / "windows.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("actions")
    (old / "windows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DatasetError, match="physis data latents again adds them"):
        policy_bank(opened(old)[0])
    again = command(model, [dataset], old)
    again.text_cache = str(store.parent / "text")
    assert make_latents(again)["computed"] == 0
    assert (old / "windows.jsonl").read_text() == (store / "windows.jsonl").read_text()
    damaged = next((old / "actions").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(DatasetError, match="checksum"):
        policy_bank(opened(old)[0])


def small(lengths: list[int], *, column: bool) -> tuple[WindowBank, list[Episode]]:
    """Windows of the small models, of episodes with a column of actions that are no states, or without one."""
    draw = np.random.default_rng(0)
    episodes = [
        Episode(
            frames=np.zeros((0, 120, 160, 3), np.uint8), states_TA=draw.normal(size=(length, 14)).astype(np.float32),
            actions_TA=draw.normal(size=(length, 14)).astype(np.float32) if column else None,
            instruction="go", task="t", index=place, seed=place, success=True,
        )
        for place, length in enumerate(lengths)
    ]  # fmt: skip
    bank = tiny_training.bank(0)
    bank.table = WindowTable.build(lengths, 8)
    assert len(bank.table) <= len(bank.latents_WCFhw)
    return bank, episodes


@pytest.mark.parametrize("column", [True, False])
def test_small_models_read_the_column_where_there_is_one(column: bool) -> None:
    """Episodes of one step, of less than a window, and of more."""
    bank, episodes = small([1, 21, 60], column=column)
    bank.targets = None
    made = PolicyBank.of(bank, episodes, episode_statistics(episodes, "zscore"), 32)
    found = made.batch(torch.arange(len(bank.table)))
    for row, (place, start) in enumerate(zip(bank.table.episode_W.tolist(), bank.table.start_W.tolist(), strict=True)):
        item = episodes[place]
        rows = np.minimum(start + np.arange(32), max(item.length - 2, 0))
        wanted = (
            item.actions_TA[rows]
            if item.actions_TA is not None
            else item.states_TA[np.minimum(rows + 1, item.length - 1)]
        )
        back = made.statistics.action.denormalise(found["actions_BPA"][row])
        torch.testing.assert_close(back, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)
        assert int(found["action_valid_BP"][row].sum()) == min(32, item.length - 1 - start)
        shown = [[2 * (4 * k - 3 + n) for n in range(4)] if k else [0] for k in range(3)]
        assert found["frame_valid_BF"][row].tolist() == [any(start + s < item.length for s in some) for some in shown]
    assert made.fingerprint is None and torch.equal(found["proprioception_BKA"], bank.proprioception_WKA[: len(bank)])
    assert made.statistics.steps == 0 + 20 + 59


def ours(folder: Path, tasks: tuple[str, ...] = ("t",), fps: float = 50 / 3) -> Path:
    """What our recorder writes of a head camera: 12 rows an episode."""
    draw = np.random.default_rng(4)
    drawn = np.zeros((240, 320, 3), np.uint8)
    recorder = EpisodeRecorder(ground_truth="none", cameras=("head",))
    env = SimpleNamespace(success=True)
    writer = LeRobotWriter(folder, robot_features([f"j{k}" for k in range(14)], fps=fps), robot_type="drawn", fps=fps)
    for _ in range(12):
        state = draw.normal(size=14).astype(np.float32)
        recorder.frame(env, {"head_rgb": drawn, "state": state, "state_measured": state, "instruction": "go"})
    for seed, task in enumerate(tasks):
        writer.add_episode(
            columns=recorder.columns(), frames={"observation.images.head": np.stack(recorder.images["head"])}, instruction="go",
            task_name=task, seed=seed, success=True, scene_hash="", policy="", embodiment="", assets_version="",
        )  # fmt: skip
    writer.finalize()
    return folder


def test_our_recordings_have_the_next_state_as_action(tmp_path: Path) -> None:
    """So that the small models' statistics and chunks are the same, bit for bit, by the column and by the states."""
    (episode,) = read_episodes([ours(tmp_path / "ours")], success_only=False)
    assert episode.actions_TA is not None and len(episode.actions_TA) == 12
    assert np.array_equal(episode.actions_TA[:-1], episode.states_TA[1:])
    by_states = episode_statistics([dataclasses.replace(episode, actions_TA=None)], "zscore")
    assert episode_statistics([episode], "zscore").difference(by_states) is None


def test_the_small_models_have_one_rate(tmp_path: Path) -> None:
    """Their windows and chunks are counted in steps of 0.06 s, whatever is given beside them. Rates are rounded in others' datasets."""
    rounded, other = ours(tmp_path / "rounded", fps=16.67), ours(tmp_path / "other", fps=30.0)
    assert len(read_episodes([ours(tmp_path / "ours"), rounded], success_only=True)) == 2
    config = TrainPolicyConfig()
    config.data.roots = [str(rounded), str(other)]
    with pytest.raises(
        DatasetError, match=r"rate of .*other: got '30 rows a second', wanted 16\.67, the one rate of the"
    ):
        prepare_policy_banks(config, CPU)


def test_it_is_said_how_many_episodes_of_other_tasks_are_left_out(tmp_path: Path, capsys) -> None:
    roots = [ours(tmp_path / "one", ("bell", "cup", "lid")), ours(tmp_path / "two", ("cup", "bell"))]
    assert len(read_episodes(roots, success_only=True, tasks=["bell"])) == 2
    said = "data.roots: left out, 3 episodes of 2 other tasks (cup, lid); data.tasks=[] takes all\n"
    assert capsys.readouterr() == ("", said)
    read_episodes(roots, success_only=True, tasks=["bell"], quiet=True)
    assert len(read_episodes(roots, success_only=True)) == 5 and capsys.readouterr() == ("", "")
