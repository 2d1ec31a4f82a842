"""Noise levels, samplers, guidance and the change of experts, with velocities whose end is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.sampling import Experts, SamplerConfig, make_scheduler, sample, seed_noise


def test_noise_levels_are_those_of_wan():
    euler = make_scheduler(SamplerConfig(sampler="euler", steps=6, shift=5.0))
    wanted = [1000.0, 961.538, 909.091, 833.333, 714.286, 500.0]
    np.testing.assert_allclose(euler.timesteps.numpy(), wanted, atol=1e-3)
    assert euler.sigmas[-1] == 0.0 and len(euler.sigmas) == 7
    unipc = make_scheduler(SamplerConfig(sampler="unipc", steps=6, shift=5.0))
    assert unipc.timesteps.tolist() == [999, 961, 909, 833, 714, 501]
    assert unipc.sigmas[-1] == 0.0
    high = make_scheduler(SamplerConfig(sampler="unipc", steps=40, shift=5.0)).timesteps >= 900
    assert int(high.sum()) == 15, "of 40 steps, those of the high-noise expert"


def test_a_folders_karras_levels_do_not_hide_the_shift():
    import diffusers

    folder = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.147,
        flow_shift=1.0, solver_order=3,
    )  # fmt: skip
    for shift in (3.0, 10.0):
        config = SamplerConfig(sampler="unipc", steps=6, shift=shift)
        used, plain = make_scheduler(config, folder), make_scheduler(config)
        assert torch.equal(used.timesteps, plain.timesteps) and torch.equal(used.sigmas, plain.sigmas)
        assert used.config.solver_order == 3, "what is not about levels stays the folder's"


class Straight(torch.nn.Module):
    """The velocity that leads from everywhere to one value; notes who was asked at which level."""

    first_latent = "mask"

    def __init__(self, name: str, target: float, calls: list[tuple[str, float, float]]) -> None:
        super().__init__()
        self.name, self.target, self.calls = name, target, calls

    def forward(self, x, sigma, text, conditions):
        self.calls.append((self.name, float(text), round(float(sigma), 3)))
        return (x - self.target * text) / sigma.float().view(-1, 1, 1, 1, 1), None


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_samplers_reach_the_target_and_guidance_extrapolates(sampler):
    calls: list[tuple[str, float, float]] = []
    one = Experts(high=Straight("high", 0.5, calls))
    noise, yes, no = seed_noise(0, (1, 2, 2, 2)), (torch.tensor(1.0), {}), (torch.tensor(0.0), {})
    plain = sample(one, SamplerConfig(sampler=sampler, steps=5, guidance=1.0), noise, yes)
    near = (
        1e-4 if sampler == "euler" else 1e-2
    )  # UniPC's timesteps are cut to whole numbers: 999 for a level of 0.999999
    torch.testing.assert_close(plain, torch.full_like(noise, 0.5), atol=near, rtol=0)
    assert len(calls) == 5, "guidance 1 needs one pass a step"
    guided = sample(one, SamplerConfig(sampler=sampler, steps=5, guidance=3.0), noise, yes, no)
    torch.testing.assert_close(guided, torch.full_like(noise, 1.5), atol=3 * near, rtol=0)
    with pytest.raises(UserError, match="negative"):
        sample(one, SamplerConfig(sampler=sampler, steps=2, guidance=3.0), noise, yes)


def test_experts_change_at_the_boundary_and_each_has_its_guidance():
    calls: list[tuple[str, float, float]] = []
    placed: list[str] = []

    class Place:
        def __init__(self, backbone: Any) -> None:
            placed.append(backbone.name)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    two = Experts(high=Straight("high", 0.0, calls), low=Straight("low", 0.0, calls))
    config = SamplerConfig(sampler="euler", steps=6, shift=5.0, guidance=2.0, guidance_low=1.0)
    ticks = []
    noise, yes, no = seed_noise(0, (1, 2, 2, 2)), (torch.tensor(1.0), {}), (torch.tensor(0.0), {})
    sample(two, config, noise, yes, no, place=Place, advance=lambda: ticks.append(1))
    assert [(name, text) for name, text, _ in calls] == [("high", 1.0), ("high", 0.0)] * 3 + [("low", 1.0)] * 3
    assert [level for _, _, level in calls] == [1.0, 1.0, 0.962, 0.962, 0.909, 0.909, 0.833, 0.714, 0.5]
    assert placed == ["high", "low"] and len(ticks) == 6
    assert two.at(900.0)[0] == "high" and two.at(899.9)[0] == "low"


def test_experts_that_show_the_first_latent_in_two_ways_are_refused():
    low = Straight("low", 0.0, [])
    low.first_latent = "pinned"
    with pytest.raises(UserError, match=r"first_latent: got 'mask \(high-noise expert\), pinned \(low-noise expert\)'"):
        Experts(high=Straight("high", 0.0, []), low=low)
