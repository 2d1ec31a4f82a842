"""Features of one partial forward pass: what full forwards compute at the same blocks, nothing behind the last of them."""

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.features import denoiser_features, first_pass
from physisforcing.worldmodel.model import FlowWorldModel

TINY = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=4, ffn_dim=32, tap=2)


def tiny_denoiser():
    torch.manual_seed(0)
    model = build_denoiser(TINY, ConditionerConfig(hidden=16)).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def stock(**changes):
    """A stock transformer with TI2V-5B's patches and many channels, small."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(1)
    size = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 5, "text_dim": 16}
    return WanTransformer3DModel(patch_size=(1, 2, 2), in_channels=6, out_channels=6, **(size | changes)).eval()


def latents(batch=2, channels=4, frames=3, height=4, width=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(batch, channels, 1, height, width, generator=generator)
    return first, torch.randn(batch, channels, frames, height, width, generator=generator)


def counted(transformer):
    calls = []
    for block in transformer.blocks:
        block.ffn.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_features_are_bit_equal_to_hooks_on_the_whole_denoiser_and_later_blocks_do_not_run():
    model, (first, noise) = tiny_denoiser(), latents()
    context = torch.randn(2, 35, 384, generator=torch.Generator().manual_seed(3))
    captured = {}
    hooks = [  # the input of a block's first norm is the output of the block before
        block.norm1.register_forward_pre_hook(lambda _m, args, at=at: captured.__setitem__(at, args[0].clone()))
        for at, block in enumerate(model.transformer.blocks)
    ]
    request = FeatureRequest(taps=(1, 3))
    x, timesteps = first_pass(first, noise, request)
    model(x, timesteps, context)
    for hook in hooks:
        hook.remove()
    calls = counted(model.transformer)
    found = denoiser_features(model.transformer, first, noise, context, request)
    assert found.shape == (2, 2, 3, 4, 6, 24) and len(calls) == 3
    for place, tap in enumerate(request.taps):
        assert torch.equal(found[:, place].flatten(1, 3), captured[tap])


@torch.no_grad()
@pytest.mark.parametrize("mask", ["correct", "worldarena_compat"])
def test_features_of_a_stock_transformer_are_those_of_its_own_forward(mask):
    model, (first, noise) = stock(), latents(channels=6)
    text = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))
    request = FeatureRequest(taps=(2, 3), sigma=0.98, first_frame_mask=mask)
    x, timesteps = first_pass(first, noise, request)
    captured = {}
    hooks = [
        model.blocks[tap - 1].register_forward_hook(lambda _m, _i, out, tap=tap: captured.__setitem__(tap, out))
        for tap in request.taps
    ]
    model(x, timesteps.repeat_interleave(2 * 3, dim=1), text, return_dict=False)
    for hook in hooks:
        hook.remove()
    calls = counted(model)
    found = denoiser_features(model, first, noise, text, request)
    assert found.shape == (2, 2, 3, 2, 3, 24) and len(calls) == 3, "blocks 4 and 5 are not computed"
    for place, tap in enumerate(request.taps):
        torch.testing.assert_close(found[:, place].flatten(1, 3), captured[tap], atol=1e-5, rtol=1e-5)
    assert (captured[3] - captured[2]).abs().max() > 1e-3


@torch.no_grad()
def test_half_precision_stays_half():
    model, (first, noise) = stock().to(torch.bfloat16), latents(channels=6)
    text = torch.randn(2, 7, 16)
    found = denoiser_features(model, first, noise, text, FeatureRequest(taps=(2,)))
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())


def test_correct_inputs_are_the_picture_and_noise():
    first, noise = latents(frames=5)
    x, timesteps = first_pass(first, noise, FeatureRequest(taps=(1,), sigma=0.95))
    assert torch.equal(x[:, :, 0], first[:, :, 0]) and torch.equal(x[:, :, 1:], noise[:, :, 1:])
    assert timesteps.tolist() == [[0.0, 950.0, 950.0, 950.0, 950.0]] * 2


def test_compat_inputs_are_those_of_a_mask_on_the_wrong_axis():
    first, noise = latents(batch=1, channels=6, frames=5)
    mask = torch.ones_like(noise)
    mask[:, 0] = 0  # made for [C,F,h,w], used on [B,C,F,h,w]
    expected = (1 - mask) * first + mask * noise
    per_token = (mask[0, 0][:, ::2, ::2] * 1000.0).flatten()
    x, timesteps = first_pass(first, noise, FeatureRequest(taps=(1,), first_frame_mask="worldarena_compat"))
    assert torch.equal(x, expected)
    assert torch.equal(timesteps.repeat_interleave(6, dim=1)[0], per_token) and not per_token.any()
    share = (x == first.expand_as(x)).float().mean().item()
    assert share == pytest.approx(1 / 6), "one channel of the picture, in every frame"


@torch.no_grad()
def test_the_picture_reaches_later_frames_only_through_the_blocks():
    model, (first, noise) = stock(), latents(channels=6)
    text = torch.zeros(2, 7, 16)
    changed = first + 1.0
    outputs = {}
    for mask in ("correct", "worldarena_compat"):
        request = FeatureRequest(taps=(1, 5), first_frame_mask=mask)
        before, after = (denoiser_features(model, z, noise, text, request) for z in (first, changed))
        outputs[mask] = (after - before).abs().amax(dim=(0, 2, 3, 4, 5))
    assert (outputs["correct"] > 1e-3).all() and (outputs["worldarena_compat"] > 1e-3).all()


class FixedText:
    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        return torch.stack(rows), torch.ones(len(rows), 32, dtype=torch.bool)


class StripeCodec:
    """Latents that need no autoencoder: 8x8 means of the picture's colours, and of their sum."""

    latent_channels = 4

    def encode(self, frames_BTHWC):
        x = frames_BTHWC[:, :1].float().div(255).movedim(-1, 1)
        cells = torch.nn.functional.avg_pool3d(x, (1, 8, 8))
        return torch.cat([cells, cells.sum(1, keepdim=True)], dim=1)

    def decode(self, latents_BCFhw):
        raise AssertionError("nothing is decoded where features alone are asked for")


