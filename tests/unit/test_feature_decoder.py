"""The feature decoder: published size, EDM preconditioning and DDIM against closed forms, determinism, files, refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.protocols import InverseDynamics
from physisforcing.core.types import DT, Rollout
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.feature_decoder.action_head import ActionHead
from physisforcing.planner.feature_decoder.config import (
    PRESETS,
    ActionHeadConfig,
    FeatureDecoderConfig,
    ResamplerConfig,
    SamplingConfig,
    preset,
    worldarena,
)
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics, chunk_of
from physisforcing.planner.feature_decoder.files import load_feature_decoder, save_feature_decoder
from physisforcing.planner.feature_decoder.goal import embed_goals, fit_goal
from physisforcing.planner.feature_decoder.resampler import Resampler
from physisforcing.planner.feature_decoder.sampling import (
    ddim,
    exponential_sigmas,
    preconditioning,
    training_sigmas,
)


def small(**changes) -> FeatureDecoderConfig:
    values = {
        "taps": (1, 3),
        "feature_dim": 24,
        "latent_frames": 3,
        "grid": (2, 3),
        "frames": 9,
        "goal_dim": 12,
        "goal_tokens": 5,
        "resampler": ResamplerConfig(width=32, depth=2, heads=2, head_dim=8, latents_per_frame=3),
        "head": ActionHeadConfig(width=32, encoder_layers=1, decoder_layers=2, heads=4),
        "sampling": SamplingConfig(steps=5, draws=3),
    }
    return FeatureDecoderConfig(**(values | changes))


class Words:
    """Token embeddings that need no encoder: as many tokens as words."""

    def batch(self, sentences):
        tokens = torch.zeros(len(sentences), 8, 12)
        mask = torch.zeros(len(sentences), 8, dtype=torch.bool)
        for row, sentence in enumerate(sentences):
            for place, word in enumerate(sentence.split()[:8]):
                tokens[row, place] = torch.randn(12, generator=torch.Generator().manual_seed(len(word)))
                mask[row, place] = True
        return tokens, mask


def decoder(seed=0, **changes) -> FeatureInverseDynamics:
    torch.manual_seed(seed)
    model = FeatureInverseDynamics(small(**changes), Words()).eval()
    # what starts at zero would hide everything before it
    for layer in model.head.decoder:
        torch.nn.init.normal_(layer.modulation[1].weight, std=0.2)
    torch.nn.init.normal_(model.head.write_rows.weight, std=0.2)
    model.set_statistics(torch.linspace(-1, 1, 14), torch.linspace(0.1, 0.5, 14), torch.linspace(0.2, 0.6, 14))
    return model


def rollout(batch=2, samples=2, seed=0, config=None):
    c = config or small()
    rng = np.random.default_rng(seed)
    shape = (batch, samples, len(c.taps), c.latent_frames, *c.grid, c.feature_dim)
    times = np.arange(c.frames) * c.steps_per_frame * DT
    return Rollout(times_T=times, features_BSKFhwD=rng.normal(size=shape).astype(np.float32))


SAID = ["click the bell", "lift the bottle"]


# --- size and geometry -----------------------------------------------------------------------------------------------


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize("proprioception", [False, True])
def test_published_size(proprioception):
    with torch.device("meta"):
        model = FeatureInverseDynamics(worldarena(proprioception=proprioception))
    # published: 20.47 and 28.13, 48.60 together; the resampler is that and a row and a column a token
    places = (model.resampler.row.numel() + model.resampler.column.numel()) / 1e6
    assert round(millions(model.resampler) - places, 2) == 20.47
    state = 306_816 / 1e6 if proprioception else 0.0  # a token of the joints now, which theirs does not have
    assert round(millions(model.head) - state, 2) == 27.86 and round(millions(model) - state, 2) == 48.34
    assert model.config.needs.features.taps == (15, 16) and model.config.needs.horizons == (45,)


def test_shapes_at_the_published_size():
    with torch.device("meta"):
        model = FeatureInverseDynamics(worldarena())
        latents = model.resampler(torch.empty(1, 2, 12, 15, 20, 3072))
        assert latents.shape == (1, 228, 384)
        memory = model.head.encode(latents, torch.empty(1, 30, 4096), torch.ones(1, 30, dtype=torch.bool))
        rows = model.head.denoise(torch.empty(1, 45, 14), torch.ones(1), memory)
    assert rows.shape == (1, 45, 14) and memory.tokens_BLD.shape == (1, 258, 384)


def test_presets():
    assert all(dataclasses.asdict(preset(name)) == dataclasses.asdict(preset(name)) for name in PRESETS)
    assert preset("pico").rows == 33 and preset("pico").needs.frame_dt == pytest.approx(0.12)
    assert preset("paper").taps == (11, 15, 19) and preset("paper").needs.frame_dt == pytest.approx(DT)
    theirs = preset("worldarena")
    assert theirs.sampling.last_sigma == 1.0 and not theirs.normalise
    assert theirs.needs.features.first_frame_mask == "worldarena_compat"
    with pytest.raises(UserError, match="did you mean 'pico'"):
        preset("picco")


def test_every_token_and_every_frame_reaches_the_latents_of_its_frame_first():
    """One layer of cross-attention keeps frames apart; the attention over time mixes them."""
    torch.manual_seed(0)
    config = ResamplerConfig(width=16, depth=1, heads=2, head_dim=8, latents_per_frame=2)
    model = Resampler(config, taps=2, feature_dim=6, frames=3, grid=(2, 3)).eval()
    features = torch.randn(1, 2, 3, 2, 3, 6, requires_grad=True)
    model(features)[0, 2:4].square().sum().backward()  # the latents of frame 1
    reached = features.grad.abs().amax(dim=(0, 1, 3, 4, 5))
    assert (reached > 0).all()
    features.grad = None
    for layer in model.layers:
        torch.nn.init.zeros_(layer.over_time.out.weight)
        torch.nn.init.zeros_(layer.over_time.out.bias)
    model(features)[0, 2:4].square().sum().backward()
    reached = features.grad.abs().amax(dim=(0, 1, 3, 4, 5))
    assert reached[0] == 0 and reached[1] > 0 and reached[2] == 0
    assert features.grad[0, :, 1].abs().amax(dim=-1).min() > 0, "both taps and all cells are read"


# --- EDM and DDIM ----------------------------------------------------------------------------------------------------


def test_preconditioning_is_edms():
    sigma = torch.tensor([0.001, 0.5, 80.0], dtype=torch.float64)
    skip, out, scale = preconditioning(sigma, 0.5)
    for place, s in enumerate(sigma.tolist()):
        assert skip[place].item() == pytest.approx(0.25 / (s * s + 0.25))
        assert out[place].item() == pytest.approx(s * 0.5 / math.sqrt(s * s + 0.25))
        assert scale[place].item() == pytest.approx(1 / math.sqrt(s * s + 0.25))
    # unit variance of input and target for data of deviation sigma_data, and the loss weight they imply
    assert torch.allclose(scale**2 * (0.25 + sigma**2), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(((1 - skip) ** 2 * 0.25 + skip**2 * sigma**2) / out**2, torch.ones(3, dtype=torch.float64))


class OneNumber(ActionHead):
    """The head with its network replaced by a constant, to see what stands round it."""

    def network(self, rows_BRA, sigma_B, memory):
        self.seen = rows_BRA
        return torch.full_like(rows_BRA, 2.0)


def test_denoising_and_loss_wrap_the_network_as_edm_says():
    head = OneNumber(
        ActionHeadConfig(width=8, heads=2), rows=3, action_dim=2, goal_dim=4, goal_tokens=1, latents=1, sigma_data=0.5
    )
    x, sigma = torch.randn(2, 3, 2), torch.tensor([0.1, 3.0])
    found = head.denoise(x, sigma, None)
    for row, s in enumerate(sigma.tolist()):
        skip, out = 0.25 / (s * s + 0.25), s * 0.5 / math.sqrt(s * s + 0.25)
        torch.testing.assert_close(found[row], skip * x[row] + out * 2.0)
        torch.testing.assert_close(head.seen[row], x[row] / math.sqrt(s * s + 0.25))
    clean, noise = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    noisy = clean + sigma.view(-1, 1, 1) * noise
    weighted = [
        ((head.denoise(noisy, sigma, None)[row] - clean[row]) ** 2).mean() / (s * 0.5 / math.sqrt(s * s + 0.25)) ** 2
        for row, s in enumerate(sigma.tolist())
    ]
    torch.testing.assert_close(head.loss(clean, sigma, noise, None), torch.stack(weighted).mean())


def test_film_shifts_scales_and_gates():
    """At initialisation the condition changes nothing; a gate of one opens the plain pre-norm branch."""
    torch.manual_seed(0)
    c = ActionHeadConfig(width=16, heads=2, attention_dropout=0.0, residual_dropout=0.0, feed_forward_dropout=0.0)
    layer = ActionHead(
        c, rows=4, action_dim=2, goal_dim=4, goal_tokens=1, latents=1, sigma_data=0.5
    ).decoder[0].eval()  # fmt: skip
    x, memory = torch.randn(1, 4, 16), torch.randn(1, 2, 16)
    keep = torch.ones(1, 2, dtype=torch.bool)
    plain = x + layer.cross(layer.norm2(x), memory, keep)
    for condition in (torch.zeros(1, 16), torch.randn(1, 16)):
        torch.testing.assert_close(layer(x, condition, memory, keep), plain)
    shift, scale, gate = 0.3, 0.7, 1.5
    bias = torch.tensor([shift, scale, gate, shift, scale, gate]).repeat_interleave(16)
    layer.modulation[1].bias.data.copy_(bias)

    def film(value):
        return torch.nn.functional.layer_norm(value, (16,)) * (1 + scale) + shift

    expected = x + gate * layer.attention(film(x))
    expected = expected + layer.cross(layer.norm2(expected), memory, keep)
    expected = expected + gate * layer.feed_forward(film(expected))
    torch.testing.assert_close(layer(x, torch.randn(1, 16), memory, keep), expected)


def gaussian(mean, deviation):
    """The exact denoiser of Gaussian data."""

    def denoise(x, sigma):
        s2 = sigma.view(-1, 1, 1) ** 2
        return (deviation**2 * x + s2 * mean) / (deviation**2 + s2)

    return denoise


def test_ddim_against_the_closed_form_of_a_gaussian():
    mean, deviation = 0.7, 0.4
    noise = torch.randn(4096, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    exact = mean + (80.0 * noise - mean) * math.sqrt(deviation**2 / (deviation**2 + 80.0**2))
    errors = {}
    for steps in (10, 40, 160):
        sigmas = exponential_sigmas(steps, 0.001, 80.0)
        found = ddim(gaussian(mean, deviation), noise, sigmas)
        # the recursion written out: distances to the mean shrink by one factor a step
        factor = 1.0
        for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            factor *= after / now + (1 - after / now) * deviation**2 / (deviation**2 + now**2)
        torch.testing.assert_close(found, mean + factor * (80.0 * noise - mean), rtol=1e-3, atol=1e-3)
        errors[steps] = (found - exact).abs().max().item()
    assert errors[10] > 2 * errors[40] > 4 * errors[160], "first order: the error falls with the step"
    assert errors[160] < 0.05
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(deviation, abs=0.02)


def test_a_large_last_level_gives_something_near_the_mean():
    """WorldArena stops at 1 and jumps: samples of Gaussian data of deviation .5 lose most of their spread."""
    noise = torch.randn(4096, 1, 1, generator=torch.Generator().manual_seed(0))
    spread = {
        last: ddim(gaussian(0.0, 0.5), noise, exponential_sigmas(20, last, 80.0)).std().item() for last in (0.001, 1.0)
    }
    assert spread[0.001] == pytest.approx(0.425, abs=0.02) and spread[1.0] == pytest.approx(0.218, abs=0.01)


def test_levels():
    sigmas = exponential_sigmas(5, 0.01, 100.0)
    torch.testing.assert_close(sigmas, torch.tensor([100.0, 10.0, 1.0, 0.1, 0.01, 0.0], dtype=torch.float64))
    drawn = training_sigmas(200_000, SamplingConfig(coarse=0.0), torch.Generator().manual_seed(0)).double()
    assert drawn.min() >= 0.001 and drawn.max() <= 80.0
    # log-logistic with centre sigma_data and scale 1/2: the logit of the distribution is 2 log(sigma / sigma_data)
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        expected = 0.5 * math.exp(0.5 * math.log(share / (1 - share)))
        assert drawn.quantile(share).item() == pytest.approx(expected, rel=0.02)
    again = training_sigmas(200_000, SamplingConfig(coarse=0.0), torch.Generator().manual_seed(0)).double()
    assert torch.equal(drawn, again)


def test_coarse_levels_are_trained():
    """40 % of the levels lie evenly in the logarithm between sigma_data and sigma_max; without them .2 % exceed 11."""
    drawn = training_sigmas(100_000, SamplingConfig(), torch.Generator().manual_seed(0)).double()
    even = 0.4 * math.log(80.0 / 11.0) / math.log(80.0 / 0.5)
    rare = 0.6 / (1.0 + (11.0 / 0.5) ** 2)
    assert (drawn > 11.0).double().mean().item() == pytest.approx(even + rare, abs=0.005)
    alone = training_sigmas(100_000, SamplingConfig(coarse=0.0), torch.Generator().manual_seed(0)).double()
    assert (alone > 11.0).double().mean().item() == pytest.approx(rare / 0.6, abs=0.0006)


# --- decoding --------------------------------------------------------------------------------------------------------


def test_decode_gives_a_chunk_for_every_candidate():
    model = decoder()
    assert isinstance(model, InverseDynamics)
    chunks = model.decode(rollout(), np.zeros((2, 14), np.float32), SAID)
    assert [len(row) for row in chunks] == [2, 2]
    for chunk in [chunk for row in chunks for chunk in row]:
        assert chunk.actions_PA.shape == (16, 14) and chunk.actions_PA.dtype == np.float32
        assert len(chunk.actions_PA) == round(rollout().times_T[-1] / DT)
        assert chunk.spread_P.shape == (16,) and (chunk.spread_P > 0).all()
        assert chunk.actions_PA[:, [6, 13]].min() >= 0 and chunk.actions_PA[:, [6, 13]].max() <= 1
    assert not np.array_equal(chunks[0][0].actions_PA, chunks[0][1].actions_PA)


def test_decode_depends_on_the_seed_and_not_on_the_batch():
    model, state = decoder(), np.zeros((2, 14), np.float32)
    together = model.decode(rollout(), state, SAID)
    again = model.decode(rollout(), state, SAID)
    for b in range(2):
        for s in range(2):
            one = rollout()
            one.features_BSKFhwD = one.features_BSKFhwD[b : b + 1, s : s + 1]
            alone = model.decode(one, state[:1], SAID[b : b + 1])[0][0]
            for other in (together[b][s], again[b][s]):
                assert np.array_equal(alone.actions_PA, other.actions_PA)
                assert np.array_equal(alone.spread_P, other.spread_P)
    model.config.sampling.seed = 1
    assert not np.array_equal(model.decode(rollout(), state, SAID)[0][0].actions_PA, together[0][0].actions_PA)


def test_noise_follows_the_rollouts_seed_and_not_its_place():
    model, state = decoder(), np.zeros((2, 14), np.float32)
    same = rollout()
    same.features_BSKFhwD[:] = same.features_BSKFhwD[:1, :1]  # only the noise can differ
    same.seeds_BS = np.array([[7, 8], [8, 2**62]])
    made = model.decode(same, state, [SAID[0]] * 2)
    rows = [made[b][s].actions_PA for b in range(2) for s in range(2)]
    assert np.array_equal(rows[1], rows[2]), "the same seed, another place"
    assert not np.array_equal(rows[0], rows[1]) and not np.array_equal(rows[0], rows[3])
    moved = dataclasses.replace(same, seeds_BS=same.seeds_BS[::-1, ::-1].copy())
    again = model.decode(moved, state, [SAID[0]] * 2)
    for b in range(2):
        for s in range(2):
            assert np.array_equal(again[1 - b][1 - s].actions_PA, made[b][s].actions_PA)
            assert np.array_equal(again[1 - b][1 - s].spread_P, made[b][s].spread_P)
    noise = model.draw_noise([3, 4, 3])
    assert noise.shape == (3, 3, 17, 14) and torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    assert abs(np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]) < 0.15
    with pytest.raises(UserError, match="seeds_BS"):
        model.decode(dataclasses.replace(same, seeds_BS=np.zeros((1, 2), np.int64)), state, SAID)


def test_instructions_matter_and_padding_does_not():
    model, state = decoder(), np.zeros((2, 14), np.float32)
    plain = model.decode(rollout(), state, SAID)[0][0].actions_PA
    assert not np.array_equal(plain, model.decode(rollout(), state, ["a b c", SAID[1]])[0][0].actions_PA)

    class Noisy(Words):
        def batch(self, sentences):
            tokens, mask = super().batch(sentences)
            return torch.where(mask.unsqueeze(-1), tokens, 99.0), mask

    model.text = Noisy()
    assert np.array_equal(plain, model.decode(rollout(), state, SAID)[0][0].actions_PA)


def test_goals_are_cut_and_padded_alike():
    tokens, mask = torch.randn(2, 8, 12), torch.ones(2, 8, dtype=torch.bool)
    cut, kept = fit_goal(tokens, mask, 5)
    assert torch.equal(cut, tokens[:, :5]) and kept.all()
    padded, kept = fit_goal(tokens, mask, 10)
    assert torch.equal(padded[:, :8], tokens) and not padded[:, 8:].any() and kept.sum() == 16
    with_prefix = embed_goals(Words(), ["click the bell"], "the arm enters the frame to {instruction}", 5)
    without = embed_goals(Words(), ["lift a bottle"], "the arm enters the frame to {instruction}", 5)
    assert torch.equal(with_prefix[0], without[0]), "a long constant sentence cuts the instruction away"


def test_proprioception_is_read_only_where_asked_for():
    states = np.zeros((2, 14), np.float32), np.full((2, 14), 0.3, np.float32)
    for wanted in (False, True):
        model = decoder(proprioception=wanted)
        made = [model.decode(rollout(), state, SAID)[0][0].actions_PA for state in states]
        assert np.array_equal(*made) != wanted


def test_the_chunk_is_the_draw_nearest_to_the_mean():
    draws = np.zeros((3, 5, 14), np.float32)
    draws[0], draws[1], draws[2] = 0.0, 0.5, 0.7
    draws[:, 0] = 9.0  # row 0 is the pose already reached
    chunk = chunk_of(draws)
    assert (chunk.actions_PA == 0.5).all() and chunk.actions_PA.shape == (4, 14)
    np.testing.assert_allclose(chunk.spread_P, np.std([0.0, 0.5, 0.7], ddof=1), rtol=1e-6)
    assert chunk_of(draws[:1]).spread_P is None


def test_targets_are_normalised_to_sigma_data():
    model = decoder()
    mean, std = torch.linspace(-1, 1, 14), torch.linspace(0.1, 0.5, 14)
    rows, now = torch.stack([mean, mean + std])[None], torch.randn(1, 14)
    expected = torch.tensor([0.0, 0.5])[None, :, None].expand(1, 2, 14)
    torch.testing.assert_close(model.normalised(rows, now), expected)
    changes = decoder(proprioception=True)
    moved = now[:, None] + torch.linspace(0.2, 0.6, 14)
    torch.testing.assert_close(changes.normalised(moved, now), torch.full((1, 1, 14), 0.5))
    for each in (model, changes):
        torch.testing.assert_close(each.restored(each.normalised(rows, now), now), rows)
    plain = decoder(normalise=False)
    assert torch.equal(plain.normalised(rows, now), rows), "joints as they are"


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"features_BSKFhwD": None}, MissingCapabilityError, "no features"),
        (
            {"features_BSKFhwD": np.zeros((2, 2, 2, 3, 2, 3, 23), np.float32)},
            MissingCapabilityError,
            "taps and horizon",
        ),
        ({"times_T": np.arange(9) * DT}, MissingCapabilityError, "frame_dt"),
        ({"times_T": np.arange(8) * 2 * DT}, MissingCapabilityError, "8 times"),
    ],
)
def test_rollouts_it_cannot_read_are_errors(change, error, match):
    with pytest.raises(error, match=match):
        decoder().decode(dataclasses.replace(rollout(), **change), np.zeros((2, 14), np.float32), SAID)


def test_other_mistakes_are_errors():
    good = np.zeros((2, 14), np.float32)
    with pytest.raises(UserError, match="finite"):
        decoder().decode(rollout(), np.full((2, 14), np.nan, np.float32), SAID)
    with pytest.raises(UserError, match="one instruction a context"):
        decoder().decode(rollout(), good, SAID[:1])
    with pytest.raises(UserError, match="physis train idm decoder=feature"):
        FeatureInverseDynamics(small(), Words()).decode(rollout(), good, SAID)
    model = decoder()
    model.text = None
    with pytest.raises(UserError, match="encoder of instructions"):
        model.decode(rollout(), good, SAID)

    class Wide(Words):
        def batch(self, sentences):
            tokens, mask = super().batch(sentences)
            return tokens.repeat(1, 1, 2), mask

    model.text = Wide()
    with pytest.raises(UserError, match="got '24 numbers', wanted embeddings of 12 numbers"):
        model.decode(rollout(), good, SAID)
    for change, match in (
        ({"prompt": "do it"}, "instruction"),
        ({"sampling": SamplingConfig(steps=0)}, "steps"),
        ({"sampling": SamplingConfig(last_sigma=0.0)}, "last_sigma"),
        ({"head": ActionHeadConfig(width=32, heads=5)}, "heads"),
        ({"head": ActionHeadConfig(width=64, heads=4)}, "resampler"),
    ):
        with pytest.raises(UserError, match=match):
            FeatureInverseDynamics(small(**change))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_holds_everything(tmp_path):
    model, state = decoder(), np.zeros((2, 14), np.float32)
    folder = save_feature_decoder(model, tmp_path / "a", card="# card\n")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    loaded = load_feature_decoder(folder, text=Words())
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert torch.equal(loaded.target_scale_A, model.target_scale_A), "statistics stay exact"
    again = load_decoder(save_feature_decoder(loaded, tmp_path / "b"), text=Words())
    assert again.fingerprint == loaded.fingerprint != "untrained"
    first, second = (m.decode(rollout(), state, SAID)[1][1].actions_PA for m in (loaded, again))
    assert np.array_equal(first, second)
    assert np.abs(first - model.decode(rollout(), state, SAID)[1][1].actions_PA).max() < 0.02, "float16 on disk"


def test_damaged_folders_are_named(tmp_path):
    folder = save_feature_decoder(decoder(), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    for change, match in (
        ({"goal_tokens": 6}, "do not fit"),
        ({"depth": 3}, "depth"),
        ({"decoder": "latent"}, "decoder"),
        ({"head": {"width": 32}}, "head"),
        ({"prompt": 3}, "prompt"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=match):
            load_feature_decoder(folder, text=Words())
    with pytest.raises(UserError, match=r"config.json"):
        load_feature_decoder(tmp_path / "nowhere")
