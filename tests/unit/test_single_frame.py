"""The single-frame decoder learns the pose in a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from physisforcing.core.types import DT, Rollout
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.frame_store import split_episodes
from physisforcing.planner.idm_training import IdmTrainConfig, train_inverse_dynamics
from physisforcing.planner.inverse_dynamics import InverseDynamicsConfig
from physisforcing.planner.single_frame import SingleFrameInverseDynamics, between, save_single_frame_decoder
from toy_decoders import HEIGHT, WIDTH, demonstrations


@pytest.fixture(scope="module")
def single():
    size = InverseDynamicsConfig(
        frames=5, height=HEIGHT, width=WIDTH, channels=(16, 16), blocks=(1, 1), keypoints=4, flat_channels=2, dim=48
    )
    config = IdmTrainConfig(
        model=size, steps=200, batch=16, lr=3e-3, warmup=10, ema=0.97, roundtrip_share=0.0, validation_windows=16
    )
    return train_inverse_dynamics(config, demonstrations(), None, build=SingleFrameInverseDynamics)


def test_the_single_frame_decoder_reads_poses(single, tmp_path):
    model, metrics = single
    for place in ("start", "anywhere"):
        assert set(metrics[place]) == {"real", "frozen", "hold", "real_measured", "drive_measured"}
    # by hand: the toy's joints are a step behind, every held-out episode once
    whole, (_, held_out) = demonstrations(), split_episodes(demonstrations(), share=0.05)
    steps = [whole.states_NA[e * 24 : e * 24 + 9, :6].diff(dim=0) for e in held_out.tolist()]
    lag = np.degrees(np.sqrt((torch.stack(steps).numpy() ** 2).sum() / (len(steps) * 8 * 12)))
    assert metrics["start"]["drive_measured"]["joint_deg"] == pytest.approx(lag, rel=1e-4)
    assert metrics["start"]["real_measured"]["joint_deg"] != metrics["start"]["real"]["joint_deg"]
    assert metrics["anywhere"]["real"]["joint_deg"] < 0.4 * metrics["anywhere"]["hold"]["joint_deg"]
    store = demonstrations(seed=1)
    frames, state, targets = store.windows(torch.tensor([0]), torch.tensor([4]), frames=5, stride=2)
    with torch.no_grad():
        plain = model(frames, state)[0]
        assert torch.equal(plain, model(frames, state + 1)[0]), "present joints are not read"
        order = torch.tensor([4, 3, 2, 1, 0])
        poses, reversed_poses = model.poses(frames)[0], model.poses(frames[:, order])[0]
        torch.testing.assert_close(poses[:, order], reversed_poses, atol=1e-5, rtol=1e-5)
    assert plain.shape == targets.shape
    rollout = Rollout(times_T=np.arange(5) * 2 * DT, frames_BSVTHWC=frames.numpy()[:, None, None])
    loaded = load_decoder(save_single_frame_decoder(model, tmp_path))
    assert isinstance(loaded, SingleFrameInverseDynamics)
    chunk = loaded.decode(rollout, state.numpy(), ["x"])[0][0]
    np.testing.assert_allclose(chunk.actions_PA[:, :6], plain[0, :, :6], atol=0.02)
    assert (chunk.spread_P > 0).all()


def test_between_is_linear():
    values = torch.tensor([[[0.0], [2.0], [6.0]]])
    assert between(values, 2)[0, :, 0].tolist() == [1.0, 2.0, 4.0, 6.0]
    assert between(values, 1)[0, :, 0].tolist() == [2.0, 6.0]