def world_model():
    settings = {"name": "tiny", "frames": 17, "frame_stride": 2, "sample_shift": 3.0, "denoising_steps": 2}
    return FlowWorldModel(tiny_denoiser(), StripeCodec(), settings, weights_fingerprint="x", text=FixedText())


def request(seeds, **changes):
    values = {
        "context_BVTHWC": np.random.default_rng(0).integers(0, 256, (1, 1, 1, 120, 160, 3), dtype=np.uint8),
        "instructions": ["click the bell"],
        "seeds_BS": np.asarray(seeds, dtype=np.int64),
        "horizon": 17,
        "proprioception_BKA": np.zeros((1, 3, 14), np.float32),
        "returns": frozenset({"features"}),
        "features": FeatureRequest(taps=(1, 3)),
    }
    return RolloutRequest(**{**values, **changes})


def test_a_rollout_of_features_denoises_nothing_and_depends_on_the_seed_alone():
    model = world_model()
    assert model.spec.blocks == 4 and "features" in model.spec.returns
    calls = counted(model.denoiser.transformer)
    alone = model.rollout(request([[7]]))
    assert len(calls) == 3 and alone.cost["denoiser_calls"] == pytest.approx(3 / 4)
    assert alone.features_BSKFhwD.shape == (1, 1, 2, 5, 15, 20, 24) and alone.features_BSKFhwD.dtype == np.float32
    assert alone.frames_BSVTHWC is None and alone.latents_BSCFhw is None
    both = model.rollout(request([[3, 7]]))
    assert np.array_equal(alone.features_BSKFhwD[0, 0], both.features_BSKFhwD[0, 1])
    assert not np.array_equal(both.features_BSKFhwD[0, 0], both.features_BSKFhwD[0, 1])
    more = model.rollout(request([[7]], returns=frozenset({"features", "latents"})))
    assert np.array_equal(more.features_BSKFhwD, alone.features_BSKFhwD) and more.latents_BSCFhw is not None
    assert more.cost["denoiser_calls"] == pytest.approx(2 + 3 / 4)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"features": None}, UserError, "features: got None"),
        ({"features": FeatureRequest(taps=(1, 5))}, MissingCapabilityError, "blocks 1..4"),
        ({"features": FeatureRequest(taps=())}, UserError, "taps"),
        ({"features": FeatureRequest(taps=(3, 1))}, UserError, "rising"),
        ({"features": FeatureRequest(taps=(1,), sigma=0.0)}, UserError, "sigma"),
        ({"features": FeatureRequest(taps=(1,), first_frame_mask="compat")}, UserError, "worldarena_compat"),
        ({"returns": frozenset({"latents"})}, UserError, "among returns"),
    ],
)
def test_features_it_cannot_give_are_errors(changes, error, match):
    with pytest.raises(error, match=match):
        world_model().rollout(request([[0]], **changes))
