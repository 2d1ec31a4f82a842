"""What decoders are trained on: windows of demonstrations and a frozen world model, and what does not fit them is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest
from physisforcing.planner.decoder_fit import FitConfig
from physisforcing.planner.decoder_windows import DecoderWindows, FrozenWorldModel
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics
from physisforcing.planner.feature_decoder.training import train_feature_decoder
from physisforcing.planner.latent_decoder import LatentInverseDynamics
from physisforcing.planner.latent_training import LatentTrainConfig, train_latent_decoder
from physisforcing.worldmodel.features import denoiser_features
from physisforcing.worldmodel.model import FlowWorldModel
from toy_decoders import FRAMES, LATENT, CellCodec, Words, feature_config, feature_run


def test_rows_begin_with_the_pose_now(frozen):
    windows, store = frozen.windows, frozen.windows.store
    episode, start = torch.tensor([2, 5]), torch.tensor([0, 20])
    rows, measured = windows.rows(episode, start), windows.rows(episode, start, measured=True)
    assert rows.shape == measured.shape == (2, 17, 14)
    states = store.states_NA[store.first_E[5] :][:24]
    assert torch.equal(rows[1, :4], states[20:24]) and torch.equal(rows[1, 4:], states[-1:].expand(13, -1))
    assert torch.equal(measured[0, 1:], rows[0, :-1]), "the toy's joints are a step behind"
    lagged = windows.proprioception(episode, start, (0, 8, 16))
    assert torch.equal(lagged[1], states[[20, 12, 4]]) and torch.equal(lagged[0, 1], lagged[0, 0])
    tokens, keep = windows.goal(episode)
    assert tokens.shape == (2, 4, 384) and keep.sum(1).tolist() == [3, 3]


def test_features_are_those_of_a_rollout_with_the_same_noise(frozen):
    """Training reads what ``rollout`` gives in use: same picture, words, proprioception and noise, same features."""
    episode, start, request = torch.tensor([3]), torch.tensor([4]), FeatureRequest(taps=(1, 3))
    found = frozen.features(episode, start, request, torch.Generator().manual_seed(7))
    windows, model = frozen.windows, frozen.model
    first = model.codec.encode(windows.first_pictures(episode, start))
    noise = torch.randn(1, 4, 3, 3, 4, generator=torch.Generator().manual_seed(7))
    words = Words().batch([windows.store.instructions_E[3]])[0]
    state = windows.proprioception(episode, start, model.spec.proprioception_lags)
    context = model.denoiser.context(words, state)
    assert torch.equal(found, denoiser_features(model.denoiser.transformer, first, noise, context, request))
    other = frozen.features(episode, start, request, torch.Generator().manual_seed(8))
    assert not torch.equal(found, other), "fresh noise"


def test_one_step_latents(frozen):
    latents = frozen.model.codec.encode(frozen.windows.pictures(torch.tensor([1, 2]), torch.tensor([0, 2])))
    sigma = torch.tensor([0.0, 0.7])
    places = torch.tensor([1, 2]), torch.tensor([0, 2])
    made = frozen.one_step(latents, *places, sigma, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made[0], latents[0])
    assert torch.equal(made[1, :, 0], latents[1, :, 0]) and (made[1, :, 1:] - latents[1, :, 1:]).abs().max() > 0.01


def test_what_does_not_fit_is_refused(frozen):
    store = frozen.windows.store
    short = DecoderWindows.build(store, Words(), frames=5, stride=2, tokens=4, prompt="{instruction}")
    with pytest.raises(MissingCapabilityError, match="frames"):
        FrozenWorldModel(frozen.model, short)
    bare = dataclasses.replace(store, instructions_E=(), measured_NA=None)
    with pytest.raises(DatasetError, match="without instructions"):
        DecoderWindows.build(bare, Words(), frames=FRAMES, stride=2, tokens=4, prompt="{instruction}")
    blind = DecoderWindows.build(
        dataclasses.replace(store, measured_NA=None), Words(), frames=FRAMES, stride=2, tokens=4, prompt="{instruction}"
    )
    with pytest.raises(DatasetError, match="measured"):
        blind.rows(torch.tensor([0]), torch.tensor([0]), measured=True)
    for change, match in (
        ({"feature_dim": 25}, "feature_dim"),
        ({"grid": (4, 3)}, r"feature\.model\.grid: got \(4, 3\), wanted \(3, 4\).*grid=\[3, 4\]"),
        ({"steps_per_frame": 1}, r"feature\.model\.steps_per_frame"),
        ({"frames": 5, "latent_frames": 2}, r"feature\.model\.frames"),
    ):
        config = dataclasses.replace(feature_run(), model=feature_config(**change))
        with pytest.raises(UserError, match=match):
            train_feature_decoder(config, frozen, folder=None)
    for change, match in (
        ({"grid": (4, 3)}, r"latent\.model\.grid"),
        ({"latent_channels": 16}, r"latent\.model\.latent_channels"),
        ({"steps_per_frame": 1}, r"latent\.model\.steps_per_frame"),
    ):
        other = LatentTrainConfig(model=dataclasses.replace(LATENT, **change), fit=FitConfig(batch=6))
        with pytest.raises(UserError, match=match):
            train_latent_decoder(other, frozen, folder=None)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_decoder_of_another_rate_is_refused_before_training(frozen, stride):
    windows = dataclasses.replace(frozen.windows, stride=stride)
    with pytest.raises(UserError, match=rf"{stride * 0.06:.4g} s.*0\.12 s.*steps_per_frame=2"):
        FrozenWorldModel(frozen.model, windows)


def other_model(frozen, **changes):
    """The frozen model, of which one word of its spec is another."""

    class Other:
        spec = dataclasses.replace(frozen.model.spec, **changes)

        def rollout(self, request):
            return frozen.model.rollout(request)

    return Other()


def test_a_decoder_is_tied_to_the_model_it_was_trained_on(frozen):
    from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig
    from physisforcing.planner.imagined import EpisodeImaginer

    assert frozen.model.spec.features_fingerprint == "x"
    config = ActionPlannerConfig(horizon=FRAMES, execute_horizon=8)
    feature = FeatureInverseDynamics(feature_config(features_fingerprint="x"), Words())
    latent = LatentInverseDynamics(dataclasses.replace(LATENT, latents_fingerprint="codec-a"))
    for decoder, fits, clashes, words in (
        (feature, {}, {"features_fingerprint": "another"}, ("another", "features x")),
        (
            latent,
            {"latents_fingerprint": "codec-a"},
            {"latents_fingerprint": "codec-b"},
            ("codec-b", "latents codec-a"),
        ),
        (
            latent,
            {"fingerprint": "codec-a"},
            {"fingerprint": "all"},
            ("all", "latents codec-a"),
        ),  # says no more than that
    ):
        ActionPlanner(other_model(frozen, **fits), decoder, config)
        for build in (lambda m, d: ActionPlanner(m, d, config), EpisodeImaginer):
            with pytest.raises(MissingCapabilityError) as caught:
                build(other_model(frozen, **clashes), decoder)
            assert all(word in str(caught.value) for word in words), caught.value
    more_steps = FlowWorldModel(
        frozen.model.denoiser, CellCodec(), frozen.model.settings, weights_fingerprint="x", steps=3, text=Words()
    )
    assert more_steps.spec.fingerprint != frozen.model.spec.fingerprint
    ActionPlanner(more_steps, feature, config)  # denoising steps change pictures, not features
