"""The latent decoder learns from demonstrations, decodes latents and refuses those it cannot read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import InverseDynamics
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.decoder_fit import FitConfig
from physisforcing.planner.latent_decoder import LatentInverseDynamics, save_latent_decoder
from physisforcing.planner.latent_training import LatentBatches, LatentTrainConfig, train_latent_decoder
from toy_decoders import LATENT, latent_rollout


@pytest.fixture(scope="module")
def latent(frozen, tmp_path_factory):
    fit = FitConfig(steps=220, batch=24, lr=4e-3, ema=0.95, beta2=0.99, weight_decay=0.0, log_every=100)
    config = LatentTrainConfig(
        model=LATENT, fit=fit, validation_windows=24, validation_share=0.2, latent_noise=0.05, denoised_sigma=0.3
    )
    return train_latent_decoder(config, frozen, folder=tmp_path_factory.mktemp("latent"))


def test_the_latent_decoder_reads_motion(latent):
    _, metrics = latent
    for place in ("start", "anywhere"):
        assert metrics[place]["real"]["joint_deg"] < 0.75 * metrics[place]["hold"]["joint_deg"]
        assert metrics[place]["real"]["joint_deg"] < 0.85 * metrics[place]["frozen"]["joint_deg"]
        assert metrics[place]["denoised"]["joint_deg"] < metrics[place]["hold"]["joint_deg"]
        assert metrics[place]["real_measured"]["joint_deg"] > 0
        assert 0 < metrics[place]["drive_measured"]["joint_deg"] < metrics[place]["hold"]["joint_deg"]
        assert set(metrics["spread_deg"][place]) == {"real", "denoised"}


def test_latent_decode(latent, frozen, tmp_path):
    model, _ = latent
    assert isinstance(model, InverseDynamics) and model.needs.returns == {"latents"}
    rollout, state = latent_rollout(frozen)
    chunks = model.decode(rollout, state, ["a", "b"])
    assert chunks[1][1].actions_PA.shape == (16, 14) and (chunks[1][1].spread_P > 0).all()
    one = dataclasses.replace(rollout, latents_BSCFhw=rollout.latents_BSCFhw[1:, 1:])
    alone = model.decode(one, state[1:], ["b"])[0][0]
    assert np.array_equal(alone.actions_PA, chunks[1][1].actions_PA)
    with torch.no_grad():
        targets = model(torch.from_numpy(rollout.latents_BSCFhw[:, 0]), torch.from_numpy(state))[0].numpy()
    np.testing.assert_allclose(targets[0, :, 0], chunks[0][0].actions_PA[:, 0], atol=1e-5)
    loaded = load_decoder(save_latent_decoder(model, tmp_path))
    assert isinstance(loaded, LatentInverseDynamics) and loaded.fingerprint != "untrained"
    again = loaded.decode(rollout, state, ["a", "b"])[0][0]
    assert np.abs(again.actions_PA - chunks[0][0].actions_PA).max() < 0.02


def test_latents_it_cannot_read_are_errors(latent, frozen):
    model, (rollout, state) = latent[0], latent_rollout(frozen)
    with pytest.raises(MissingCapabilityError, match="no latents"):
        model.decode(dataclasses.replace(rollout, latents_BSCFhw=None), state, ["a", "b"])
    with pytest.raises(MissingCapabilityError, match="codec"):
        model.decode(dataclasses.replace(rollout, latents_BSCFhw=rollout.latents_BSCFhw[:, :, :3]), state, ["a", "b"])
    with pytest.raises(MissingCapabilityError, match="frame_dt"):
        model.decode(dataclasses.replace(rollout, times_T=rollout.times_T / 2), state, ["a", "b"])
    with pytest.raises(UserError, match="state_BA"):
        model.decode(rollout, state[:1], ["a", "b"])
    with pytest.raises(UserError, match="decoder=latent"):
        LatentInverseDynamics(LATENT).decode(rollout, state, ["a", "b"])


def test_batches_of_latents(frozen):
    config = LatentTrainConfig(
        model=LATENT, fit=FitConfig(batch=6), denoised_share=0.5, denoised_sigma=0.9, latent_noise=0.3
    )
    batches = LatentBatches(config, frozen, torch.arange(4))
    latents, now, targets = batches.draw(torch.Generator().manual_seed(0))
    places = frozen.windows.store.draw(
        6, allowed_E=torch.arange(4), start_share=config.start_share, generator=torch.Generator().manual_seed(0)
    )
    real = batches.real(*places)
    changed = (latents - real).abs().amax(dim=(1, 3, 4))
    assert (changed[:, 0] == 0).all(), "frame 0 is the encoded picture"
    assert (changed[:, 1:] > 0.01).all() and changed[3:].max() < 1.5
    assert torch.equal(now, frozen.windows.rows(*places)[:, 0]) and targets.shape == (6, 16, 14)
    with pytest.raises(UserError, match="denoised_share"):
        train_latent_decoder(dataclasses.replace(config, denoised_share=2.0), frozen, folder=None)
