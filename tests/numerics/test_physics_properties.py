"""What must hold of the losses for any tracks, masks and features (hypothesis)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis (pip install -e .[dev])")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from physisforcing.worldmodel.physics.config import PhysicsConfig  # noqa: E402
from physisforcing.worldmodel.physics.forcing import PhysisForcing  # noqa: E402
from physisforcing.worldmodel.physics.regions import (  # noqa: E402
    informative_points,
    motion_magnitude,
    normalise_points,
    token_mask,
)
from physisforcing.worldmodel.physics.trajectory import match_logits, soft_argmax  # noqa: E402

settings.register_profile("physics", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("physics")
SEEDS = st.integers(0, 2**31 - 1)
KINDS = st.sampled_from(["mse", "huber", "ce_gauss"])


def case(seed: int, frames: int = 3, grid: tuple[int, int] = (4, 5), points: int = 12):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, frames * grid[0] * grid[1], 10, generator=generator)
    targets = {
        "points_BFN2": torch.rand(2, frames, points, 2, generator=generator) * 1.2 - 0.1,
        "visible_BFN": torch.rand(2, frames, points, generator=generator) > 0.4,
        "select_BN": torch.rand(2, points, generator=generator) > 0.4,
        "token_mask_BFhw": torch.rand(2, frames, *grid, generator=generator) > 0.5,
        "teacher_BFhwC": torch.randn(2, frames, *grid, 6, generator=generator),
    }
    return hidden, (frames, *grid), targets


def heads(**changes) -> PhysisForcing:
    torch.manual_seed(0)
    config = PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=12, **changes)
    return PhysisForcing(config, width=10, teacher_dim=6)


@given(seed=SEEDS, kind=KINDS, queries=st.sampled_from([[0], [0, 1], [2]]))
def test_the_order_of_tracks_does_not_matter(seed: int, kind: str, queries: list[int]) -> None:
    hidden, grid, targets = case(seed)
    forcing = heads(trajectory_loss=kind, query_frames=queries)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed + 1))
    moved = {**targets, "points_BFN2": targets["points_BFN2"][:, :, order]}
    moved |= {"visible_BFN": targets["visible_BFN"][:, :, order], "select_BN": targets["select_BN"][:, order]}
    torch.testing.assert_close(forcing(hidden, grid, targets).pix, forcing(hidden, grid, moved).pix)


@given(seed=SEEDS, kind=KINDS)
def test_points_that_are_masked_never_matter(seed: int, kind: str) -> None:
    """Neither a hidden target, nor a point that is not selected, nor a token outside the mask: value and gradient alike."""
    hidden, grid, targets = case(seed)
    forcing, generator = heads(trajectory_loss=kind), torch.Generator().manual_seed(seed + 1)
    other = {name: value.clone() for name, value in targets.items()}
    off = ~(targets["select_BN"][:, None] & targets["visible_BFN"])
    off[:, 0] = ~targets["select_BN"]
    noise = torch.rand(targets["points_BFN2"].shape, generator=generator)
    other["points_BFN2"] = torch.where(off[..., None], noise, targets["points_BFN2"])
    strange = torch.randn(targets["teacher_BFhwC"].shape, generator=generator) * 100
    other["teacher_BFhwC"] = torch.where(targets["token_mask_BFhw"][..., None], targets["teacher_BFhwC"], strange)
    results = []
    for which in (targets, other):
        leaf = hidden.clone().requires_grad_()
        out = forcing(leaf, grid, which)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@given(seed=SEEDS, dx=st.integers(-2, 2), dy=st.integers(-1, 1))
def test_moving_features_and_queries_moves_the_answer(seed: int, dx: int, dy: int) -> None:
    """Translation by whole cells on a map that is empty near its border: predictions move by exactly as much."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(1, 2, 9, 12, 6, dtype=torch.float64)
    features[:, :, 3:6, 4:8] = torch.randn(1, 2, 3, 4, 6, generator=generator, dtype=torch.float64) * 6
    query = torch.rand(1, 5, 2, generator=generator, dtype=torch.float64) * torch.tensor([3 / 12, 2 / 9])
    query = query + torch.tensor([4.5 / 12, 3.5 / 9])
    shift = torch.tensor([dx / 12, dy / 9], dtype=torch.float64)
    logits = match_logits(features, query)
    moved = match_logits(torch.roll(features, (dy, dx), (2, 3)), query + shift)
    rolled = torch.roll(logits.unflatten(-1, (9, 12)), (dy, dx), (-2, -1)).flatten(-2)
    torch.testing.assert_close(moved, rolled, atol=1e-9, rtol=1e-9)
    # Most of the mass stands inside, where the expectation moves along; what leaks out evenly pulls to the centre.
    inside = logits.softmax(-1).unflatten(-1, (9, 12))[..., 3:6, 4:8].sum((-2, -1))
    difference = soft_argmax(moved, (9, 12)) - soft_argmax(logits, (9, 12)) - shift
    assert (difference.abs().sum(-1) <= 2 * (1 - inside) + 1e-6).all()


@given(seed=SEEDS, scale=st.sampled_from([0.5, 2.0, 3.0]))
def test_the_resolution_of_the_pictures_does_not_matter(seed: int, scale: float) -> None:
    """Tracks in pixels of pictures of another size select the same points and tokens; motion scales with the pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(1, 1, 30, 2, generator=generator, dtype=torch.float64) * torch.tensor([320.0, 240.0])
    pixels = pixels + torch.randn(1, 9, 30, 2, generator=generator, dtype=torch.float64).cumsum(1) * 6
    visible = torch.rand(1, 9, 30, generator=generator) > 0.2
    depth = torch.rand(1, 30, generator=generator, dtype=torch.float64) + 0.5
    size, other = (240, 320), (round(240 * scale), round(320 * scale))
    one = normalise_points(pixels, size)
    two = normalise_points((pixels + 0.5) * scale - 0.5, other)
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        motion_magnitude(one, visible, size) * scale, motion_magnitude(two, visible, other), atol=1e-6, rtol=1e-9
    )
    config = PhysicsConfig()
    select = informative_points(one, visible, depth, size, config)
    assert torch.equal(select, informative_points(two, visible, depth, other, config))
    assert torch.equal(token_mask(one, visible, select, (15, 20)), token_mask(two, visible, select, (15, 20)))


@given(seed=SEEDS, tap=st.integers(1, 4))
def test_gradient_reaches_the_blocks_up_to_the_tap_only(seed: int, tap: int) -> None:
    torch.manual_seed(seed % 1000)
    blocks = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))
    hidden, grid, targets = case(seed)
    targets["select_BN"][:, 0], targets["visible_BFN"][:, :, 0] = True, True
    targets["token_mask_BFhw"][:, :, 0] = True
    tapped = x = hidden
    for number, block in enumerate(blocks, 1):
        x = torch.tanh(block(x))
        tapped = x if number == tap else tapped
    forcing = heads()
    (forcing(tapped, grid, targets).loss + 0 * x.sum()).backward()
    for number, block in enumerate(blocks, 1):
        reached = bool((block.weight.grad != 0).any())
        assert reached == (number <= tap), (number, tap)
