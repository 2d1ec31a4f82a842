"""Noising, loss and sampler against their definitions and against diffusers."""

import numpy as np
import pytest
import torch

from physisforcing.worldmodel.flow_matching import (
    FlowMatchingConfig,
    add_noise,
    euler_sample,
    flow_matching_loss,
    frame_timesteps,
    motion_weights,
    sample_train_sigma,
    sampling_sigmas,
    shift_sigma,
)


def latents(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 3, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_shift_keeps_the_ends_and_wan_schedule():
    assert shift_sigma(torch.tensor([0.0, 1.0]), 5.0).tolist() == [0.0, 1.0]
    wanted = [1000, 961.538, 909.091, 833.333, 714.286, 500, 0]
    np.testing.assert_allclose(1000 * sampling_sigmas(6, 5.0).numpy(), wanted, atol=1e-3)


def test_noise_pins_the_first_frame_and_interpolates():
    x0, noise, sigma = latents(0), latents(1), torch.tensor([0.25, 1.0])
    noisy = add_noise(x0, noise, sigma)
    assert torch.equal(noisy[:, :, 0], x0[:, :, 0])
    assert torch.allclose(noisy[0, :, 1:], 0.75 * x0[0, :, 1:] + 0.25 * noise[0, :, 1:])
    assert torch.equal(noisy[1, :, 1:], noise[1, :, 1:])
    assert frame_timesteps(sigma, 3).tolist() == [[0, 250, 250], [0, 1000, 1000]]


def test_loss_ignores_the_first_frame_and_is_zero_for_the_truth():
    x0, noise = latents(0), latents(1)
    config = FlowMatchingConfig()
    velocity = noise - x0
    velocity[:, :, 0] = 99.0
    assert flow_matching_loss(velocity, x0, noise, config).item() == 0.0
    off = velocity.clone()
    off[:, :, 1:] += 2.0
    # A constant error has the same mean under any normalised weights.
    for weight in (0.0, 2.0):
        assert flow_matching_loss(off, x0, noise, FlowMatchingConfig(motion_weight=weight)).item() == pytest.approx(4.0)


def test_motion_weights_grow_with_the_difference_and_stop_at_the_cap():
    x0 = torch.zeros(1, 1, 3, 1, 1)
    x0[0, 0, 1], x0[0, 0, 2] = 0.5, 10.0
    assert motion_weights(x0, 2.0, 2.0).flatten().tolist() == [1.0, 2.0, 5.0]


def test_training_sigmas_follow_the_shifted_uniform():
    sigma = sample_train_sigma(20_000, 3.0, torch.Generator().manual_seed(0))
    assert sigma.min() > 0 and sigma.max() <= 1
    # P(sigma <= s) = s / (shift - (shift - 1) s)
    for level in (0.25, 0.5, 0.75):
        assert (sigma <= level).float().mean().item() == pytest.approx(level / (3 - 2 * level), abs=0.01)


def test_sampler_is_exact_for_a_straight_path():
    x0, noise = latents(2), latents(3)
    for steps in (1, 4):
        out = euler_sample(lambda x, t: noise - x0, x0[:, :, :1], noise, steps=steps, shift=3.0)
        torch.testing.assert_close(out, x0, atol=1e-5, rtol=0)


def test_sampler_agrees_with_diffusers_euler():
    diffusers = pytest.importorskip("diffusers")
    steps, shift = 5, 3.0
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(4)) * 0.3
    first, noise = latents(5)[:, :, :1], latents(6)

    def velocity(x, timesteps):
        return torch.einsum("dc,bcfhw->bdfhw", weight, x) * (1 + timesteps[:, None, :, None, None] / 1000)

    ours = euler_sample(velocity, first, noise, steps=steps, shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    x = torch.cat([first, noise[:, :, 1:]], dim=2)
    for t in scheduler.timesteps:
        x = torch.cat([first, x[:, :, 1:]], dim=2)
        frames = torch.cat([torch.zeros(2, 1), t.expand(2, 2)], dim=1)
        x = scheduler.step(velocity(x, frames), t, x, return_dict=False)[0]
    torch.testing.assert_close(ours[:, :, 1:], x[:, :, 1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[:, :, :1], first)
