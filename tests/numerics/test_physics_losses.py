"""Equations (1)-(13) against an independent reference: float64 numpy, plain loops over samples, points, frames and tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.regions import (
    foreground_weight,
    informative_points,
    motion_magnitude,
    normalise_points,
    select_points,
    token_mask,
)
from physisforcing.worldmodel.physics.relation import relation_loss, relation_matrix
from physisforcing.worldmodel.physics.trajectory import (
    bilinear_weights,
    clamp_to_hull,
    latent_targets,
    match_logits,
    soft_argmax,
    trajectory_loss,
)

SIZE, GRID = (240, 320), (15, 20)
SMALL = (4, 5)


def clip(batch: int = 3, frames: int = 9, points: int = 17, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random walks in pixels (some leave the picture), visibility, depth: all float64."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(batch, 1, points, 2, generator=generator, dtype=torch.float64) * torch.tensor([320.0, 240.0])
    step = torch.randn(batch, frames - 1, points, 2, generator=generator, dtype=torch.float64) * 9
    step *= torch.rand(batch, 1, points, 1, generator=generator, dtype=torch.float64) > 0.4
    pixels = torch.cat([start, start + step.cumsum(1)], 1)
    visible = torch.rand(batch, frames, points, generator=generator) > 0.25
    depth = torch.rand(batch, points, generator=generator, dtype=torch.float64) + 0.5
    depth[:, 0] = 0
    return pixels, visible, depth


# ---------------------------------------------------------------- eq. (1)-(4)


def slow_motion(pixels: np.ndarray, visible: np.ndarray, kind: str, floor: float) -> np.ndarray:
    batch, frames, points, _ = pixels.shape
    out = np.zeros((batch, points))
    for b in range(batch):
        for n in range(points):
            if kind == "path":
                for t in range(1, frames):
                    length = math.dist(pixels[b, t, n], pixels[b, t - 1, n])
                    if visible[b, t, n] and visible[b, t - 1, n] and length >= floor:
                        out[b, n] += length
            else:
                seen = [t for t in range(frames) if visible[b, t, n]]
                if seen:
                    length = math.dist(pixels[b, seen[0], n], pixels[b, seen[-1], n])
                    out[b, n] = length if length >= floor else 0.0
    return out


@pytest.mark.parametrize("kind", ["path", "net"])
@pytest.mark.parametrize("dead_zone", [0.0, 0.02])
def test_motion_magnitude(kind: str, dead_zone: float) -> None:
    pixels, visible, _ = clip()
    got = motion_magnitude(normalise_points(pixels, SIZE), visible, SIZE, kind=kind, dead_zone=dead_zone)
    expected = slow_motion(pixels.numpy(), visible.numpy(), kind, dead_zone * math.hypot(*SIZE))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_jitter_below_the_dead_zone_is_no_motion() -> None:
    generator = torch.Generator().manual_seed(1)
    still = torch.full((1, 81, 1, 2), 100.0) + 0.03 * torch.randn(1, 81, 1, 2, generator=generator)
    visible = torch.ones(1, 81, 1, dtype=torch.bool)
    points = normalise_points(still.double(), SIZE)
    assert motion_magnitude(points, visible, SIZE).item() > 3
    assert motion_magnitude(points, visible, SIZE, dead_zone=0.0005).item() == 0


def slow_weight(depth: np.ndarray, kind: str, eps: float) -> np.ndarray:
    out = np.zeros_like(depth)
    for b, row in enumerate(depth):
        known = sorted(d for d in row if kind == "disparity" or d > 0)
        low, high = known[round((len(known) - 1) * 0.01)], known[round((len(known) - 1) * 0.99)]
        for n, value in enumerate(row):
            scaled = min(max((value - low) / (high - low), 0.0), 1.0)
            if kind == "disparity":
                scaled = 1 - scaled
            elif value <= 0:
                scaled = 1.0
            out[b, n] = 1 / (scaled + eps)
    return out


@pytest.mark.parametrize("kind", ["metric", "disparity"])
def test_foreground_weight(kind: str) -> None:
    _, _, depth = clip(points=301)
    expected = slow_weight(depth.numpy(), kind, 0.1)
    np.testing.assert_allclose(foreground_weight(depth, kind=kind, eps=0.1).numpy(), expected, rtol=1e-5)


def test_near_weighs_more_than_far_whatever_the_depth_is_called() -> None:
    metres = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    for weight in (foreground_weight(metres, kind="metric"), foreground_weight(1 / metres, kind="disparity")):
        assert (weight[0, :-1] > weight[0, 1:]).all()
        torch.testing.assert_close(weight[0, [0, -1]], torch.tensor([10.0, 1 / 1.1]))
    assert (foreground_weight(metres, kind="off") == 1).all()
    unknown = foreground_weight(torch.tensor([[0.0, 0.0]]), kind="metric")
    torch.testing.assert_close(unknown, torch.full((1, 2), 1 / 1.1))
    assert foreground_weight(torch.ones(1, 3), kind="metric").isfinite().all()


@pytest.mark.parametrize("kind", ["mean", "topk"])
def test_selection(kind: str) -> None:
    pixels, visible, depth = clip(points=40, seed=2)
    config = PhysicsConfig(select=kind, top_k=7)
    got = informative_points(normalise_points(pixels, SIZE), visible, depth, SIZE, config).numpy()
    motion = slow_motion(pixels.numpy(), visible.numpy(), "path", config.dead_zone * math.hypot(*SIZE))
    score = motion * slow_weight(depth.numpy(), "metric", config.depth_eps)
    for b in range(len(score)):
        seen = [n for n in range(40) if visible[b, 0, n]]
        moving = [n for n in seen if motion[b, n] >= 0.02 * 400]
        if kind == "mean":
            mean = sum(score[b, n] for n in seen) / len(seen)
            expected = {n for n in moving if score[b, n] >= mean}
        else:
            expected = set(sorted(moving, key=lambda n: -score[b, n])[:7])
        assert set(np.flatnonzero(got[b])) == expected and expected


def test_a_static_clip_selects_nothing() -> None:
    points = torch.rand(2, 1, 30, 2, generator=torch.Generator().manual_seed(0)).expand(2, 9, 30, 2)
    visible = torch.ones(2, 9, 30, dtype=torch.bool)
    assert not informative_points(points, visible, torch.ones(2, 30), SIZE, PhysicsConfig()).any()
    zero = torch.zeros(1, 5)
    assert not select_points(zero, zero, zero == 0, kind="mean", min_motion=8.0, top_k=3).any()


def test_token_mask_is_the_max_pool_of_the_pixel_mask() -> None:
    pixels, visible, _ = clip(batch=2, frames=9, points=60, seed=3)
    select = torch.rand(2, 60, generator=torch.Generator().manual_seed(4)) > 0.5
    got = token_mask(normalise_points(pixels, SIZE), visible, select, GRID).numpy()
    full = np.zeros((2, 9, *SIZE), bool)
    for b in range(2):
        for t in range(9):
            for n in range(60):
                x, y = (math.floor(v + 0.5) for v in pixels[b, t, n].tolist())
                if select[b, n] and visible[b, t, n] and 0 <= x < SIZE[1] and 0 <= y < SIZE[0]:
                    full[b, t, y, x] = True
    tokens = full.reshape(2, 9, 15, 16, 20, 16).any((3, 5))
    expected = np.stack([tokens[:, 0], tokens[:, 1:5].any(1), tokens[:, 5:9].any(1)], 1)
    np.testing.assert_array_equal(got, expected)
    assert 100 < expected.sum() < expected.size / 4


# ---------------------------------------------------------------- eq. (5)-(8)


def slow_bilinear(image_hwC: np.ndarray, point: np.ndarray) -> np.ndarray:
    height, width = image_hwC.shape[:2]
    x = min(max(point[0] * width - 0.5, 0.0), width - 1.0)
    y = min(max(point[1] * height - 0.5, 0.0), height - 1.0)
    x0, y0 = min(int(x), width - 2), min(int(y), height - 2)
    fx, fy = x - x0, y - y0
    top = image_hwC[y0, x0] * (1 - fx) + image_hwC[y0, x0 + 1] * fx
    bottom = image_hwC[y0 + 1, x0] * (1 - fx) + image_hwC[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def slow_trajectory(features: np.ndarray, query: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple:
    """Predictions and squared errors point by point."""
    batch, frames, height, width, channels = features.shape
    prediction = np.zeros((batch, frames - 1, query.shape[1], 2))
    total = count = 0.0
    for b in range(batch):
        for n in range(query.shape[1]):
            q = slow_bilinear(features[b, 0], query[b, n])
            for t in range(1, frames):
                logits = [
                    sum(q[c] * features[b, t, i, j, c] for c in range(channels)) / math.sqrt(channels)
                    for i in range(height)
                    for j in range(width)
                ]
                peak = max(logits)
                mass = [math.exp(value - peak) for value in logits]
                for k, value in enumerate(mass):
                    centre = ((k % width + 0.5) / width, (k // width + 0.5) / height)
                    prediction[b, t - 1, n] += np.array(centre) * value / sum(mass)
                error = prediction[b, t - 1, n] - target[b, t - 1, n]
                total += weight[b, t - 1, n] * (error @ error)
                count += weight[b, t - 1, n]
    return prediction, total / max(count, 1.0)


def trajectory_case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(2, 3, *SMALL, 6, generator=generator, dtype=torch.float64).to(dtype) * 1.5
    query = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64).to(dtype)
    target = clamp_to_hull(torch.rand(2, 2, 7, 2, generator=generator, dtype=torch.float64).to(dtype), SMALL)
    weight = (torch.rand(2, 2, 7, generator=generator) > 0.4).to(dtype)
    return features, query, target, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trajectory_loss_against_loops(dtype: torch.dtype) -> None:
    features, query, target, weight = trajectory_case(dtype)
    loss, prediction = trajectory_loss(match_logits(features, query), target, weight, SMALL)
    slow_prediction, slow_loss = slow_trajectory(*(x.double().numpy() for x in (features, query, target, weight)))
    np.testing.assert_allclose(prediction.numpy(), slow_prediction, atol=1e-5)
    assert abs(loss.item() - slow_loss) < 1e-5


def test_huber_and_cross_entropy_against_loops() -> None:
    features, query, target, weight = trajectory_case()
    logits = match_logits(features, query)
    for kind in ("huber", "ce_gauss"):
        loss, prediction = trajectory_loss(logits, target, weight, SMALL, kind=kind, huber_delta=0.2, gauss_sigma=0.7)
        total = 0.0
        for b, t, n in np.ndindex(*weight.shape):
            if kind == "huber":
                distance = math.dist(prediction[b, t, n], target[b, t, n])
                value = distance**2 if distance <= 0.2 else 0.2 * (2 * distance - 0.2)
            else:
                aim = target[b, t, n].numpy() * [SMALL[1], SMALL[0]] - 0.5
                heat = [math.exp(-((k % 5 - aim[0]) ** 2 + (k // 5 - aim[1]) ** 2) / (2 * 0.49)) for k in range(20)]
                log_norm = math.log(sum(math.exp(v) for v in logits[b, t, n].tolist()))
                value = -sum(h / sum(heat) * (logits[b, t, n, k].item() - log_norm) for k, h in enumerate(heat))
            total += weight[b, t, n].item() * value
        assert abs(loss.item() - total / weight.sum().item()) < 1e-5


@pytest.mark.parametrize("kind", ["mse", "huber", "ce_gauss"])
def test_trajectory_gradient(kind: str) -> None:
    features, query, target, weight = trajectory_case()
    features = features[:1].requires_grad_()
    part = query[:1], target[:1], weight[:1]

    def loss(value: torch.Tensor) -> torch.Tensor:
        return trajectory_loss(match_logits(value, part[0]), part[1], part[2], SMALL, kind=kind, huber_delta=0.2)[0]

    assert torch.autograd.gradcheck(loss, (features,), eps=1e-6, atol=1e-7, rtol=1e-4)


def test_bilinear_sampling_is_grid_sample() -> None:
    generator = torch.Generator().manual_seed(6)
    image = torch.randn(2, 8, *GRID, generator=generator)
    points = torch.rand(2, 50, 2, generator=generator) * 1.2 - 0.1
    ours = bilinear_weights(points, GRID) @ image.flatten(2).transpose(1, 2)
    theirs = torch.nn.functional.grid_sample(
        image, points[:, None] * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(ours, theirs[:, :, 0].transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_latent_times() -> None:
    pixels, visible, _ = clip(frames=17, seed=7)
    got, seen = latent_targets(pixels, visible)
    for b, k, n in np.ndindex(*seen.shape):
        group = [0] if k == 0 else list(range(4 * k - 3, 4 * k + 1))
        shown = [t for t in group if visible[b, t, n]]
        assert bool(seen[b, k, n]) == bool(shown)
        expected = pixels[b, shown or group, n].mean(0)
        torch.testing.assert_close(got[b, k, n], expected, atol=1e-9, rtol=1e-9)


def test_perfect_features_are_matched_and_constant_ones_give_the_uniform_value() -> None:
    """One-hot features that move by whole cells, and queries at cell centres: the map peaks on the true cell."""
    height, width = GRID
    tokens = height * width
    identity = torch.eye(tokens) * math.sqrt(tokens)  # root mean square 1, as phi's norm makes it
    shift = 2
    frame0 = identity.reshape(height, width, tokens)
    frame1 = torch.roll(frame0, shifts=(1, shift), dims=(0, 1))
    features = torch.stack([frame0, frame1])[None]
    rows, columns = torch.meshgrid(torch.arange(height - 1), torch.arange(width - shift), indexing="ij")
    query = torch.stack([(columns.flatten() + 0.5) / width, (rows.flatten() + 0.5) / height], -1)[None]
    target = query + torch.tensor([shift / width, 1 / height])
    torch.testing.assert_close(clamp_to_hull(target, GRID), target)
    weight = torch.ones(1, 1, query.shape[1])
    loss, prediction = trajectory_loss(match_logits(features, query), target[:, None], weight, GRID)
    assert loss.item() < 1e-3
    assert (prediction - target[:, None]).abs().max() < 0.25 / width

    constant = torch.ones(1, 2, height, width, 8)
    uniform, _ = trajectory_loss(match_logits(constant, query), target[:, None], weight, GRID)
    expected = (target - 0.5).square().sum(-1).mean()
    torch.testing.assert_close(uniform, expected, atol=1e-6, rtol=1e-5)


def test_the_uniform_value_of_evenly_spread_targets_is_a_sixth() -> None:
    axis = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    target = torch.cartesian_prod(axis, axis)[None, None]
    logits = torch.zeros(1, 1, target.shape[2], SMALL[0] * SMALL[1], dtype=torch.float64)
    loss, _ = trajectory_loss(logits, target, torch.ones(1, 1, target.shape[2], dtype=torch.float64), SMALL)
    assert abs(loss.item() - 1 / 6) < 1e-4


def test_targets_beyond_the_hull_are_moved_onto_it() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.01], [0.3, 0.4], [-2.0, 3.0]])
    clamped = clamp_to_hull(points, GRID)
    low, high = torch.tensor([0.5 / 20, 0.5 / 15]), torch.tensor([19.5 / 20, 14.5 / 15])
    torch.testing.assert_close(clamped[0], low)
    torch.testing.assert_close(clamped[1], high)
    torch.testing.assert_close(clamped[2], torch.stack([points[2, 0], low[1]]))
    torch.testing.assert_close(clamped[3], points[3])
    torch.testing.assert_close(clamped[4], torch.stack([low[0], high[1]]))
    # A sharp peak on a border cell reaches the clamped target: the loss there can become zero.
    peak = torch.full((1, 1, 1, 300), -50.0)
    peak[..., 0] = 50
    torch.testing.assert_close(soft_argmax(peak, GRID)[0, 0, 0], clamped[0], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- eq. (9)-(12)


def slow_relation(student: np.ndarray, teacher: np.ndarray, valid: np.ndarray) -> float:
    values = []
    for b in range(len(student)):
        kept = [k for k in range(student.shape[1]) if valid[b, k]]
        if len(kept) < 2:
            continue
        total = 0.0
        for i in kept:
            for j in kept:
                cosines = [
                    float(x[b, i] @ x[b, j] / (np.linalg.norm(x[b, i]) * np.linalg.norm(x[b, j])))
                    for x in (student, teacher)
                ]
                total += abs(cosines[0] - cosines[1])
        values.append(total / len(kept) ** 2)
    return sum(values) / max(len(values), 1)


def relation_case() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(8)
    student = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(3, 9, 7, generator=generator, dtype=torch.float64)
    valid = torch.rand(3, 9, generator=generator) > 0.3
    valid[1] = torch.arange(9) == 4  # one token: no pair
    return student, teacher, valid


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relation_loss_against_loops(dtype: torch.dtype) -> None:
    student, teacher, valid = relation_case()
    got = relation_loss(student.to(dtype), teacher.to(dtype), valid)
    assert abs(got.item() - slow_relation(student.numpy(), teacher.numpy(), valid.numpy())) < 1e-5


def test_relation_gradient_and_frozen_teacher() -> None:
    student, teacher, valid = relation_case()
    student.requires_grad_()
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_loss(x, teacher, valid), (student,), eps=1e-7, atol=1e-6)
    relation_loss(student, teacher, valid).backward()
    assert teacher.grad is None
    assert (student.grad[~valid] == 0).all() and (student.grad[1] == 0).all()
    torch.testing.assert_close(torch.diagonal(relation_matrix(student), dim1=1, dim2=2), torch.ones(3, 9).double())


def test_relation_loss_ignores_rotation_and_scale_of_the_teacher() -> None:
    _, teacher, valid = relation_case()
    rotation = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert relation_loss(3 * teacher @ rotation, teacher, valid).item() < 1e-12


# ---------------------------------------------------------------- eq. (13)


def test_total_against_loops_and_finite_differences() -> None:
    """The whole module in float32 against loops over its own heads' outputs, and its gradient in one direction."""
    generator = torch.Generator().manual_seed(9)
    frames, (height, width) = 3, SMALL
    config = PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=12, lambda_pix=0.7, lambda_sem=0.3)
    torch.manual_seed(0)
    heads = PhysisForcing(config, width=10, teacher_dim=6)
    hidden = torch.randn(2, frames * height * width, 10, generator=generator)
    targets = {
        "points_BFN2": torch.rand(2, frames, 8, 2, generator=generator),
        "visible_BFN": torch.rand(2, frames, 8, generator=generator) > 0.2,
        "select_BN": torch.rand(2, 8, generator=generator) > 0.3,
        "token_mask_BFhw": torch.rand(2, frames, height, width, generator=generator) > 0.5,
        "teacher_BFhwC": torch.randn(2, frames, height, width, 6, generator=generator),
    }
    out = heads(hidden, (frames, height, width), targets)
    with torch.no_grad():
        features = heads.features(hidden).reshape(2, frames, height, width, 12)
        np.testing.assert_allclose(features.square().mean(-1).numpy(), 1, atol=1e-3)
        weight = (targets["select_BN"][:, None] & targets["visible_BFN"][:, 1:]).double().numpy()
        target = clamp_to_hull(targets["points_BFN2"][:, 1:], SMALL).double().numpy()
        query = targets["points_BFN2"][:, 0].double().numpy()
        _, pix = slow_trajectory(features.double().numpy(), query, target, weight)
        student, valid = heads.psi(hidden).double().numpy(), targets["token_mask_BFhw"].flatten(1).numpy()
        sem = slow_relation(student, targets["teacher_BFhwC"].flatten(1, 3).double().numpy(), valid)
    assert abs(out.pix.item() - pix) < 1e-5 and abs(out.sem.item() - sem) < 1e-5
    assert abs(out.loss.item() - (0.7 * pix + 0.3 * sem)) < 1e-5

    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(heads(hidden, (frames, height, width), targets).loss, hidden)
    direction = torch.randn(hidden.shape, generator=generator)
    eps = 3e-3
    with torch.no_grad():
        ends = [heads(hidden + s * eps * direction, (frames, height, width), targets).loss for s in (1, -1)]
    difference = ((ends[0] - ends[1]) / (2 * eps)).item()
    assert abs(difference - (gradient * direction).sum().item()) < 2e-3 * max(abs(difference), 0.1)
