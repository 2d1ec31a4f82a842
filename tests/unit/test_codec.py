"""The video codecs: shapes, causality, normalisation, and that a few steps learn."""

import pytest
import torch

from physisforcing.core.errors import UserError
from physisforcing.worldmodel.codec import VideoCodec, WanVaeCodec, latent_frames, load_codec, to_uint8, to_unit_range
from physisforcing.worldmodel.storage import save_diffusers

SMALL = {
    "latent_channels": 4,
    "fine_channels": 16,
    "decoder_fine_channels": 16,
    "coarse_channels": 16,
    "group_channels": 16,
    "fine_blocks": 1,
    "decoder_fine_blocks": 1,
}


def pictures(frames: int, seed: int = 0, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, frames, *size, 3), generator=generator, dtype=torch.uint8)


def own_codec():
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder

    torch.manual_seed(0)
    model = CausalVideoAutoencoder(**SMALL)
    for parameter in model.parameters():  # second convolutions start at zero: make every path count
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_statistics(torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4))
    return model.eval()


def wan_codec():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 2, 2], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    return WanVaeCodec(vae)


@pytest.mark.parametrize("make", [own_codec, wan_codec])
def test_shapes_and_causality(make):
    codec = make()
    assert isinstance(codec, VideoCodec)
    window = pictures(9)
    z = codec.encode(window)
    assert z.shape == (1, codec.latent_channels, 3, 4, 6) and z.dtype == torch.float32
    torch.testing.assert_close(codec.encode(window[:, :1]), z[:, :, :1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(codec.encode(window[:, :5]), z[:, :, :2], atol=2e-5, rtol=1e-4)
    for frame in range(9):
        changed = window.clone()
        changed[:, frame] = 255 - changed[:, frame]
        moved = (codec.encode(changed) - z).abs().amax((0, 1, 3, 4)) > 1e-4
        first = latent_frames(4 * ((frame + 3) // 4) + 1) - 1
        assert not moved[:first].any(), f"frame {frame} reaches back to a latent before {first}"
        assert moved[first], f"frame {frame} does not reach latent {first}"
    video = codec.decode(z)
    assert video.shape == (1, 9, 32, 48, 3) and video.min() >= 0 and video.max() <= 1
    torch.testing.assert_close(codec.decode(z[:, :, :2]), video[:, :5], atol=2e-5, rtol=1e-4)


def test_windows_must_be_4k_plus_1():
    assert [latent_frames(n) for n in (1, 5, 17)] == [1, 2, 5]
    with pytest.raises(UserError, match="5 or 9"):
        own_codec().encode(pictures(6))


def test_normalisation_is_the_stored_one():
    codec = own_codec()
    mean, _ = codec.posterior(to_unit_range(pictures(5)))
    wanted = (mean - torch.linspace(-1, 1, 4).view(1, 4, 1, 1, 1)) / torch.linspace(0.5, 2, 4).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(codec.encode(pictures(5)), wanted)


def test_colours_survive_the_conversions_exactly():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(1, 1, 16, 16, 3)
    back = to_uint8((to_unit_range(every).movedim(2, -1) + 1) / 2)
    assert torch.equal(back, every)


def test_saved_codec_loads_and_refuses_foreign_weights(tmp_path):
    codec = own_codec()
    save_diffusers(codec, tmp_path / "a")
    loaded = load_codec(tmp_path / "a")
    assert torch.equal(loaded.encode(pictures(5)), codec.encode(pictures(5)))
    from safetensors.torch import load_file, save_file

    path = tmp_path / "a" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["renamed"] = state.pop("decode_in.bias")
    save_file(state, path)
    with pytest.raises(UserError, match=r"decode_in\.bias"):
        load_codec(tmp_path / "a")
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(tmp_path / "nowhere")


def test_shipped_size_is_below_6_megabytes():
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder

    parameters = sum(parameter.numel() for parameter in CausalVideoAutoencoder().parameters())
    assert 2 * parameters < 5.95e6


def test_a_few_steps_reduce_the_loss_and_what_moves_weighs_more():
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder
    from physisforcing.worldmodel.training.config import VaeLossConfig
    from physisforcing.worldmodel.training.vae import motion_map, train_step_terms

    torch.manual_seed(0)
    model = CausalVideoAutoencoder(**SMALL)
    window = torch.full((1, 5, 32, 48, 3), 90, dtype=torch.uint8)
    window[:, 2:, 8:16, 8:16] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    moving = motion_map(to_unit_range(window))[0, 4, 0]
    assert moving[8:16, 8:16].min() == 1.0 and moving[:, 32:].max() == 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    noise = torch.randn(1, 4, 2, 4, 6)
    losses = []
    for _ in range(30):
        terms = train_step_terms(model, window, noise, VaeLossConfig())
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.6 * losses[0]
