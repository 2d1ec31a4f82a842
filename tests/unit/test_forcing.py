"""The losses as a trainer meets them: empty masks, precision, token selection, coordinates, compilation, learning."""

from __future__ import annotations

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.model import load_heads
from physisforcing.worldmodel.physics.config import PhysicsConfig
from physisforcing.worldmodel.physics.forcing import PhysisForcing
from physisforcing.worldmodel.physics.regions import latent_frame, normalise_points, to_cells, to_pixels
from physisforcing.worldmodel.physics.relation import even_order, select_tokens, token_order
from physisforcing.worldmodel.storage import save_tensors

FHW = (5, 15, 20)
TOKENS = 5 * 15 * 20


def case(batch: int = 2, points: int = 40, width: int = 24, seed: int = 0) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, TOKENS, width, generator=generator)
    targets = {
        "points_BFN2": torch.rand(batch, 5, points, 2, generator=generator),
        "visible_BFN": torch.rand(batch, 5, points, generator=generator) > 0.2,
        "select_BN": torch.rand(batch, points, generator=generator) > 0.5,
        "token_mask_BFhw": torch.rand(batch, *FHW, generator=generator) > 0.7,
        "teacher_BFhwC": torch.randn(batch, *FHW, 9, generator=generator),
    }
    return hidden, targets


def heads(**changes) -> PhysisForcing:
    torch.manual_seed(0)
    return PhysisForcing(PhysicsConfig(phi_hidden=32, psi_hidden=32, **changes), width=24, teacher_dim=9)


@pytest.mark.parametrize("kind", ["mse", "huber", "ce_gauss"])
def test_empty_masks_give_zero_and_finite_gradients(kind: str) -> None:
    hidden, targets = case()
    hidden.requires_grad_()
    targets["select_BN"] = torch.zeros_like(targets["select_BN"])
    targets["token_mask_BFhw"] = torch.zeros_like(targets["token_mask_BFhw"])
    module = heads(trajectory_loss=kind)
    out = module(hidden, FHW, targets)
    out.loss.backward()
    assert (out.loss, out.pix, out.sem) == (0.0, 0.0, 0.0)
    assert all(value == 0 for value in out.metrics.values())
    assert hidden.grad is not None and (hidden.grad == 0).all()
    assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())


def test_a_hidden_target_does_not_matter() -> None:
    hidden, targets = case()
    before = heads()(hidden, FHW, targets)
    moved = {**targets, "points_BFN2": targets["points_BFN2"].clone()}
    moved["points_BFN2"][:, 1:][~targets["visible_BFN"][:, 1:]] = 0.9
    after = heads()(hidden, FHW, moved)
    torch.testing.assert_close(before.loss, after.loss, rtol=0, atol=0)


def test_one_sample_does_not_change_the_relations_of_another() -> None:
    hidden, targets = case()
    alone = heads()(hidden[:1], FHW, {k: v[:1] for k, v in targets.items()})
    targets["token_mask_BFhw"][1] = False
    both = heads()(hidden, FHW, targets)
    torch.testing.assert_close(alone.sem, both.sem)


def test_float32_inside_autocast() -> None:
    hidden, targets = case()
    expected = heads()(hidden, FHW, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = heads()(hidden, FHW, targets)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss, expected.loss, rtol=0, atol=0)
    rounded = heads()(hidden.bfloat16(), FHW, targets)
    assert rounded.loss.dtype == torch.float32 and abs(rounded.loss - expected.loss) < 1e-2


def test_metrics_name_their_baselines() -> None:
    hidden, targets = case()
    targets["points_BFN2"] = targets["points_BFN2"][:, :1].expand(-1, 5, -1, -1).contiguous()
    metrics = heads()(hidden, FHW, targets).metrics
    assert metrics["epe_still_px"] < 1e-4
    torch.testing.assert_close(metrics["epe_px"], metrics["epe_cells"] * 16)  # 16-pixel cells on both axes
    pairs = targets["select_BN"][:, None] & targets["visible_BFN"][:, 1:]
    torch.testing.assert_close(metrics["valid"], pairs.float().mean())


