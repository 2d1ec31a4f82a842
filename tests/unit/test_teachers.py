"""Teachers over transformers' models, with tiny random weights: what they see, and what they answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VJEPA2Model

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.teachers import depth_anything, frame_encoder, preprocess, vjepa2
from physisforcing.worldmodel.teachers.depth_anything import DepthAnything
from physisforcing.worldmodel.teachers.protocols import DepthEstimator, TeacherInfo, VideoEncoder
from physisforcing.worldmodel.teachers.registry import TeacherConfig, make_encoder
from physisforcing.worldmodel.teachers.vjepa2 import VJepa2
from tiny_teachers import ENCODERS, GRID, depth_config, noise, vjepa2_config

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def pillow(frame_HWC: np.ndarray, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """Pillow's antialiased resampling of each channel in float: [H,W,3] -> [*size,3]."""
    channels = [Image.fromarray(frame_HWC[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(one.resize(size[::-1], resample)) for one in channels], -1)


def linear(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation of one axis to ``size``, x' = (x + .5) s - .5, borders repeated, no antialiasing."""
    x = np.clip((np.arange(size) + 0.5) * values.shape[axis] / size - 0.5, 0, values.shape[axis] - 1)
    low = np.floor(x).astype(int)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    part = (x - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return values.take(low, axis) * (1 - part) + values.take(high, axis) * part


# What all encoders do


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_answers_on_the_token_grid(name: str) -> None:
    teacher = ENCODERS[name]()
    assert isinstance(teacher, VideoEncoder) and isinstance(teacher.info, TeacherInfo)
    found = teacher.encode(noise(2, 9, 40, 70, 3), GRID)
    assert found.shape == (2, *GRID, 48) and teacher.channels == 48
    assert found.dtype == torch.float32 and found.isfinite().all() and not found.requires_grad
    assert found.flatten(0, 3).std(0).min() > 0.05, "tokens differ"
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.model.training


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_depends_on_its_seed_and_on_nothing_else(name: str) -> None:
    video = noise(2, 9, 40, 70, 3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ENCODERS[name]().encode(video, GRID)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(2)
    again = ENCODERS[name](batch=2).encode(video, GRID)
    torch.testing.assert_close(first, again, rtol=0, atol=1e-4)
    alone = ENCODERS[name]().encode(video[1:], GRID)
    torch.testing.assert_close(alone[0], first[1], rtol=0, atol=1e-4)
    assert (ENCODERS[name](seed=1).encode(video, GRID) - first).abs().mean() > 0.1


@pytest.mark.parametrize("name", ENCODERS)
def test_bfloat16_is_close_and_has_another_key(name: str) -> None:
    video, exact, fast = noise(1, 9, 40, 70, 3), ENCODERS[name](), ENCODERS[name](dtype=torch.bfloat16)
    a, b = exact.encode(video, GRID), fast.encode(video, GRID)
    assert b.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() > 0.99
    assert fast.info.key == exact.info.key.replace("/random0", "-bfloat16/random0") != exact.info.key


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_refuses_what_is_no_video_of_the_grid(name: str) -> None:
    teacher = ENCODERS[name]()
    for video in (noise(1, 8, 40, 70, 3), noise(9, 40, 70, 3), noise(1, 9, 3, 40, 70), noise(1, 9, 40, 70, 3).float()):
        with pytest.raises(UserError, match=r"video: .* wanted uint8 \[B,9,H,W,3\] for 3 latent frames"):
            teacher.encode(video, GRID)
    with pytest.raises(UserError, match="grid"):
        teacher.encode(noise(1, 9, 40, 70, 3), (3, 0, 5))


@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_dino_sees_frame_4k_one_patch_a_token_and_nothing_else(name: str) -> None:
    teacher, video = ENCODERS[name](), noise(1, 9, 61, 83, 3)
    patch, kind, prefix = (14, Image.Resampling.BICUBIC, 1) if name == "dinov2" else (16, Image.Resampling.BILINEAR, 5)
    found = teacher.encode(video, GRID)
    for k in range(3):
        picture = pillow(video[0, 4 * k].numpy(), (2 * patch, 5 * patch), kind).clip(0, 255)
        pixels = torch.from_numpy(((picture / 255 - MEAN) / STD).transpose(2, 0, 1)).float()[None]
        with torch.no_grad():
            expected = teacher.model(pixel_values=pixels).last_hidden_state[0, prefix:].unflatten(0, (2, 5))
        torch.testing.assert_close(found[0, k], expected, rtol=0, atol=2e-3)


# V-JEPA 2: frames and positions


def test_frames_of_the_aligned_mode() -> None:
    assert vjepa2.aligned_frames(1) == [0, 0]
    assert vjepa2.aligned_frames(4) == [0, 0, 2, 4, 6, 8, 10, 12]
    assert len(vjepa2.aligned_frames(21)) == 42 and vjepa2.aligned_frames(21)[-2:] == [78, 80]
    teacher, video = ENCODERS["vjepa2"](), noise(1, 9, 32, 80, 3)
    found = teacher.encode(video, GRID)
    unused, used = video.clone(), video.clone()
    unused[:, [1, 3, 5, 7]] = 0
    used[:, 2] = 0
    assert torch.equal(teacher.encode(unused, GRID), found)
    assert (teacher.encode(used, GRID) - found).abs().amax((0, 2, 3, 4)).min() > 0.05


def test_frames_of_the_resize_mode() -> None:
    assert vjepa2.uniform_frames(64, 64) == list(range(64))
    assert vjepa2.uniform_frames(2, 4) == [0, 0, 1, 1]
    centres = (np.arange(64) + 0.5) * 81 / 64
    assert vjepa2.uniform_frames(81, 64) == np.floor(centres).astype(int).tolist()


@pytest.mark.parametrize("grid", [(3, 2, 5), (2, 5, 3), (4, 7, 7), (1, 1, 9), (21, 15, 20)])
def test_positions_of_a_grid(grid: tuple[int, int, int]) -> None:
    ids = np.unravel_index(np.arange(np.prod(grid)), grid)
    assert all(
        np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(vjepa2.grid_positions(grid), ids, strict=True)
    )


@pytest.mark.parametrize("grid", [(3, 2, 5), (2, 7, 3), (5, 6, 6)])
def test_the_positions_reach_every_layer(grid: tuple[int, int, int]) -> None:
    """Against transformers' own path for masked tokens, in a crop that holds the grid: there the ids can be given."""
    teacher, side = VJepa2.from_config(vjepa2_config()), max(grid[1:])
    stock = VJEPA2Model(vjepa2_config(crop_size=16 * side)).eval()
    stock.load_state_dict(teacher.model.state_dict(), strict=False)
    pictures = torch.randn(2, 2 * grid[0], 3, 16 * grid[1], 16 * grid[2], generator=torch.Generator().manual_seed(3))
    tubelet, row, column = np.indices(grid).reshape(3, -1)
    ids = torch.from_numpy((tubelet * side + row) * side + column)[None].repeat(2, 1)
    with torch.no_grad():
        x = stock.encoder.embeddings(pictures)
        for layer in stock.encoder.layer:
            x = layer(x, ids)[0]
        expected = stock.encoder.layernorm(x).unflatten(1, grid)
    torch.testing.assert_close(teacher.features(pictures), expected, rtol=0, atol=1e-4)
    # The test can tell: rows and columns exchanged are far away.
    swapped = torch.from_numpy((tubelet * side + column) * side + row)[None].repeat(2, 1)
    with torch.no_grad():
        x = stock.encoder.embeddings(pictures)
        for layer in stock.encoder.layer:
            x = layer(x, swapped)[0]
    assert (stock.encoder.layernorm(x).unflatten(1, grid) - expected).abs().mean() > 0.02


def test_on_the_models_own_grid_nothing_changes() -> None:
    teacher = VJepa2.from_config(vjepa2_config())
    stock = VJEPA2Model(vjepa2_config()).eval()
    stock.load_state_dict(teacher.model.state_dict(), strict=False)
    pictures = torch.randn(1, 8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = stock(pictures, skip_predictor=True).last_hidden_state
    assert torch.equal(teacher.features(pictures).flatten(1, 3), expected)


def test_a_transposed_video_gives_transposed_features() -> None:
    """With a twin whose rows are columns: patches transposed, the rotary channels of rows and columns exchanged."""
    teacher, twin = VJepa2.from_config(vjepa2_config()), VJepa2.from_config(vjepa2_config())
    third = 4  # channels a head of 12 gives to tubelets, to rows and to columns
    order = torch.arange(48).view(4, 3, third)[:, [0, 2, 1]].flatten()
    with torch.no_grad():
        embedding = twin.model.encoder.embeddings.patch_embeddings.proj.weight
        embedding.copy_(embedding.transpose(-1, -2).clone())
        for layer in twin.model.encoder.layer:
            for part in (layer.attention.query, layer.attention.key):
                part.weight.copy_(part.weight[order].clone())
                part.bias.copy_(part.bias[order].clone())
    video = noise(1, 9, 48, 112, 3)
    found = teacher.encode(video, (3, 3, 7))
    mirrored = twin.encode(video.transpose(2, 3), (3, 7, 3)).transpose(2, 3)
    torch.testing.assert_close(mirrored, found, rtol=0, atol=1e-4)
    assert (twin.encode(video, (3, 3, 7)) - found).abs().mean() > 0.05, "the twin is another network"


def test_any_number_of_grids_in_a_row() -> None:
    teacher = VJepa2.from_config(vjepa2_config())
    first = teacher.encode(noise(1, 9, 32, 80, 3), GRID)
    for grid in ((1, 1, 1), (2, 9, 4), (6, 2, 2)):
        assert teacher.encode(noise(1, 1 + 4 * (grid[0] - 1), 50, 50, 3), grid).shape == (1, *grid, 48)
    assert torch.equal(teacher.encode(noise(1, 9, 32, 80, 3), GRID), first)


def test_a_transformers_that_computes_positions_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = VJepa2.from_config(vjepa2_config())
    for attention in teacher._attentions:
        monkeypatch.setattr(attention, "get_position_ids", lambda x, masks=None: vjepa2.grid_positions((1, 2, 5)))
    with pytest.raises(RuntimeError, match="get_position_ids"):
        teacher.encode(noise(1, 1, 32, 80, 3), (1, 2, 5))


def test_the_resize_mode_is_the_papers() -> None:
    teacher, video = ENCODERS["vjepa2_resize"](), noise(1, 25, 48, 80, 3)
    stock = VJEPA2Model(vjepa2_config()).eval()
    stock.load_state_dict(teacher.model.state_dict(), strict=False)
    frames = [int((i + 0.5) * 25 / 8) for i in range(8)]
    pictures = [pillow(video[0, t].numpy(), (64, 64), Image.Resampling.BILINEAR) for t in frames]
    pixels = torch.from_numpy(((np.stack(pictures) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).float()[None]
    with torch.no_grad():
        features = stock(pixels, skip_predictor=True).last_hidden_state[0].unflatten(0, (4, 4, 4)).numpy()
    for axis, size in enumerate((7, 3, 5)):
        features = linear(features, size, axis)
    np.testing.assert_allclose(teacher.encode(video, (7, 3, 5))[0].numpy(), features, atol=3e-3)


def test_aligned_needs_tubelets_of_two() -> None:
    with pytest.raises(UserError, match="mode=resize"):
        VJepa2.from_config(vjepa2_config(tubelet_size=4))
    with pytest.raises(UserError, match="did you mean 'aligned'"):
        VJepa2.from_config(vjepa2_config(), mode="alined")
    assert VJepa2.from_config(vjepa2_config(tubelet_size=4), mode="resize").channels == 48


# Depth


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (518, 686)),
        ((240, 320), (518, 686)),
        ((480, 832), (518, 896)),
        ((720, 1280), (518, 924)),
        ((640, 480), (686, 518)),
        ((518, 518), (518, 518)),
        ((1000, 1040), (518, 532)),
    ],
)
def test_size_that_depth_anything_sees(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert depth_anything.network_size(*size) == expected


def test_depth_against_an_independent_pipeline() -> None:
    teacher, frames = DepthAnything.from_config(depth_config()), noise(1, 30, 40, 3)
    teacher.model.head.conv3.bias.fill_(3.0)  # random weights end below the last ReLU here and there
    assert isinstance(teacher, DepthEstimator) and teacher.kind == "disparity"
    picture = pillow(frames[0].numpy(), (518, 686), Image.Resampling.BICUBIC).clip(0, 255)
    pixels = torch.from_numpy(((picture / 255 - MEAN) / STD).transpose(2, 0, 1)).float()[None]
    with torch.no_grad():
        expected = teacher.model(pixel_values=pixels).predicted_depth[0].numpy()
    assert expected.shape == (518, 686)
    expected = linear(linear(expected, 30, 0), 40, 1)
    found = teacher.depth(frames)
    assert found.dtype == torch.float32 and found.shape == (1, 30, 40)
    assert expected.std() > 0.01
    np.testing.assert_allclose(found[0].numpy(), expected, atol=0.01 * expected.std())


def test_depth_does_not_depend_on_the_batch() -> None:
    frames = noise(3, 28, 28, 3)
    together = DepthAnything.from_config(depth_config(), batch=3).depth(frames)
    apart = DepthAnything.from_config(depth_config(), batch=2).depth(frames)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_metric_models_say_so() -> None:
    teacher = DepthAnything.from_config(depth_config(depth_estimation_type="metric", max_depth=20))
    assert teacher.kind == "metric" and "metric" in teacher.info.name
    found = teacher.depth(noise(1, 28, 28, 3))
    assert found.min() > 0 and found.max() < 20


def test_depth_refuses_what_is_no_picture() -> None:
    teacher = DepthAnything.from_config(depth_config())
    for frames in (noise(1, 3, 28, 28), noise(28, 28, 3), noise(1, 28, 28, 3).float(), noise(0, 28, 28, 3)):
        with pytest.raises(UserError, match="frames: got"):
            teacher.depth(frames)


@pytest.mark.parametrize(("width", "licence"), [(384, "Apache-2.0"), (768, "CC-BY-NC-4.0"), (24, "CC-BY-NC-4.0")])
def test_licence_by_the_width_of_the_backbone(width: int, licence: str) -> None:
    assert depth_anything.licence_of(depth_config(width)) == licence


def test_the_paper_configs() -> None:
    config = depth_anything.vitl_config()
    assert config.backbone_config.hidden_size == 1024 and config.backbone_config.out_indices == [5, 12, 18, 24]
    assert depth_anything.licence_of(config) == "CC-BY-NC-4.0"


# Pictures


def test_normalisation_constants() -> None:
    frames = torch.stack([torch.zeros(2, 2, 3), torch.full((2, 2, 3), 255.0)]).to(torch.uint8)
    black, white = preprocess.normalised(frames, (2, 2), "bilinear", "cpu")[:, :, 0, 0]
    np.testing.assert_allclose(black, -MEAN / STD, rtol=1e-6)
    np.testing.assert_allclose(white, (1 - MEAN) / STD, rtol=1e-6)


@pytest.mark.parametrize("size", [(37, 23), (90, 150)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resampling_is_pillows(mode: str, size: tuple[int, int]) -> None:
    frame = noise(61, 83, 3)
    found = preprocess.resized(frame.permute(2, 0, 1)[None].float(), size, mode)[0].permute(1, 2, 0)
    expected = pillow(frame.numpy(), size, Image.Resampling[mode.upper()]).clip(0, 255)
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert found.min() >= 0 and found.max() <= 255


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def frames_encoder() -> frame_encoder.FrameEncoder:
    try:
        frame_encoder.packaged_weights()
    except UserError as error:
        pytest.skip(str(error))
    return make_encoder(TeacherConfig(name="efficientnet_lite0"), permissive_only=True)


def test_the_frame_encoder_is_a_video_encoder(frames_encoder: frame_encoder.FrameEncoder) -> None:
    assert isinstance(frames_encoder, VideoEncoder) and frames_encoder.channels == 112
    assert frame_encoder.FINGERPRINT == "efficientnet-lite0/stride16/imagenet/579344248a93", "caches depend on it"
    assert frames_encoder.info.key == frame_encoder.FINGERPRINT and frames_encoder.info.permissive
    video = noise(2, 9, 32, 80, 3)
    found = frames_encoder.encode(video, GRID)
    assert found.shape == (2, *GRID, 112) and found.dtype == torch.float32
    expected = frames_encoder(video[1, [0, 4, 8]]).permute(0, 2, 3, 1)
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-4)
    smooth = torch.nn.functional.interpolate(video[0].permute(0, 3, 1, 2).float(), scale_factor=2, mode="bilinear")
    larger = smooth.round().to(torch.uint8).permute(0, 2, 3, 1)[None]
    assert frames_encoder.encode(larger, GRID).shape == (1, *GRID, 112)
    with pytest.raises(UserError, match="video"):
        frames_encoder.encode(video[:, :8], GRID)
