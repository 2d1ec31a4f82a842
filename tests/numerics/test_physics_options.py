"""The choices that the paper leaves open, each against float64 loops or against another way to compute the same."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.physics.config import CHOICES, PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.regions import (
    informative_points,
    motion_magnitude,
    normalise_points,
    select_points,
    token_bodies,
    token_mask,
    without_camera_motion,
)
from physisforcing.worldmodel.physics.relation import relation_loss, rigid_relation
from physisforcing.worldmodel.physics.targets import point_targets
from physisforcing.worldmodel.physics.trajectory import (
    bilinear_weights,
    cell_centres,
    clamp_to_hull,
    in_hull,
    latent_targets,
    match_logits,
    soft_argmax,
)
from physisforcing.worldmodel.physics.views import cut, token_rects

SIZE, GRID = (240, 320), (15, 20)


def tracks(batch: int = 2, frames: int = 9, points: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random walks in [0,1] (float64), some out of the picture, and visibility."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(batch, 1, points, 2, generator=generator, dtype=torch.float64)
    step = torch.randn(batch, frames - 1, points, 2, generator=generator, dtype=torch.float64) * 0.04
    visible = torch.rand(batch, frames, points, generator=generator) > 0.3
    return torch.cat([start, start + step.cumsum(1)], 1), visible


def case(batch: int = 2, frames: int = 4, grid: tuple[int, int] = (4, 5), points: int = 9, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, frames * grid[0] * grid[1], 10, generator=generator)
    targets = {
        "points_BFN2": torch.rand(batch, frames, points, 2, generator=generator),
        "visible_BFN": torch.rand(batch, frames, points, generator=generator) > 0.3,
        "select_BN": torch.rand(batch, points, generator=generator) > 0.3,
        "token_mask_BFhw": torch.rand(batch, frames, *grid, generator=generator) > 0.4,
        "teacher_BFhwC": torch.randn(batch, frames, *grid, 6, generator=generator),
        "body_BFhw": torch.randint(-1, 4, (batch, frames, *grid), generator=generator),
    }
    return hidden, (frames, *grid), targets


def heads(**changes) -> PhysisForcing:
    torch.manual_seed(0)
    config = PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=12, **changes)
    return PhysisForcing(config, width=10, teacher_dim=6)


# ---------------------------------------------------------------- eq. (1)-(4)


def test_hidden_steps_count_when_asked() -> None:
    points, visible = tracks()
    expected = np.zeros((2, 30))
    pixels = points.numpy() * [320, 240]
    for b, n in np.ndindex(2, 30):
        expected[b, n] = sum(math.dist(pixels[b, t, n], pixels[b, t - 1, n]) for t in range(1, 9))
    got = motion_magnitude(points, visible, SIZE, visible_steps=False)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    counted = motion_magnitude(points, visible, SIZE)
    assert (counted <= got + 1e-9).all() and (counted < got - 1).float().mean() > 0.9


def test_camera_motion_is_the_median_step_of_what_is_seen() -> None:
    points, visible = tracks(points=11)
    visible[0, 3] = False  # nothing is seen: nothing is taken out
    expected = points.clone()
    for b in range(2):
        drift = np.zeros(2)
        for t in range(1, 9):
            seen = [n for n in range(11) if visible[b, t, n] and visible[b, t - 1, n]]
            for axis in range(2):
                steps = [(points[b, t, n, axis] - points[b, t - 1, n, axis]).item() for n in seen]
                drift[axis] += statistics.median_low(steps) if steps else 0.0
            expected[b, t] -= torch.from_numpy(drift)
    torch.testing.assert_close(without_camera_motion(points, visible), expected, atol=1e-12, rtol=0)


def test_a_panning_camera_makes_nothing_informative_but_what_moves_itself() -> None:
    still = torch.rand(1, 1, 40, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.1
    pan = torch.linspace(0, 0.3, 9)[None, :, None, None] * torch.tensor([1.0, 0.5])
    points = still + pan
    points[:, :, 5, 1] += torch.linspace(0, 0.3, 9)
    visible = torch.ones(1, 9, 40, dtype=torch.bool)
    depth = torch.ones(1, 40)
    plain = informative_points(points, visible, depth, SIZE, PhysicsConfig())
    compensated = informative_points(points, visible, depth, SIZE, PhysicsConfig(camera_motion="median"))
    assert compensated[0].nonzero().flatten().tolist() == [5]
    assert plain[0, 5]
    unselected = informative_points(still + pan, visible, depth, SIZE, PhysicsConfig(camera_motion="median"))
    assert not unselected.any() and informative_points(still + pan, visible, depth, SIZE, PhysicsConfig()).any()


def test_both_selections_keep_the_best_of_those_above_the_mean() -> None:
    score = torch.tensor([[9.0, 1.0, 8.0, 7.0, 0.5, 6.0]])
    every = torch.ones_like(score, dtype=torch.bool)
    options = {"min_motion": 0.0, "top_k": 2}
    assert select_points(score, score, every, kind="both", **options)[0].nonzero().flatten().tolist() == [0, 2]
    options["top_k"] = 5
    assert select_points(score, score, every, kind="both", **options)[0].nonzero().flatten().tolist() == [0, 2, 3, 5]
    assert select_points(score, score, every, kind="topk", **options).sum() == 5


def test_nearest_mask_is_the_resized_pixel_mask_and_keeps_hardly_any() -> None:
    points, visible = tracks(points=4000, frames=17, seed=1)
    select = torch.rand(2, 4000, generator=torch.Generator().manual_seed(2)) > 0.3
    got = token_mask(points, visible, select, GRID, kind="nearest", size=SIZE)
    full = torch.zeros(2, 17, *SIZE)
    pixel = torch.floor(points * torch.tensor([320, 240])).long()
    for b, t, n in np.ndindex(2, 17, 4000):
        x, y = pixel[b, t, n].tolist()
        if select[b, n] and visible[b, t, n] and 0 <= x < 320 and 0 <= y < 240:
            full[b, t, y, x] = 1
    expected = nnf.interpolate(full[:, None], size=(5, *GRID), mode="nearest")[:, 0] > 0
    torch.testing.assert_close(got, expected)
    assert 0 < got.sum() < token_mask(points, visible, select, GRID).sum() / 5


def test_bodies_of_tokens() -> None:
    points, visible = tracks(points=50, frames=9, seed=3)
    body = torch.randint(-1, 6, (2, 50), generator=torch.Generator().manual_seed(4))
    got = token_bodies(points, visible, body, GRID)
    expected, best = -np.ones((2, 3, *GRID), int), np.full((2, 3, *GRID), np.inf)
    for b, t, n in np.ndindex(2, 9, 50):
        x, y = points[b, t, n, 0].item() * 20, points[b, t, n, 1].item() * 15
        if not visible[b, t, n] or body[b, n] < 0 or not (0 <= x < 20 and 0 <= y < 15):
            continue
        place = (b, (t + 3) // 4, math.floor(y), math.floor(x))
        distance = int(((x - math.floor(x) - 0.5) ** 2 + (y - math.floor(y) - 0.5) ** 2) * 2**20)
        if distance < best[place]:
            best[place], expected[place] = distance, body[b, n]
    np.testing.assert_array_equal(got.numpy(), expected)
    assert (expected >= 0).sum() > 100


# ---------------------------------------------------------------- eq. (5)-(8)


def test_latent_times() -> None:
    points, visible = tracks(frames=17)
    last, _ = latent_targets(points, visible, time="last")
    torch.testing.assert_close(last, points[:, [0, 4, 8, 12, 16]])
    uniform, _ = latent_targets(points, visible, time="uniform")
    flat = points.permute(0, 2, 3, 1).flatten(1, 2)
    resampled = nnf.interpolate(flat, size=5, mode="linear", align_corners=False)
    resampled = resampled.unflatten(1, (30, 2)).permute(0, 3, 1, 2)
    torch.testing.assert_close(uniform[:, 1:], resampled[:, 1:])
    assert torch.equal(uniform[:, 0], points[:, 0]), "latent 0 holds the queries"
    assert torch.equal(latent_targets(points, visible, time="last")[1], visible[:, ::4])
    between = latent_targets(points, visible, time="uniform", visibility="share")[1]
    seen = nnf.interpolate(visible.double().transpose(1, 2), size=5, mode="linear", align_corners=False).transpose(1, 2)
    torch.testing.assert_close(between[:, 1:], seen[:, 1:])
    _, share = latent_targets(points, visible, visibility="share")
    expected = torch.stack(
        [visible[:, 0].double(), *(visible[:, k - 3 : k + 1].double().mean(1) for k in (4, 8, 12, 16))], 1
    )
    torch.testing.assert_close(share, expected)
    assert latent_targets(points, visible, visibility="off")[1].all()


def test_enlarged_logits_are_those_of_enlarged_features() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, *GRID, 8, generator=generator, dtype=torch.float64)
    query = torch.rand(2, 6, 2, generator=generator, dtype=torch.float64)
    got = match_logits(features, query, upsample=2)
    keys = nnf.interpolate(
        features[:, 1:].flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2, mode="bilinear", align_corners=False
    )
    looked = bilinear_weights(query, GRID) @ features[:, 0].flatten(1, 2)
    expected = torch.einsum("bnc,bfcl->bfnl", looked, keys.unflatten(0, (2, 2)).flatten(3)) * 8**-0.5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)  # the centres are float32
    assert soft_argmax(got, (30, 40)).shape == (2, 2, 6, 2)


def test_a_temperature_replaces_the_square_root_and_learns() -> None:
    hidden, grid, targets = case()

    def wide(**changes) -> PhysisForcing:
        torch.manual_seed(0)
        config = PhysicsConfig(phi_hidden=16, psi_hidden=16, feature_dim=256, **changes)
        return PhysisForcing(config, width=10, teacher_dim=6)

    forcing = wide(temperature="learnable")
    out = forcing(hidden, grid, targets)
    torch.testing.assert_close(out.pix, wide()(hidden, grid, targets).pix)
    assert abs(out.metrics["temperature"].item() - 0.0625) < 1e-6
    out.loss.backward()
    assert forcing.temperature_place is not None and forcing.temperature_place.grad.abs() > 0
    for value, bound in ((-9.0, 0.02), (9.0, 0.2)):
        with torch.no_grad():
            forcing.temperature_place.fill_(value)
        assert abs(forcing.temperature().item() - bound) < 1e-4
        place = torch.autograd.grad(forcing.temperature(), forcing.temperature_place)[0]
        assert place > 0, "it can come back from its ends"
    for width in (16, 4096):  # 1/sqrt(C) beyond the range: starts at its end, and learns
        forcing = PhysisForcing(PhysicsConfig(temperature="learnable", feature_dim=width), width=10, teacher_dim=6)
        assert 0.02 <= forcing.temperature().item() <= 0.2
        assert torch.autograd.grad(forcing.temperature(), forcing.temperature_place)[0] > 1e-5


def slow_pix(forcing: PhysisForcing, hidden: torch.Tensor, grid: tuple, targets: dict, queries: list[int]) -> float:
    """Eq. (8) over several query frames: float64 loops over samples, queries, frames and points."""
    with torch.no_grad():
        features = forcing.features(hidden).double().unflatten(1, grid)
    frames, height, width = grid
    centres = cell_centres((height, width)).double()
    points = targets["points_BFN2"].double()
    total = count = 0.0
    for b in range(len(hidden)):
        for q in queries:
            for t in range(1, frames):
                for n in range(points.shape[2]):
                    seen = targets["visible_BFN"][b, t, n] and (q == 0 or targets["visible_BFN"][b, q, n])
                    if t == q or not seen or not targets["select_BN"][b, n]:
                        continue
                    look = bilinear_weights(points[b, q, n][None, None], (height, width))[0, 0] @ features[
                        b, q
                    ].flatten(0, 1)
                    mass = (features[b, t].flatten(0, 1) @ look / math.sqrt(features.shape[-1])).softmax(0)
                    aim = clamp_to_hull(points[b, t, n], (height, width))
                    total += ((mass @ centres - aim) ** 2).sum().item()
                    count += 1
    return total / count


@pytest.mark.parametrize("queries", [[0], [0, 2], [1, 3]])
def test_query_frames_against_loops(queries: list[int]) -> None:
    hidden, grid, targets = case()
    forcing = heads(query_frames=queries)
    got = forcing(hidden, grid, targets)
    assert abs(got.pix.item() - slow_pix(forcing, hidden, grid, targets, queries)) < 1e-6


def test_targets_beyond_the_hull_are_dropped_when_asked() -> None:
    hidden, grid, targets = case()
    inside = in_hull(targets["points_BFN2"], grid[1:])
    assert 0 < inside.float().mean() < 1
    dropped = heads(border="drop")(hidden, grid, targets)
    targets["visible_BFN"] = torch.cat(
        [targets["visible_BFN"][:, :1], targets["visible_BFN"][:, 1:] & inside[:, 1:]], 1
    )
    torch.testing.assert_close(dropped.pix, heads()(hidden, grid, targets).pix)


def test_noise_weighs_both_losses_down() -> None:
    hidden, grid, targets = case()
    forcing = heads(sigma_weight="linear")
    clean = forcing(hidden, grid, targets, sigma_B=torch.zeros(2))
    plain = heads()(hidden, grid, targets)
    torch.testing.assert_close((clean.pix, clean.sem), (plain.pix, plain.sem))
    half = forcing(hidden, grid, targets, sigma_B=torch.full((2,), 0.5))
    torch.testing.assert_close((half.pix, half.sem), (plain.pix / 2, plain.sem / 2))
    assert forcing(hidden, grid, targets, sigma_B=torch.ones(2)).loss == 0


# ---------------------------------------------------------------- eq. (9)-(12)


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("kind", ["l1", "margin", "mse"])
def test_relation_losses_against_loops(kind: str, remove: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(3, 7, c, generator=generator, dtype=torch.float64) + 2 for c in (5, 4))
    valid = torch.rand(3, 7, generator=generator) > 0.3
    valid[2] = False
    total = 0.0
    for b in range(2):
        chosen = [k for k in range(7) if valid[b, k]]
        rows = []
        for tokens in (student[b], teacher[b]):
            kept = tokens - tokens[chosen].mean(0) if remove else tokens
            rows.append(kept / kept.norm(dim=-1, keepdim=True))
        for i in chosen:
            for j in chosen:
                difference = abs(float(rows[0][i] @ rows[0][j] - rows[1][i] @ rows[1][j]))
                value = {"l1": difference, "margin": max(difference - 0.1, 0.0), "mse": difference**2}[kind]
                total += value / len(chosen) ** 2
    got = relation_loss(student, teacher, valid, kind=kind, margin=0.1, remove_common=remove)
    assert abs(got.item() - total / 2) < 1e-12


def test_removing_the_common_part_uncovers_what_differs() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(1, 20, 8, generator=generator)
    valid = torch.ones(1, 20, dtype=torch.bool)
    shifted = tokens + 50.0
    assert relation_loss(tokens, shifted, valid).item() > 0.5
    assert relation_loss(tokens, shifted, valid, remove_common=True).item() < 1e-4


def test_rigid_relations() -> None:
    body = torch.tensor([[3, 3, 5, -1]])
    relation, known = rigid_relation(body)
    assert relation[0, :3, :3].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert known[0].tolist() == [[True] * 3 + [False]] * 3 + [[False] * 4]
    hidden, grid, targets = case()
    forcing = heads(relations="rigid")
    out = forcing(hidden, grid, targets)
    with torch.no_grad():
        student = forcing.psi(hidden).double()
    total = 0.0
    for b in range(2):
        body_L, mask_L = targets["body_BFhw"][b].flatten(), targets["token_mask_BFhw"][b].flatten()
        chosen = [k for k in range(len(body_L)) if mask_L[k] and body_L[k] >= 0]
        unit = student[b] / student[b].norm(dim=-1, keepdim=True)
        for i in chosen:
            for j in chosen:
                total += abs(float(unit[i] @ unit[j]) - float(body_L[i] == body_L[j])) / len(chosen) ** 2
    assert abs(out.sem.item() - total / 2) < 1e-5


def test_cached_relations_are_those_of_the_features() -> None:
    hidden, grid, targets = case()
    forcing = heads()
    plain = forcing(hidden, grid, targets)
    cached = {k: v for k, v in targets.items() if k != "teacher_BFhwC"}
    index = torch.stack([torch.randperm(80, generator=torch.Generator().manual_seed(b)) for b in range(2)])
    valid = targets["token_mask_BFhw"].flatten(1).gather(1, index)
    unit = nnf.normalize(targets["teacher_BFhwC"].flatten(1, 3), dim=-1).gather(1, index[..., None].expand(-1, -1, 6))
    cached["relation_BKK"] = (unit @ unit.mT * 127).round().to(torch.int8)
    cached |= {"relation_index_BK": index, "relation_valid_BK": valid}
    got = forcing(hidden, grid, cached)
    torch.testing.assert_close(got.sem, plain.sem, atol=0.5 / 127, rtol=0)
    torch.testing.assert_close(got.pix, plain.pix)


# ---------------------------------------------------------------- views


def test_a_collage_and_separate_streams_give_the_same_losses_and_gradients() -> None:
    """A head view over two wrist views, as Fast-WAM lays them out: 320x256 pixels, tokens of 32."""
    rects = token_rects([(0, 0, 192, 256), (192, 0, 128, 128), (192, 128, 128, 128)], (320, 256), (10, 8))
    assert rects == [(0, 0, 6, 8), (6, 0, 4, 4), (6, 4, 4, 4)]
    frames = 3
    streams = [case(frames=frames, grid=rect[2:], seed=k) for k, rect in enumerate(rects)]
    canvas = torch.zeros(2, frames, 10, 8, 10)
    for (hidden, grid, _), (top, left, height, width) in zip(streams, rects, strict=True):
        canvas[:, :, top : top + height, left : left + width] = hidden.unflatten(1, grid)
    canvas = canvas.flatten(1, 3).requires_grad_()
    forcing = heads(max_tokens=500)
    out = forcing(canvas, (frames, 10, 8), [targets for _, _, targets in streams], views=rects)
    alone = [forcing(hidden.requires_grad_(), grid, targets) for hidden, grid, targets in streams]
    counts = [(t["select_BN"][:, None] & t["visible_BFN"][:, 1:]).sum().item() for _, _, t in streams]
    pix = sum(o.pix.item() * c for o, c in zip(alone, counts, strict=True)) / sum(counts)
    assert abs(out.pix.item() - pix) < 1e-6
    assert abs(out.sem.item() - sum(o.sem.item() for o in alone) / 3) < 1e-6
    gradient = torch.autograd.grad(out.loss, canvas)[0].unflatten(1, (frames, 10, 8))
    for (hidden, grid, targets), rect, count in zip(streams, rects, counts, strict=True):
        single = heads(max_tokens=500, lambda_pix=0.5 * count / sum(counts), lambda_sem=0.5 / 3)
        expected = torch.autograd.grad(single(hidden, grid, targets).loss, hidden)[0].unflatten(1, grid)
        torch.testing.assert_close(cut(gradient, rect), expected, atol=1e-7, rtol=1e-4)


def test_tiles_that_cut_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="cuts through tokens"):
        token_rects([(0, 0, 200, 256)], (320, 256), (10, 8))
    with pytest.raises(ValueError, match="not inside"):
        token_rects([(192, 0, 192, 256)], (320, 256), (10, 8))


# ---------------------------------------------------------------- eq. (13)


def flow_loss(hidden: torch.Tensor) -> torch.Tensor:
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).square().mean() * 3


def test_measured_shares_are_the_norms_of_separate_gradients() -> None:
    hidden, grid, targets = case()
    forcing = heads(lambda_pix=0.7, lambda_sem=0.3)
    forcing.measure = True
    leaf = hidden.requires_grad_()
    tapped = leaf * 1.5  # what a block gives out, not a leaf
    (flow_loss(tapped) + forcing(tapped, grid, targets).loss).backward()
    with_meter = leaf.grad.clone()
    shares = forcing.meter.shares()

    leaf.grad = None
    forcing.measure = False
    tapped = leaf * 1.5
    (flow_loss(tapped) + forcing(tapped, grid, targets).loss).backward()
    torch.testing.assert_close(with_meter, leaf.grad, atol=1e-7, rtol=1e-5)

    norms = {}
    for name, weights in (("pix", (0.7, 0.0)), ("sem", (0.0, 0.3))):
        single = heads(lambda_pix=weights[0], lambda_sem=weights[1])
        tapped = leaf.detach().mul(1.5).requires_grad_()
        norms[name] = torch.autograd.grad(single(tapped, grid, targets).loss, tapped)[0].norm()
    tapped = leaf.detach().mul(1.5).requires_grad_()
    flow = torch.autograd.grad(flow_loss(tapped), tapped)[0].norm()
    torch.testing.assert_close(shares["share_pix"], norms["pix"] / flow, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(shares["share_sem"], norms["sem"] / flow, rtol=1e-4, atol=1e-6)


def test_weights_from_gradients_keep_the_ratios_and_survive_batches_without_targets() -> None:
    hidden, grid, targets = case()
    forcing = heads(weights="gradient", ratio_pix=0.2, ratio_sem=0.1)
    empty = dict(targets)
    empty["select_BN"], empty["token_mask_BFhw"] = targets["select_BN"] & False, targets["token_mask_BFhw"] & False
    first = forcing(hidden, grid, targets)
    assert (first.metrics["lambda_pix"].item(), first.metrics["lambda_sem"].item()) == (0.5, 0.5)
    for step in range(12):
        leaf = hidden.clone().requires_grad_()
        tapped = leaf * 1.0
        (flow_loss(tapped) + forcing(tapped, grid, empty if step % 3 == 1 else targets).loss).backward()
    shares = forcing.meter.shares()
    assert abs(shares["share_pix"].item() - 0.2) < 2e-3 and abs(shares["share_sem"].item() - 0.1) < 2e-3
    resumed = heads(weights="gradient", ratio_pix=0.2, ratio_sem=0.1)
    resumed.load_state_dict(forcing.state_dict())
    torch.testing.assert_close(resumed._weights(hidden), forcing._weights(hidden), rtol=0, atol=0)
    off = heads(weights="gradient", lambda_sem=0.0)
    off.load_state_dict(forcing.state_dict())
    assert off._weights(hidden)[1] == 0


def test_a_step_that_overflowed_leaves_the_weights_alone() -> None:
    hidden, grid, targets = case()
    forcing = heads(weights="gradient")
    for bad in (1.0, float("nan"), float("inf"), 1.0):
        tapped = hidden.clone().requires_grad_() * 1.0
        (flow_loss(tapped) * bad + forcing(tapped, grid, targets).loss).backward()
        if bad == 1.0:
            kept = forcing.meter.average_3.clone()
        else:
            assert torch.equal(forcing.meter.average_3, kept)
    assert forcing._weights(hidden).isfinite().all() and forcing.meter.steps_3.tolist() == [2, 2, 2]


def test_coordinates_that_are_no_numbers_are_hidden_points() -> None:
    points, visible = (part.float() if part.is_floating_point() else part for part in tracks(frames=13))
    depth = torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    hidden = ~visible
    broken = torch.where(hidden[..., None], torch.nan, points)
    config = PhysicsConfig(min_motion=0.0)
    whole = point_targets(points, visible, depth, SIZE, GRID, config)
    other = point_targets(broken, visible, depth, SIZE, GRID, config)
    for name in ("select_BN", "visible_BFN", "token_mask_BFhw"):
        assert torch.equal(whole[name], other[name]), name
    seen = whole["visible_BFN"]
    torch.testing.assert_close(whole["points_BFN2"][seen], other["points_BFN2"][seen])
    features, grid, targets = case()
    leaf = features.requires_grad_()
    before = heads()(leaf, grid, targets)
    targets["points_BFN2"] = torch.where(targets["visible_BFN"][..., None], targets["points_BFN2"], torch.nan)
    after = heads()(leaf, grid, targets)
    after.loss.backward()
    # a point that is hidden in the first frame is not known where it is a number, either; here it is not looked up
    assert after.loss.isfinite() and leaf.grad.isfinite().all() and before.loss.isfinite()


def test_heads_in_bfloat16_are_refused() -> None:
    hidden, grid, targets = case()
    with pytest.raises(UserError, match="bfloat16"):
        heads().bfloat16()(hidden, grid, targets)


def test_wrong_choices_are_named() -> None:
    for name in CHOICES:
        with pytest.raises(UserError, match=f"physics.{name}"):
            PhysicsConfig(**{name: "nonsense"})
    with pytest.raises(UserError, match="query_frames"):
        PhysicsConfig(query_frames=[])
    with pytest.raises(UserError, match="unknown: motion, depth"):
        PhysicsConfig(unknown=["motion", "depth"])


def test_normalised_points_do_not_depend_on_the_resolution() -> None:
    pixels = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * 200
    halved = (pixels + 0.5) / 2 - 0.5
    torch.testing.assert_close(normalise_points(pixels, SIZE), normalise_points(halved, (120, 160)))
