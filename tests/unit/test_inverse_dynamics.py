"""The decoder reads motion out of pictures, keeps its statistics with its weights and refuses what it was not trained for."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.types import DT, FPS, Rollout
from physisforcing.planner.frame_store import (
    episode_counts,
    load_frame_store,
    make_store,
    split_by_seed,
    split_episodes,
    unreached,
)
from physisforcing.planner.idm_training import (
    IdmTrainConfig,
    augment,
    evaluate_decoder,
    loss_terms,
    statistics,
    train_inverse_dynamics,
)
from physisforcing.planner.inverse_dynamics import (
    InverseDynamicsConfig,
    PixelInverseDynamics,
    chunk_errors,
    load_inverse_dynamics,
    save_inverse_dynamics,
)
from physisforcing.planner.roundtrip import RoundTripPool, round_trip

SMALL = InverseDynamicsConfig(
    frames=5,
    height=24,
    width=32,
    channels=(16, 16),
    blocks=(1, 1),
    keypoints=4,
    flat_channels=2,
    dim=48,
    layers=1,
    heads=2,
)


class ExactCodec:
    """A codec without loss: latents are the pictures themselves. Stands in for the autoencoder where only plumbing is tested."""

    latent_channels = 3

    def encode(self, frames_BTHWC):
        return frames_BTHWC.movedim(-1, 1).float() / 127.5 - 1

    def decode(self, latents_BCFhw):
        return latents_BCFhw.movedim(1, -1) * 0.5 + 0.5


def drawn_demonstrations(episodes=48, length=12, seed=0, first_seed=0):
    """Two joints move a bright square each (x and y); the other joints stay."""
    rng = np.random.default_rng(seed)
    frames, states = [], []
    for _ in range(episodes):
        start, goal = rng.uniform(-1, 1, (2, 2))
        path = start + (goal - start) * (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, length)))[:, None]
        state = np.zeros((length, 14), np.float32)
        state[:, 0], state[:, 6] = path[:, 0], 0.5 + 0.5 * path[:, 1]
        ys, xs = np.mgrid[0:24, 0:32]
        x, y = 16 + 10 * path[:, 0, None, None], 12 + 7 * path[:, 1, None, None]
        blob = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 8)
        frames.append(np.repeat((40 + 200 * blob)[..., None], 3, -1).astype(np.uint8))
        states.append(state)
    return make_store(
        np.concatenate(frames),
        np.concatenate(states),
        [length] * episodes,
        list(range(first_seed, first_seed + episodes)),
    )


@pytest.fixture(scope="module")
def trained():
    config = IdmTrainConfig(
        model=SMALL, steps=400, batch=16, lr=2e-3, warmup=20, ema=0.98, roundtrip_pool=32, roundtrip_refresh=2,
        latent_noise=0.02, validation_share=0.2, validation_windows=32, log_every=1, augment_share=0.3,
    )  # fmt: skip
    rows = []
    model, metrics = train_inverse_dynamics(config, drawn_demonstrations(), ExactCodec(), log=rows.append)
    return config, model, metrics, rows


def test_training_reads_motion_from_pictures(trained):
    _, _, metrics, rows = trained
    start = metrics["start"]
    assert start["real"]["joint_deg"] < 0.4 * start["hold"]["joint_deg"]
    assert start["real"]["joint_deg"] < 0.6 * start["frozen"]["joint_deg"]
    assert start["roundtrip"]["joint_deg"] < 0.4 * start["hold"]["joint_deg"]
    assert start["real"]["gripper_percent"] < 0.4 * start["hold"]["gripper_percent"]
    steps = [row for row in rows if "step" in row]
    assert {"loss_fit", "loss_spread", "grad_norm", "lr", "step_ms", "windows_s", "eta_s"} <= set(steps[-1])
    assert np.mean([r["loss_fit"] for r in steps[-20:]]) < 0.4 * np.mean([r["loss_fit"] for r in steps[:5]])
    assert steps[-1]["lr"] < 1e-5 < steps[20]["lr"]


def test_training_goes_on_from_trained_weights(trained):
    """One step of no size leaves weights and normalisation as they were, though the demonstrations are others."""
    config, model, _, _ = trained
    short = dataclasses.replace(config, steps=1, lr=0.0, weight_decay=0.0, validation_windows=4, roundtrip_share=0.0)
    again, metrics = train_inverse_dynamics(short, drawn_demonstrations(seed=7), None, init=model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert metrics["start"]["real"]["joint_deg"] < 0.5 * metrics["start"]["hold"]["joint_deg"]
    other = dataclasses.replace(short, model=dataclasses.replace(SMALL, dim=2 * SMALL.dim))
    with pytest.raises(UserError, match=r"init.*other sizes"):
        train_inverse_dynamics(other, drawn_demonstrations(seed=7), None, init=model)


def test_spread_grows_where_pictures_say_nothing(trained):
    _, model, _, _ = trained
    store = drawn_demonstrations(seed=5)
    frames, now, _ = store.windows(torch.arange(12), torch.zeros(12, dtype=torch.long), frames=5, stride=2)
    times = np.arange(5) * 2 * DT
    seen = model.decode_frames(frames.numpy(), times, now.numpy())
    black = model.decode_frames(np.zeros_like(frames.numpy()), times, now.numpy())
    assert seen[0].actions_PA.shape == (8, 14) and seen[0].spread_P.shape == (8,)
    assert np.mean([c.spread_P for c in black]) > np.mean([c.spread_P for c in seen])
    grippers = np.stack([c.actions_PA for c in seen])[..., [6, 13]]
    assert grippers.min() >= 0 and grippers.max() <= 1


def test_saved_weights_load_to_the_same_decoder(trained, tmp_path):
    _, model, _, _ = trained
    folder = save_inverse_dynamics(model, tmp_path / "idm", card="# card\n")
    loaded = load_inverse_dynamics(folder)
    store = drawn_demonstrations(episodes=3, seed=1)
    frames, now, _ = store.windows(torch.arange(3), torch.zeros(3, dtype=torch.long), frames=5, stride=2)
    times = np.arange(5) * 2 * DT
    before = np.stack([c.actions_PA for c in model.decode_frames(frames.numpy(), times, now.numpy())])
    after = np.stack([c.actions_PA for c in loaded.decode_frames(frames.numpy(), times, now.numpy())])
    assert np.abs(before - after).max() < 0.02  # float16 weights
    assert len(loaded.fingerprint) == 16
    alone = loaded.decode_frames(frames[1:2].numpy(), times, now[1:2].numpy())[0].actions_PA
    assert np.array_equal(alone, after[1]), "an answer does not depend on its neighbours in the batch"


def test_candidates_decode_alike_alone_and_among_others(trained):
    _, model, _, _ = trained
    frames, now, _ = drawn_demonstrations(episodes=6, seed=2).windows(
        torch.arange(6), torch.zeros(6, dtype=torch.long), frames=5, stride=2
    )
    both = frames.numpy().reshape(2, 3, 1, *frames.shape[1:])
    rollout = Rollout(times_T=np.arange(5) * 2 * DT, frames_BSVTHWC=both)
    together = model.decode(rollout, now[:2].numpy())
    for b in range(2):
        for s in range(3):
            one = Rollout(times_T=rollout.times_T, frames_BSVTHWC=both[b : b + 1, s : s + 1])
            alone = model.decode(one, now[b : b + 1].numpy())[0][0]
            assert np.array_equal(alone.actions_PA, together[b][s].actions_PA)
            assert np.array_equal(alone.spread_P, together[b][s].spread_P)


def test_missing_statistics_are_an_error(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    _, model, _, _ = trained
    folder = save_inverse_dynamics(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["state_mean_A"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="state_mean_A"):
        load_inverse_dynamics(folder)
    with pytest.raises(UserError, match=r"config\.json"):
        load_inverse_dynamics(tmp_path / "nowhere")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"wings": 2}))
    with pytest.raises(UserError, match="wings"):
        load_inverse_dynamics(folder)
    with pytest.raises(UserError, match="statistics"):
        PixelInverseDynamics(SMALL).decode_frames(
            np.zeros((1, 5, 24, 32, 3), np.uint8), np.arange(5) * 0.12, np.zeros((1, 14))
        )


@pytest.mark.parametrize(
    ("frames", "times", "state", "error"),
    [
        (np.zeros((1, 4, 24, 32, 3), np.uint8), np.arange(4) * 0.12, np.zeros((1, 14)), MissingCapabilityError),
        (np.zeros((1, 5, 24, 32, 3), np.float32), np.arange(5) * 0.12, np.zeros((1, 14)), MissingCapabilityError),
        (np.zeros((1, 5, 24, 32, 3), np.uint8), np.arange(5) * 0.24, np.zeros((1, 14)), MissingCapabilityError),
        (np.zeros((1, 5, 24, 32, 3), np.uint8), np.arange(5) * 0.12, np.full((1, 14), np.nan), UserError),
        (np.zeros((1, 5, 24, 32, 3), np.uint8), np.arange(5) * 0.12, np.zeros((1, 7)), UserError),
    ],
)
def test_decode_refuses_other_geometry(trained, frames, times, state, error):
    with pytest.raises(error):
        trained[1].decode_frames(frames, times, state)


def test_shipped_size():
    count = sum(p.numel() for p in PixelInverseDynamics().parameters())
    assert 2.0e6 < count < 3.0e6  # float16 on disk: below 6 MB
    assert InverseDynamicsConfig().chunk == 32


def test_windows_repeat_the_last_row():
    store = drawn_demonstrations(episodes=2, length=10)
    frames, now, targets = store.windows(torch.tensor([1, 0]), torch.tensor([7, 0]), frames=5, stride=2)
    assert torch.equal(now, store.states_NA[[17, 0]])
    assert torch.equal(targets[0], store.states_NA[[18, 19, 19, 19, 19, 19, 19, 19]])
    assert torch.equal(frames[0], store.frames_NHWC[[17, 19, 19, 19, 19]])
    assert torch.equal(targets[1], store.states_NA[1:9])
    assert torch.equal(frames[1], store.frames_NHWC[[0, 2, 4, 6, 8]])


def test_evaluation_seeds_are_refused(tmp_path):
    store = drawn_demonstrations(episodes=2, first_seed=100_000)
    with pytest.raises(UserError, match="100000"):
        train_inverse_dynamics(IdmTrainConfig(model=SMALL, steps=1, batch=2), store, ExactCodec())
    with pytest.raises(UserError, match="codec"):
        train_inverse_dynamics(IdmTrainConfig(model=SMALL), drawn_demonstrations(episodes=2), None)


def test_split_is_by_seed_and_stable():
    seeds = [*range(1000), 50_003, 51_000]
    held = split_by_seed(seeds, share=0.05)
    assert held[-2:].all() and 20 < held[:1000].sum() < 90
    assert (split_by_seed(seeds[::-1], share=0.05)[::-1] == held).all()


def test_episodes_whose_arm_does_not_follow_are_left_out_and_counted():
    store = drawn_demonstrations(episodes=40)
    store.measured_NA = store.states_NA.clone()
    far, near, grip = (int(store.first_E[e]) + 3 for e in (7, 8, 9))
    store.measured_NA[far, 12] -= np.deg2rad(10.5)
    store.measured_NA[near, 12] -= np.deg2rad(9.5)
    store.measured_NA[grip, 13] += 1.0  # a gripper that closed on something
    assert unreached(store).nonzero()[0].tolist() == [7]
    train_E, validation_E = split_episodes(store, share=0.1)
    assert sorted([*train_E.tolist(), *validation_E.tolist()]) == [e for e in range(40) if e != 7]
    assert episode_counts(store, train_E, validation_E) == {
        "train": len(train_E),
        "validation": 39 - len(train_E),
        "left_out": 1,
    }
    store.measured_NA[:, 0] += 1.0
    with pytest.raises(UserError, match="arms reach"):
        split_episodes(store, share=0.1)
    store.measured_NA = None
    assert not unreached(store).any()


def test_round_trip_and_pool():
    store = drawn_demonstrations(episodes=4)
    generator = torch.Generator().manual_seed(0)
    frames, _, _ = store.windows(torch.arange(2), torch.zeros(2, dtype=torch.long), frames=5, stride=2)
    assert torch.equal(round_trip(ExactCodec(), frames, latent_noise=0.0, generator=generator), frames)
    noisy = round_trip(ExactCodec(), frames, latent_noise=0.2, generator=generator)
    assert 0.5 < (noisy.float() - frames.float()).abs().mean() < 15
    pool = RoundTripPool(
        store, ExactCodec(), size=5, allowed_E=torch.arange(4), frames=5, stride=2, start_share=0.0, latent_noise=0.0,
        generator=generator, batch=2,
    )  # fmt: skip
    before = pool.now.clone()
    pool.refresh(2)
    assert pool.position == 2 and torch.equal(pool.now[2:], before[2:])
    assert [t.shape[0] for t in pool.draw(7)] == [7, 7, 7]


def test_augmentation_keeps_type_and_is_bounded():
    frames = drawn_demonstrations(episodes=6).frames_NHWC.reshape(6, 12, 24, 32, 3)[:, :5]
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augment(frames, share=0.0, generator=generator), frames)
    changed = augment(frames, share=1.0, generator=generator)
    assert changed.dtype == torch.uint8
    assert 1 < (changed.float() - frames.float()).abs().mean() < 20


def test_loss_weighs_every_element_alike():
    scale = torch.full((14,), 0.1)
    scale[6] = 0.4
    target = torch.zeros(1, 8, 14)
    joint, gripper = torch.zeros(1, 8, 14), torch.zeros(1, 8, 14)
    joint[..., 0], gripper[..., 6] = 0.1, 0.4  # one scale each
    zero = torch.zeros(1, 8, 14)
    assert loss_terms(joint, zero, target, scale, beta=0.05)[0] == pytest.approx(
        loss_terms(gripper, zero, target, scale, beta=0.05)[0].item()
    )
    mean = torch.zeros(1, 8, 14, requires_grad=True)
    _, likelihood = loss_terms(mean, zero.requires_grad_(), target + 0.1, scale, beta=0.05)
    likelihood.backward()
    assert mean.grad is None and zero.grad.abs().sum() > 0


def test_statistics_have_a_floor_and_use_allowed_episodes_only():
    store = drawn_demonstrations(episodes=4)
    mean, std, delta = statistics(store, torch.tensor([0, 2]), chunk=8, floor=0.05)
    rows = torch.cat([store.states_NA[:12], store.states_NA[24:36]])
    torch.testing.assert_close(mean, rows.mean(0))
    assert delta[1] == pytest.approx(0.05) and std[1] == pytest.approx(0.05) and delta[0] > 0.1


def test_chunk_errors_in_degrees():
    target = np.zeros((2, 8, 14))
    predicted = target.copy()
    predicted[:, 4:, 0] = np.radians(6.0)
    predicted[..., 13] = 0.02
    errors = chunk_errors(predicted, target)
    assert errors["joint_deg"] == pytest.approx(6.0 * np.sqrt(0.5 / 12))
    assert errors["gripper_percent"] == pytest.approx(2.0 / np.sqrt(2))
    assert errors["joint_deg_rows_1_2"] == 0 and errors["joint_deg_rows_7_8"] == pytest.approx(6.0 / np.sqrt(12))


def test_evaluation_is_repeatable(trained):
    _, model, _, _ = trained
    store = drawn_demonstrations(episodes=4, seed=9)
    pair = [
        evaluate_decoder(model, store, ExactCodec(), allowed_E=torch.arange(4), windows=8, seed=3) for _ in range(2)
    ]
    assert pair[0] == pair[1]


def test_every_episode_start_is_measured_once(trained):
    from physisforcing.planner.train import TrainIdmCommand, model_card

    _, model, _, _ = trained
    store = drawn_demonstrations(episodes=6, seed=9)
    allowed = torch.tensor([1, 3, 4])
    found = evaluate_decoder(model, store, None, allowed_E=allowed, windows=8, seed=3)
    assert found["windows"] == {"start": 3, "anywhere": 8}
    frames, now, targets = store.windows(allowed, torch.zeros_like(allowed), frames=5, stride=2)
    with torch.no_grad():
        assert found["start"]["real"] == chunk_errors(model(frames, now)[0].numpy(), targets.numpy())
    about = {"steps": 1, "parameters": 1e6, "episodes": {"train": 3, "validation": 3, "left_out": 2}}
    about |= {"hardware": "cpu", "torch": "2", "train_seconds": 1.0}
    card = model_card(TrainIdmCommand(data=[]), found | about)
    assert (
        "2 left out" in card
        and "each of the 3 validation episodes once" in card
        and "8 windows at random frames" in card
    )


def test_dataset_with_evaluation_seeds_is_refused(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import physisforcing.core.lerobot as lerobot

    fake = SimpleNamespace(root=tmp_path, fps=FPS, episodes=[SimpleNamespace(seed=100_003, index=0, length=5)])
    monkeypatch.setattr(lerobot, "LeRobotDataset", lambda root: fake)
    with pytest.raises(UserError, match="100003"):
        load_frame_store([tmp_path], height=120, width=160)
    fake.fps = 30.0
    with pytest.raises(DatasetError, match=r"rate of .*got '30 rows a second', wanted 16\.67"):
        load_frame_store([tmp_path], height=120, width=160)
