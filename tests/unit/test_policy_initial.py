"""First weights of the action expert, and the policy's losses, against numbers computed another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from physisforcing.policy.config import PolicyModelConfig
from physisforcing.policy.initial import resize
from physisforcing.policy.model import WorldActionModel
from physisforcing.policy.objective import action_loss, draw, level_weights, policy_losses, video_loss
from tests.helpers.tiny_policy import SHAPE, tiny_batch, tiny_policy, tiny_transformer


def test_resized_matrices_are_numpys_interpolation_times_the_root_of_the_fan_in() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, target, factor in [
        ((12, 9), (12, 3), math.sqrt(3)),  # q, k, v: 3072 -> 1024 inputs
        ((9, 12), (3, 12), 1.0),  # o: only the first axis shrinks
        ((8, 14), (8, 4), math.sqrt(3.5)),  # ffn down: 14336 -> 4096
        ((9,), (3,), 1.0),  # biases and norms
        ((12, 12), (12, 12), 1.0),  # a copy
    ]:
        value = torch.randn(shape, generator=generator)
        wanted = value.double().numpy()
        for place, size in enumerate(target):
            count = wanted.shape[place]
            at = np.linspace(0, count - 1, size)
            wanted = np.apply_along_axis(
                lambda row, at=at, count=count: np.interp(at, np.arange(count), row), place, wanted
            )
        got = resize(value, target)
        assert got.shape == target
        np.testing.assert_allclose(got.numpy(), factor * wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(resize(value, value.shape), value)


@pytest.mark.parametrize("published", [False, True])
def test_every_weight_of_the_expert_comes_from_the_video_but_for_its_ends(published: bool) -> None:
    config = PolicyModelConfig(action_dim=3, state_dim=3, width=16, ffn_dim=24, published_initial=published)
    model = WorldActionModel(tiny_transformer(), config)
    video = tiny_transformer()
    block, action = video.blocks[1], model.blocks[1].action
    assert torch.equal(action.attn1.norm_q.weight, block.attn1.norm_q.weight)
    torch.testing.assert_close(action.attn1.to_q.weight, resize(block.attn1.to_q.weight, (48, 16)))
    factor = math.sqrt(3.0) if published else 1.0
    unscaled = resize(block.scale_shift_table, (1, 6, 16), keep_variance=False)
    torch.testing.assert_close(action.scale_shift_table, factor * unscaled)
    wide, narrow = video.condition_embedder.time_proj.weight, model.expert.condition_embedder.time_proj.weight
    second = resize(wide[48:96], (16, 48)) if not published else None
    if second is not None:
        torch.testing.assert_close(narrow[16:32], resize(second, (16, 16)), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(narrow, resize(wide, (96, 16)))


def test_a_drawn_expert_is_another_one() -> None:
    options = {"action_dim": 3, "state_dim": 3, "width": 16, "ffn_dim": 24}
    one, other = (
        WorldActionModel(tiny_transformer(), PolicyModelConfig(initial=kind, **options))
        for kind in ("random", "interpolated")
    )
    assert not torch.allclose(one.blocks[0].action.attn1.to_q.weight, other.blocks[0].action.attn1.to_q.weight)
    assert torch.equal(one.transformer.patch_embedding.weight, other.transformer.patch_embedding.weight)


def test_the_published_weights_by_noise_level() -> None:
    """Section 2.2 of the reference, shift 5."""
    levels = torch.tensor([1.0, 0.978, 0.952, 0.921, 0.833, 0.682, 0.5, 0.357, 0.1, 0.005])
    wanted = torch.tensor([0.0, 0.14, 0.31, 0.50, 1.03, 1.74, 2.08, 1.87, 0.63, 0.03])
    torch.testing.assert_close(level_weights(levels, 5.0, "bell"), wanted, rtol=0, atol=0.006)
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert float(level_weights(5 * grid / (1 + 4 * grid), 5.0, "bell").mean()) == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(level_weights(levels, 5.0, "uniform"), torch.ones(10))


def test_padding_counts_in_no_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, velocity = torch.randn(3, *SHAPE, generator=generator)
    valid, weight = torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([1.0, 3.0])
    error = (velocity - (noise - x0)).square()
    wanted = (error[0, :, 1].mean() + 3.0 * error[1, :, 1:].mean()) / 2
    torch.testing.assert_close(video_loss(velocity, x0, noise, valid, weight), wanted)
    x0, noise, velocity = torch.randn(3, 2, 8, 3, generator=generator)
    valid = torch.arange(8) < torch.tensor([[5], [8]])
    error = (velocity - (noise - x0)).square()
    wanted = (error[0, :5].mean() + 3.0 * error[1].mean()) / 2
    torch.testing.assert_close(action_loss(velocity, x0, noise, valid, weight), wanted)
    assert video_loss(x0[:, None, :, None], x0[:, None, :, None], x0[:, None, :, None], torch.zeros(2, 8), weight) == 0


def test_gradients_are_those_of_finite_differences() -> None:
    """Along a random direction of all weights at once, in float32: central differences have an error of the step squared."""
    model, batch = tiny_policy("idm"), tiny_batch()
    drawn = draw(SHAPE, model.config, torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        return policy_losses(model, batch, drawn)[0]["loss"]

    weights = list(model.parameters())
    gradients = torch.autograd.grad(loss(), weights)
    generator = torch.Generator().manual_seed(2)
    # half of the direction is the gradient's own, so that the difference stands out from the rounding
    way = [g.sign() + torch.randn(g.shape, generator=generator) for g in gradients]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, way, strict=True))
    values = []
    with torch.no_grad():
        for step in (2e-4, -4e-4):
            torch._foreach_add_(weights, way, alpha=step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 4e-4 == pytest.approx(slope, rel=2e-3)


def test_draws_are_a_function_of_the_generator_and_levels_have_their_shifts() -> None:
    config = PolicyModelConfig(
        mode="optional_idm", action_dim=3, chunk=8, video_shift=5.0, action_shift=1.0, condition_noise=0.25
    )
    shape = (20000, 1, 2, 1, 1)
    one, other = (draw(shape, config, torch.Generator().manual_seed(7)) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    # medians of uniform levels: 1/2 and, shifted by 5, 5/6 (section 2.2)
    assert float(one.action_sigma_B.median()) == pytest.approx(0.5, abs=0.01)
    assert float(one.sigma_B.median()) == pytest.approx(5 / 6, abs=0.01)
    assert float((one.copy_sigma_B > 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(one.copy_seen_B.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([one.sigma_B, one.action_sigma_B]))[0, 1])) < 0.03
