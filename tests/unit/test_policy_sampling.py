"""Sampling of actions: the true velocity gives the actions back, caches change nothing, batches are single calls, seeds are exact."""

from __future__ import annotations

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.policy.config import MODES
from physisforcing.policy.sampling import WAYS, Sampler, SamplingConfig, draw_noise, euler, plan_seed
from physisforcing.worldmodel.flow_matching import sampling_sigmas
from tests.helpers.tiny_policy import SHAPE, tiny_batch, tiny_policy


def plan(sampler: Sampler, rows: slice = slice(None), seeds: tuple[int, ...] = (5, 6)) -> torch.Tensor:
    batch = tiny_batch()
    noise, future = draw_noise(seeds, (8, 3), SHAPE[1:] if sampler.imagines else None)
    with torch.no_grad():
        begun = sampler.begin(
            batch["latents_BCFhw"][rows, :, :1],
            batch["text"][rows],
            batch["state_BA"][rows],
            None if future is None else future[rows],
        )
        return sampler.steps(begun, noise[rows])


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_true_velocity_gives_the_actions_back_in_ten_steps(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    actions, noise = torch.randn(2, 4, 32, 14, generator=generator)
    sigmas = sampling_sigmas(10, shift).tolist()
    found = euler(lambda step, x: (x - actions) / sigmas[step], noise, sigmas)
    torch.testing.assert_close(found, actions, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32
    # of a velocity that is a little off only the last step's share stays: the others aim at the actions again
    off = euler(lambda step, x: (x - actions) / sigmas[step] + 0.01, noise, sigmas)
    torch.testing.assert_close(off, actions - 0.01 * sigmas[-2], rtol=0, atol=1e-5)


def test_the_published_levels_of_shift_five() -> None:
    wanted = [1, 0.978, 0.952, 0.921, 0.882, 0.833, 0.769, 0.682, 0.556, 0.357, 0]
    sampler = Sampler(tiny_policy(action_shift=5.0), SamplingConfig(), frames=3)
    assert sampler.sigmas == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("mode", ["first_frame", "joint"])
def test_steps_over_kept_keys_are_steps_of_the_whole_model(mode: str) -> None:
    """Against a loop over the uncached forward, which makes every embedding anew at every step."""
    model, batch = tiny_policy(mode), tiny_batch()
    sampler = Sampler(model, SamplingConfig(steps=4), frames=3)
    found = plan(sampler)
    actions, future = draw_noise((5, 6), (8, 3), SHAPE[1:])
    context = model.context(batch["text"], batch["state_BA"])
    first, video = batch["latents_BCFhw"][:, :, :1], future
    levels, own = sampling_sigmas(4, 5.0).tolist(), sampling_sigmas(4, 1.0).tolist()
    with torch.no_grad():
        for step in range(4):
            shown = torch.cat([first, video[:, :, 1:]], 2)
            sigma, action_sigma = torch.full((2,), levels[step]), torch.full((2,), own[step])
            moved, acted, _ = model(shown, sigma, actions, action_sigma, context)
            video = video + (levels[step + 1] - levels[step]) * moved
            actions = actions + (own[step + 1] - own[step]) * acted
    torch.testing.assert_close(found, actions, rtol=1e-4, atol=1e-5)


def test_idm_acts_on_a_future_that_was_imagined_first() -> None:
    model, batch = tiny_policy("optional_idm"), tiny_batch()
    sampler = Sampler(model, SamplingConfig(steps=3, video_steps=2), frames=3)
    assert sampler.way == "idm" and sampler.imagines
    found = plan(sampler)
    actions, future = draw_noise((5, 6), (8, 3), SHAPE[1:])
    context, first = model.context(batch["text"], batch["state_BA"]), batch["latents_BCFhw"][:, :, :1]
    with torch.no_grad():
        video, levels = torch.cat([first, future[:, :, 1:]], 2), sampling_sigmas(2, 5.0).tolist()
        for now, after in ((levels[0], levels[1]), (levels[1], levels[2])):
            moved = model(video, torch.full((2,), now), None, None, context)[0]
            video = torch.cat([first, (video + (after - now) * moved)[:, :, 1:]], 2)
        kept = model.prefill(video, torch.zeros(2), context)
        own = sampling_sigmas(3, 1.0).tolist()
        for now, after in zip(own[:-1], own[1:], strict=True):
            actions = actions + (after - now) * model.act(actions, model.action_times(torch.full((2,), now)), kept)
    torch.testing.assert_close(found, actions, rtol=1e-4, atol=1e-5)
    alone = plan(Sampler(model, SamplingConfig(steps=3, mode="first_frame"), frames=3))
    assert (alone - found).abs().max() > 1e-3, "without the future another plan"


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_gives_what_single_calls_give(mode: str) -> None:
    sampler = Sampler(tiny_policy(mode), SamplingConfig(steps=3, video_steps=2), frames=3)
    together = plan(sampler)
    alone = torch.cat([plan(sampler, slice(row, row + 1)) for row in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_noise_is_that_of_its_seed_wherever_it_stands() -> None:
    one, future = draw_noise([3, 9], (8, 3), (2, 3, 4, 4))
    other, nothing = draw_noise([9], (8, 3), None)
    assert nothing is None and future is not None and future.shape == (2, 2, 3, 4, 4)
    assert torch.equal(one[1:], other) and not torch.equal(one[0], one[1])
    seeds = {plan_seed(episode, number) for episode in (0, 1, 100000) for number in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
    assert plan_seed(100000, 3) == plan_seed(100000, 3, 0) == 1766354192504353851
    own = {plan_seed(episode, number, seed) for episode in (0, 1) for number in range(5) for seed in range(5)}
    assert len(own) == 50, "the policy's own seed is no scene's and no plan's"


def test_a_mode_without_its_training_is_refused() -> None:
    with pytest.raises(UserError, match=r"policy\.mode"):
        Sampler(tiny_policy("first_frame"), SamplingConfig(mode="idm"), frames=3)
    with pytest.raises(UserError, match=r"policy\.steps"):
        SamplingConfig(steps=0)
    assert set(WAYS) == set(MODES)


def test_times_of_rounded_weights_are_those_of_the_pass_that_they_are_used_in() -> None:
    """A sampler makes them once, outside the autocast of the steps: with the bfloat16 weights of a GPU the bits must be the same."""
    from physisforcing.policy.model import to_inference

    model = to_inference(tiny_policy(), torch.device("cpu"), half=True)
    sampler = Sampler(model, SamplingConfig(steps=3), frames=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        temb, modulation = model.action_times(torch.tensor(sampler.sigmas[:-1]))
    assert torch.equal(torch.cat([times[0] for times in sampler.times]), temb)
    assert torch.equal(torch.cat([times[1] for times in sampler.times]), modulation)