@pytest.mark.parametrize("size", [(240, 320), (120, 160), (480, 640), (480, 832)])
def test_coordinates_survive_the_round_trip(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(5000, 2, generator=generator) * torch.tensor([size[1], size[0]]) - 0.5
    again = to_pixels(normalise_points(pixels, size), size)
    assert (again - pixels).abs().max() < 1e-4
    side = 8 if size == (120, 160) else 16
    grid = (size[0] // side, size[1] // side)
    cells = to_cells(normalise_points(pixels, size), grid)
    torch.testing.assert_close(cells, (pixels + 0.5) / side - 0.5, atol=1e-5, rtol=0)
    assert ((cells + 0.5) * side - 0.5 - pixels).abs().max() < 1e-4


def test_time_map() -> None:
    assert latent_frame(17).tolist() == [0, *[1] * 4, *[2] * 4, *[3] * 4, *[4] * 4]
    with pytest.raises(AssertionError):
        latent_frame(16)


def test_token_selection_is_a_spread_subset() -> None:
    _, targets = case(batch=3)
    mask = targets["token_mask_BFhw"]
    mask[1] = False
    mask[1, 2, 3, 4:9] = True
    order = token_order(3, TOKENS, torch.Generator().manual_seed(3))
    index, valid = select_tokens(mask, order, 100)
    assert index.shape == valid.shape == (3, 100)
    assert valid.sum(1).tolist() == [100, 5, 100]
    for b in range(3):
        chosen = index[b, valid[b]]
        assert mask[b].flatten()[chosen].all() and len(chosen.unique()) == len(chosen)
    per_frame = (index[0] // 300).bincount(minlength=5)
    assert per_frame.tolist() == [20] * 5
    again, _ = select_tokens(mask, token_order(3, TOKENS, torch.Generator().manual_seed(3)), 100)
    other, _ = select_tokens(mask, token_order(3, TOKENS, torch.Generator().manual_seed(4)), 100)
    assert (again == index).all() and not (other == index).all()
    everything, all_valid = select_tokens(mask, even_order(3, TOKENS), 5000)
    assert everything.shape == (3, TOKENS) and all_valid.sum() == mask.sum()


def test_the_loss_is_one_graph_with_static_shapes() -> None:
    hidden, targets = case()
    module = heads()
    order = token_order(2, TOKENS, torch.Generator().manual_seed(0))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    eager, traced = (f(hidden.clone().requires_grad_(), FHW, targets, order) for f in (module, compiled))
    torch.testing.assert_close(eager.loss, traced.loss)


def test_the_features_learn_to_follow_points() -> None:
    """Textures that move by whole cells, hidden in random features: training phi alone finds the correspondence."""
    generator = torch.Generator().manual_seed(2)
    texture = torch.randn(FHW[1], FHW[2], 24, generator=generator)
    clip = torch.stack([torch.roll(texture, (k, 2 * k), (0, 1)) for k in range(5)])[None]
    hidden = (clip + 0.3 * torch.randn(clip.shape, generator=generator)).reshape(1, TOKENS, 24)
    cell = torch.tensor([[x, y] for y in range(2, 10) for x in range(2, 11)], dtype=torch.float32)
    steps = torch.tensor([[2.0 * k, 1.0 * k] for k in range(5)])
    points = ((cell[None] + steps[:, None]) + 0.5) / torch.tensor([20.0, 15.0])
    count = len(cell)
    targets = {
        "points_BFN2": points[None],
        "visible_BFN": torch.ones(1, 5, count, dtype=torch.bool),
        "select_BN": torch.ones(1, count, dtype=torch.bool),
        "token_mask_BFhw": torch.zeros(1, *FHW, dtype=torch.bool),
        "teacher_BFhwC": torch.zeros(1, *FHW, 9),
    }
    torch.manual_seed(1)
    module = PhysisForcing(PhysicsConfig(phi_hidden=64), width=24, teacher_dim=9)
    optimizer = torch.optim.Adam(module.phi.parameters(), lr=2e-3)
    before = module(hidden, FHW, targets).metrics
    for _ in range(60):
        optimizer.zero_grad()
        module(hidden, FHW, targets).loss.backward()
        optimizer.step()
    after = module(hidden, FHW, targets).metrics
    assert after["epe_px"] < before["epe_px"] and after["epe_px"] < before["epe_uniform_px"]
    assert after["epe_cells"] < 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [("motion", "paths"), ("depth", "metre"), ("select", "median"), ("trajectory_loss", "mae")],
)
def test_a_typo_offers_the_nearest_name(field: str, value: str) -> None:
    with pytest.raises(UserError, match=f"physics.{field}"):
        PhysicsConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("depth_eps", 0.0), ("lambda_pix", -1.0), ("max_tokens", 1)])
def test_impossible_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"physics.{field}"):
        PhysicsConfig(**{field: value})


def test_heads_of_a_model_with_another_temperature(tmp_path) -> None:
    fixed, learnable = heads(), heads(temperature="learnable")
    for name, module in (("fixed", fixed), ("learnable", learnable)):
        (tmp_path / name).mkdir()
        save_tensors(module.state_dict(), tmp_path / name / "physics_heads.safetensors")
    started = heads(temperature="learnable")
    load_heads(started, tmp_path / "fixed")
    assert torch.equal(started.phi[1].weight, fixed.phi[1].weight)
    assert started.temperature() is not None and abs(started.temperature().item() - 0.0625) < 1e-6
    with pytest.raises(UserError, match=r"physics\.temperature"):
        load_heads(heads(), tmp_path / "learnable")
