"""Feature, latent and single-frame decoders learn from demonstrations, runs continue exactly, held-out errors are of held-out seeds."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

from physisforcing.core.errors import DatasetError, MissingCapabilityError, UserError
from physisforcing.core.protocols import InverseDynamics
from physisforcing.core.types import (
    DT,
    FeatureRequest,
    Observation,
    Rollout,
    RolloutRequest,
    ViewLayout,
    WorldModelSpec,
)
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.decoder_fit import Fit, FitConfig, tri_stage
from physisforcing.planner.decoder_windows import DecoderWindows, FrozenWorldModel
from physisforcing.planner.feature_decoder.config import (
    ActionHeadConfig,
    FeatureDecoderConfig,
    ResamplerConfig,
    SamplingConfig,
)
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics, chunk_of
from physisforcing.planner.feature_decoder.training import (
    FeatureTrainConfig,
    LiveFeatures,
    StoredFeatures,
    score_matching,
    train_feature_decoder,
)
from physisforcing.planner.frame_store import make_store, split_episodes
from physisforcing.planner.idm_training import IdmTrainConfig, statistics, train_inverse_dynamics
from physisforcing.planner.inverse_dynamics import InverseDynamicsConfig
from physisforcing.planner.latent_decoder import (
    LatentDecoderConfig,
    LatentInverseDynamics,
    save_latent_decoder,
)
from physisforcing.planner.latent_training import LatentBatches, LatentTrainConfig, train_latent_decoder
from physisforcing.planner.offered_features import OfferedFeatures
from physisforcing.planner.single_frame import (
    SingleFrameInverseDynamics,
    between,
    save_single_frame_decoder,
)
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser
from physisforcing.worldmodel.features import denoiser_features
from physisforcing.worldmodel.model import FlowWorldModel

HEIGHT, WIDTH, FRAMES = 24, 32, 9


class Words:
    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        mask = torch.zeros(len(rows), 32, dtype=torch.bool)
        mask[:, :3] = True
        return torch.stack(rows) * mask.unsqueeze(-1), mask


class CellCodec:
    """Latents that need no autoencoder: 4x4 means of a picture's brightness in 4x4 cells of 8x8; latent k holds frames 4k-3..4k."""

    latent_channels = 4

    def encode(self, frames_BTHWC):
        x = frames_BTHWC[..., 0].float() / 64 - 2
        x = torch.cat([x[:, :1].expand(-1, 3, -1, -1), x], dim=1)
        cells = torch.nn.functional.avg_pool2d(x, (8, 8))
        return cells.unflatten(1, (-1, 4)).transpose(1, 2)


def demonstrations(episodes=24, length=24, seed=0, instruction=None):
    """A bright square follows joint 0 (sideways) and the left gripper (up and down); the measured joints are a step behind."""
    rng = np.random.default_rng(seed)
    frames, states, measured, said = [], [], [], []
    for number in range(episodes):
        start, goal = rng.uniform(-1, 1, (2, 2))
        path = start + (goal - start) * (0.5 - 0.5 * np.cos(np.linspace(0, np.pi, length)))[:, None]
        state = np.zeros((length, 14), np.float32)
        state[:, 0], state[:, 6] = path[:, 0], 0.5 + 0.5 * path[:, 1]
        ys, xs = np.mgrid[0:HEIGHT, 0:WIDTH]
        x, y = 16 + 10 * path[:, 0, None, None], 12 + 7 * path[:, 1, None, None]
        blob = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 18)
        frames.append(np.repeat((40 + 200 * blob)[..., None], 3, -1).astype(np.uint8))
        states.append(state)
        measured.append(np.concatenate([state[:1], state[:-1]]))
        said.append(instruction or ("up" if number % 2 else "down and back"))
    return make_store(
        np.concatenate(frames),
        np.concatenate(states),
        [length] * episodes,
        list(range(episodes)),
        measured_NA=np.concatenate(measured),
        instructions_E=said,
        tasks_E=["toy"] * episodes,
    )


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    size = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=4, ffn_dim=48, tap=2)
    denoiser = build_denoiser(size, ConditionerConfig(hidden=16))
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight, std=0.1)
    settings = {"name": "toy", "frames": FRAMES, "frame_stride": 2, "sample_shift": 3.0, "denoising_steps": 1}
    model = FlowWorldModel(denoiser, CellCodec(), settings, weights_fingerprint="x", text=Words())
    store = demonstrations()
    windows = DecoderWindows.build(store, Words(), frames=FRAMES, stride=2, tokens=4, prompt="{instruction}")
    return FrozenWorldModel(model, windows)


def feature_config(**changes) -> FeatureDecoderConfig:
    values = {
        "taps": (1, 3),
        "feature_dim": 24,
        "latent_frames": 3,
        "grid": (3, 4),
        "frames": FRAMES,
        "goal_tokens": 4,
        "resampler": ResamplerConfig(width=48, depth=2, heads=2, head_dim=24, latents_per_frame=4),
        "head": ActionHeadConfig(
            width=48, encoder_layers=1, decoder_layers=2, heads=4, attention_dropout=0.0, residual_dropout=0.0
        ),
        "sampling": SamplingConfig(steps=12, draws=3),
    }
    return FeatureDecoderConfig(**(values | changes))


def feature_run(**fit) -> FeatureTrainConfig:
    values = {"steps": 6, "batch": 8, "lr": 3e-3, "ema": 0.9, "log_every": 2}
    return FeatureTrainConfig(model=feature_config(), fit=FitConfig(**(values | fit)), validation_windows=6)


# --- windows and the frozen model ------------------------------------------------------------------------------------


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
    from physisforcing.worldmodel.features import denoiser_features

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


# --- the loop --------------------------------------------------------------------------------------------------------


def test_tri_stage():
    c = FitConfig(warmup_share=0.1, hold_share=0.2, first_scale=0.1, last_scale=0.01)
    assert tri_stage(0.0, c) == pytest.approx(0.1) and tri_stage(0.05, c) == pytest.approx(0.55)
    assert tri_stage(0.1, c) == 1.0 and tri_stage(0.29, c) == 1.0
    half = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.5))
    assert tri_stage(0.65, c) == pytest.approx(half) and tri_stage(1.0, c) == pytest.approx(0.01)
    theirs = FitConfig()
    assert tri_stage(1.0, theirs) == pytest.approx(1e-6) and tri_stage(0.02, theirs) == 1.0


def test_a_run_that_was_interrupted_ends_with_the_same_weights(frozen, tmp_path):
    def go(folder, stop_after=None, resume=False):
        seen = []

        def log(row):
            seen.append(row["step"])
            if stop_after is not None and row["step"] >= stop_after:
                raise KeyboardInterrupt

        config = feature_run(save_every=2, log_every=1)
        config.model.head.residual_dropout = 0.2
        return train_feature_decoder(config, frozen, folder=folder, resume=resume, log=log)[0], seen

    straight, _ = go(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped", stop_after=5)
    with pytest.raises(UserError, match="resume=true"):
        go(tmp_path / "stopped")
    continued, seen = go(tmp_path / "stopped", resume=True)
    assert seen == [5, 6], "it goes on from step 4"
    for (name, a), b in zip(straight.state_dict().items(), continued.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match=r"fit\.lr"):
        train_feature_decoder(feature_run(save_every=2, lr=1.0), frozen, folder=tmp_path / "stopped", resume=True)


def test_the_average_is_what_is_left(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    lives = []

    def loss(generator):
        lives.append(model.weight.item())
        return {"loss": -model.weight.sum()}

    config = FitConfig(steps=5, lr=0.1, ema=0.5, weight_decay=0.0)
    fit = Fit(model, loss, config, folder=tmp_path)
    fit.run()
    lives.append(float(fit.average.tensors()["weight"]))  # swapped: the live weight after the last step
    average = 0.0
    for step, live in enumerate(lives[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * live
    assert model.weight.item() == pytest.approx(average) != pytest.approx(lives[-1])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="step 1"):
        Fit(model, lambda g: {"loss": model.weight.sum() * math.nan}, FitConfig(), folder=tmp_path).run()
    for change, match in (({"precision": "fp16"}, "bf16"), ({"ema": 1.0}, "ema"), ({"steps": 0}, "steps")):
        with pytest.raises(UserError, match=match):
            Fit(model, lambda g: {}, FitConfig(**change), folder=tmp_path)


# --- feature decoder -------------------------------------------------------------------------------------------------


def test_the_feature_decoder_learns_windows_by_heart(frozen, tmp_path):
    torch.manual_seed(0)
    model = FeatureInverseDynamics(feature_config(), Words())
    everyone = torch.arange(frozen.windows.store.episodes)
    model.set_statistics(*statistics(frozen.windows.store, everyone, chunk=16, floor=0.05))
    live = LiveFeatures(frozen, model.config, everyone, 0.0)
    stored = StoredFeatures(live, windows=6, noises=1, generator=torch.Generator().manual_seed(0))
    config = FitConfig(steps=220, batch=16, lr=6e-3, ema=0.95, beta2=0.99, weight_decay=0.0)

    def loss(generator):
        return score_matching(model, stored.draw(config.batch, generator), generator)

    def error():
        model.eval()
        goal, state = tuple(g[:6] for g in stored.goal), stored.rows[:6, 0]
        with torch.no_grad():
            made = model.rows(stored.features[:6], goal, state, model.draw_noise(range(6))).numpy()
        chunks = np.stack([chunk_of(draws).actions_PA for draws in made])
        return float(np.sqrt(((chunks - stored.rows[:6, 1:].numpy()) ** 2)[..., [0, 6]].mean()))

    before = error()
    Fit(model, loss, config, folder=tmp_path).run()
    after = error()
    spread = float(np.sqrt(stored.rows[:6, 1:, [0, 6]].var().item()))
    assert after < 0.25 * spread < 0.5 * before, (before, after, spread)


def test_a_planner_with_a_feature_decoder_denoises_nothing(frozen):
    from physisforcing.core.types import Observation
    from physisforcing.planner.action_planner import ActionPlanner, ActionPlannerConfig

    torch.manual_seed(0)
    decoder = FeatureInverseDynamics(feature_config(grid=(15, 20)), Words()).eval()
    decoder.set_statistics(torch.zeros(14), torch.full((14,), 0.3), torch.full((14,), 0.3))
    calls = []
    hook = frozen.model.denoiser.transformer.blocks[3].ffn.register_forward_hook(lambda *_: calls.append(1))
    planner = ActionPlanner(frozen.model, decoder, ActionPlannerConfig(horizon=FRAMES, execute_horizon=8, min_motion=0))
    acted = []
    for seed in (1, 1, 2):
        planner.reset(task="toy", seed=seed, instruction="up")
        state = np.zeros(14, np.float32)
        picture = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="up", step=0)
        acted.append(planner.act(seen))
    hook.remove()
    assert acted[0].shape == (8, 14) and not calls, "neither the last block nor a codec's decoder runs"
    assert np.array_equal(acted[0], acted[1]) and planner.telemetry()["spread"] > 0


def test_training_reports_errors_of_held_out_episodes(frozen, tmp_path):
    rows = []
    _, metrics = train_feature_decoder(feature_run(steps=4), frozen, folder=tmp_path, log=rows.append)
    assert [row["step"] for row in rows] == [1, 2, 4] and all(math.isfinite(row["loss"]) for row in rows)
    assert metrics["episodes"] == {"train": 23, "validation": 1, "left_out": 0} and metrics["windows"] == {
        "start": 1,
        "anywhere": 6,
    }
    for place in ("start", "anywhere"):
        assert set(metrics[place]) == {"model", "hold", "model_measured", "drive_measured"}
        assert 0 < metrics[place]["drive_measured"]["joint_deg"] < metrics[place]["hold"]["joint_deg"]
        assert metrics["spread_deg"][place] > 0 and metrics["now_deg"][place] > 0
    json.dumps(metrics)


def test_stored_features_have_their_windows_targets(frozen):
    live = LiveFeatures(frozen, feature_config(), torch.arange(4), 0.5)
    stored = StoredFeatures(live, windows=5, noises=2, generator=torch.Generator().manual_seed(0), together=3)
    assert stored.features.shape == (10, 2, 3, 3, 4, 24) and torch.equal(stored.rows[:5], stored.rows[5:])
    assert not torch.equal(stored.features[:5], stored.features[5:]), "each with two noises"
    batch = stored.draw(7, torch.Generator().manual_seed(1))
    assert torch.equal(batch.state_BA, batch.rows_BRA[:, 0]) and batch.goal[0].shape == (7, 4, 384)


# --- latent decoder --------------------------------------------------------------------------------------------------

LATENT = LatentDecoderConfig(
    latent_channels=4, grid=(3, 4), frames=FRAMES, channels=24, blocks=1, keypoints=4, flat_channels=4, dim=48, layers=1, heads=2
)  # fmt: skip


@pytest.fixture(scope="module")
def latent(frozen, tmp_path_factory):
    fit = FitConfig(steps=220, batch=24, lr=4e-3, ema=0.95, beta2=0.99, weight_decay=0.0, log_every=100)
    config = LatentTrainConfig(
        model=LATENT, fit=fit, validation_windows=24, validation_share=0.2, latent_noise=0.05, denoised_sigma=0.3
    )
    return train_latent_decoder(config, frozen, folder=tmp_path_factory.mktemp("latent"))


def test_the_latent_decoder_reads_motion(latent):
    _, metrics = latent
    for place in ("start", "anywhere"):
        assert metrics[place]["real"]["joint_deg"] < 0.75 * metrics[place]["hold"]["joint_deg"]
        assert metrics[place]["real"]["joint_deg"] < 0.85 * metrics[place]["frozen"]["joint_deg"]
        assert metrics[place]["denoised"]["joint_deg"] < metrics[place]["hold"]["joint_deg"]
        assert metrics[place]["real_measured"]["joint_deg"] > 0
        assert 0 < metrics[place]["drive_measured"]["joint_deg"] < metrics[place]["hold"]["joint_deg"]
        assert set(metrics["spread_deg"][place]) == {"real", "denoised"}


def latent_rollout(frozen, episodes=(0, 1), starts=(0, 2)):
    windows = frozen.windows
    z = frozen.model.codec.encode(windows.pictures(torch.tensor(episodes), torch.tensor(starts))).numpy()
    state = windows.rows(torch.tensor(episodes), torch.tensor(starts))[:, 0].numpy()
    both = np.stack([z, z + 0.1], axis=1)
    return Rollout(times_T=np.arange(FRAMES) * 2 * DT, latents_BSCFhw=both), state


def test_latent_decode(latent, frozen, tmp_path):
    model, _ = latent
    assert isinstance(model, InverseDynamics) and model.needs.returns == {"latents"}
    rollout, state = latent_rollout(frozen)
    chunks = model.decode(rollout, state, ["a", "b"])
    assert chunks[1][1].actions_PA.shape == (16, 14) and (chunks[1][1].spread_P > 0).all()
    one = dataclasses.replace(rollout, latents_BSCFhw=rollout.latents_BSCFhw[1:, 1:])
    alone = model.decode(one, state[1:], ["b"])[0][0]
    assert np.array_equal(alone.actions_PA, chunks[1][1].actions_PA)
    with torch.no_grad():
        targets = model(torch.from_numpy(rollout.latents_BSCFhw[:, 0]), torch.from_numpy(state))[0].numpy()
    np.testing.assert_allclose(targets[0, :, 0], chunks[0][0].actions_PA[:, 0], atol=1e-5)
    loaded = load_decoder(save_latent_decoder(model, tmp_path))
    assert isinstance(loaded, LatentInverseDynamics) and loaded.fingerprint != "untrained"
    again = loaded.decode(rollout, state, ["a", "b"])[0][0]
    assert np.abs(again.actions_PA - chunks[0][0].actions_PA).max() < 0.02


def test_latents_it_cannot_read_are_errors(latent, frozen):
    model, (rollout, state) = latent[0], latent_rollout(frozen)
    with pytest.raises(MissingCapabilityError, match="no latents"):
        model.decode(dataclasses.replace(rollout, latents_BSCFhw=None), state, ["a", "b"])
    with pytest.raises(MissingCapabilityError, match="codec"):
        model.decode(dataclasses.replace(rollout, latents_BSCFhw=rollout.latents_BSCFhw[:, :, :3]), state, ["a", "b"])
    with pytest.raises(MissingCapabilityError, match="frame_dt"):
        model.decode(dataclasses.replace(rollout, times_T=rollout.times_T / 2), state, ["a", "b"])
    with pytest.raises(UserError, match="state_BA"):
        model.decode(rollout, state[:1], ["a", "b"])
    with pytest.raises(UserError, match="decoder=latent"):
        LatentInverseDynamics(LATENT).decode(rollout, state, ["a", "b"])


def test_batches_of_latents(frozen):
    config = LatentTrainConfig(
        model=LATENT, fit=FitConfig(batch=6), denoised_share=0.5, denoised_sigma=0.9, latent_noise=0.3
    )
    batches = LatentBatches(config, frozen, torch.arange(4))
    latents, now, targets = batches.draw(torch.Generator().manual_seed(0))
    places = frozen.windows.store.draw(
        6, allowed_E=torch.arange(4), start_share=config.start_share, generator=torch.Generator().manual_seed(0)
    )
    real = batches.real(*places)
    changed = (latents - real).abs().amax(dim=(1, 3, 4))
    assert (changed[:, 0] == 0).all(), "frame 0 is the encoded picture"
    assert (changed[:, 1:] > 0.01).all() and changed[3:].max() < 1.5
    assert torch.equal(now, frozen.windows.rows(*places)[:, 0]) and targets.shape == (6, 16, 14)
    with pytest.raises(UserError, match="denoised_share"):
        train_latent_decoder(dataclasses.replace(config, denoised_share=2.0), frozen, folder=None)


# --- single frame ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single():
    size = InverseDynamicsConfig(
        frames=5, height=HEIGHT, width=WIDTH, channels=(16, 16), blocks=(1, 1), keypoints=4, flat_channels=2, dim=48
    )
    config = IdmTrainConfig(
        model=size, steps=200, batch=16, lr=3e-3, warmup=10, ema=0.97, roundtrip_share=0.0, validation_windows=16
    )
    return train_inverse_dynamics(config, demonstrations(), None, build=SingleFrameInverseDynamics)


def test_the_single_frame_decoder_reads_poses(single, tmp_path):
    model, metrics = single
    for place in ("start", "anywhere"):
        assert set(metrics[place]) == {"real", "frozen", "hold", "real_measured", "drive_measured"}
    # by hand: the toy's joints are a step behind, every held-out episode once
    whole, (_, held_out) = demonstrations(), split_episodes(demonstrations(), share=0.05)
    steps = [whole.states_NA[e * 24 : e * 24 + 9, :6].diff(dim=0) for e in held_out.tolist()]
    lag = np.degrees(np.sqrt((torch.stack(steps).numpy() ** 2).sum() / (len(steps) * 8 * 12)))
    assert metrics["start"]["drive_measured"]["joint_deg"] == pytest.approx(lag, rel=1e-4)
    assert metrics["start"]["real_measured"]["joint_deg"] != metrics["start"]["real"]["joint_deg"]
    assert metrics["anywhere"]["real"]["joint_deg"] < 0.4 * metrics["anywhere"]["hold"]["joint_deg"]
    store = demonstrations(seed=1)
    frames, state, targets = store.windows(torch.tensor([0]), torch.tensor([4]), frames=5, stride=2)
    with torch.no_grad():
        plain = model(frames, state)[0]
        assert torch.equal(plain, model(frames, state + 1)[0]), "present joints are not read"
        order = torch.tensor([4, 3, 2, 1, 0])
        poses, reversed_poses = model.poses(frames)[0], model.poses(frames[:, order])[0]
        torch.testing.assert_close(poses[:, order], reversed_poses, atol=1e-5, rtol=1e-5)
    assert plain.shape == targets.shape
    rollout = Rollout(times_T=np.arange(5) * 2 * DT, frames_BSVTHWC=frames.numpy()[:, None, None])
    loaded = load_decoder(save_single_frame_decoder(model, tmp_path))
    assert isinstance(loaded, SingleFrameInverseDynamics)
    chunk = loaded.decode(rollout, state.numpy(), ["x"])[0][0]
    np.testing.assert_allclose(chunk.actions_PA[:, :6], plain[0, :, :6], atol=0.02)
    assert (chunk.spread_P > 0).all()


def test_between_is_linear():
    values = torch.tensor([[[0.0], [2.0], [6.0]]])
    assert between(values, 2)[0, :, 0].tolist() == [1.0, 2.0, 4.0, 6.0]
    assert between(values, 1)[0, :, 0].tolist() == [2.0, 6.0]


def test_half_precision_trains_the_same_loss(frozen, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        rows = []
        config = feature_run(steps=2, precision=precision, log_every=1)
        model, _ = train_feature_decoder(config, frozen, folder=tmp_path / precision, log=rows.append)
        losses[precision] = [row["loss"] for row in rows]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03) and losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("kind", ["feature", "latent"])
def test_the_command_writes_a_folder_that_decodes(kind, frozen, tmp_path, monkeypatch):
    from physisforcing.planner import train, train_decoders
    from physisforcing.worldmodel import model as model_module
    from physisforcing.worldmodel import storage

    monkeypatch.setattr(train_decoders, "load_frame_store", lambda roots, height, width: demonstrations())
    monkeypatch.setattr(model_module, "load_world_model", lambda path, device, codec: frozen.model)
    monkeypatch.setattr(storage, "latents_fingerprint", lambda codec: "abcdef")
    latent = LatentTrainConfig(model=dataclasses.replace(LATENT), fit=FitConfig(steps=2, batch=4), validation_windows=4)
    metrics = train.run(
        train.TrainIdmCommand(
            data=["x"], decoder=kind, codec=str(tmp_path), world_model=str(tmp_path), output=str(tmp_path / "run"),
            device="cpu", feature=feature_run(steps=2), latent=latent,
        )
    )  # fmt: skip
    assert metrics["tasks"] == ["toy"] and json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    said = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ("codec abcdef" in said) == (kind == "latent") and f"{metrics['start']['hold']['joint_deg']:.3f}" in said
    loaded = load_decoder(tmp_path / "run" / "model", text=Words())
    if kind == "feature":
        assert loaded.needs.features_fingerprint == frozen.model.spec.features_fingerprint
    rollout, state = latent_rollout(frozen)
    if kind == "feature":
        shape = (2, 1, 2, 3, 3, 4, 24)
        rollout = dataclasses.replace(rollout, features_BSKFhwD=np.ones(shape, np.float32), latents_BSCFhw=None)
    else:
        assert loaded.config.latents_fingerprint == "abcdef"
    chunks = loaded.decode(rollout, state, ["up", "down"])
    assert chunks[0][0].actions_PA.shape == (16, 14) and np.isfinite(chunks[1][0].actions_PA).all()


@pytest.mark.parametrize("kind", ["feature", "latent"])
def test_the_rows_of_an_earlier_run_are_not_overwritten_by_one_that_is_refused(kind, frozen, tmp_path):
    from physisforcing.planner.train import TrainIdmCommand, run

    train_feature_decoder(feature_run(steps=2, save_every=2), frozen, folder=tmp_path)
    (tmp_path / "train.jsonl").write_text('{"step": 2}\n')
    with pytest.raises(UserError, match="resume=true"):
        run(TrainIdmCommand(data=["x"], decoder=kind, output=str(tmp_path), device="cpu"))
    assert (tmp_path / "train.jsonl").read_text() == '{"step": 2}\n'


class Offered:
    """A world model of somebody else's that offers features: ours, seen through the contract alone."""

    def __init__(self, model, **changes):
        self._model, self.requests = model, []
        self.spec = dataclasses.replace(model.spec, name="offered", max_batch=3, **changes)
        self.text = model.text

    def rollout(self, request):
        assert request.seeds_BS.size <= 3 and request.returns == {"features"}
        self.requests.append(request)
        return self._model.rollout(request)


@pytest.fixture
def toy_size(frozen, monkeypatch):
    """The frozen model, whose spec has the size of the toy's pictures."""
    views = dataclasses.replace(frozen.model.spec.views, height=HEIGHT, width=WIDTH)
    monkeypatch.setattr(frozen.model, "_spec", dataclasses.replace(frozen.model.spec, views=views))
    return frozen


def test_features_of_any_model_are_those_of_its_rollouts(toy_size):
    model = Offered(toy_size.model)
    source = OfferedFeatures(model, toy_size.windows, Words())
    request, places = FeatureRequest(taps=(1, 3)), (torch.tensor([3, 1, 2, 0]), torch.tensor([4, 0, 7, 2]))
    found = source.features(*places, request, torch.Generator().manual_seed(5))
    seeds = torch.randint(2**62, (4, 1), generator=torch.Generator().manual_seed(5))
    assert [asked.seeds_BS.shape for asked in model.requests] == [(3, 1), (1, 1)], "in parts that the model takes"
    assert np.array_equal(np.concatenate([asked.seeds_BS for asked in model.requests]), seeds.numpy())
    # the same features as training on our own model makes from the same noise
    shape = (1, 4, 3, 3, 4)
    for row in range(4):
        noise = torch.randn(shape[1:], generator=torch.Generator().manual_seed(int(seeds[row])))[None]
        first = CellCodec().encode(toy_size.windows.first_pictures(places[0][row : row + 1], places[1][row : row + 1]))
        state = toy_size.windows.proprioception(
            places[0][row : row + 1], places[1][row : row + 1], model.spec.proprioception_lags
        )
        words = Words().batch([toy_size.windows.store.instructions_E[int(places[0][row])]])[0]
        context = toy_size.model.denoiser.context(words, state)
        wanted = denoiser_features(toy_size.model.denoiser.transformer, first, noise, context, request)
        torch.testing.assert_close(found[row : row + 1], wanted, rtol=1e-5, atol=1e-5)
    assert source.feature_shape(request) == toy_size.feature_shape(request) == (3, 3, 4, 24)
    for change in (
        {"returns": frozenset({"frames"})},
        {"context_frames": 2},
        {"horizons": (5,)},
        {"frame_dt": 0.06},
        {"conditions": frozenset({"actions", "proprioception"})},
    ):
        with pytest.raises(UserError):
            OfferedFeatures(Offered(toy_size.model, **change), toy_size.windows, Words())


def run_command(words, tmp_path, monkeypatch, model):
    """``physis train idm words...`` on the toy's demonstrations; ``made_here:model`` makes the world model."""
    from physisforcing.planner import train, train_decoders

    monkeypatch.setitem(sys.modules, "made_here", types.SimpleNamespace(model=lambda: model))
    monkeypatch.setattr(train_decoders, "load_frame_store", lambda roots, height, width: demonstrations(length=50))
    common = ["data=[x]", "decoder=feature", "world_model=made_here:model", f"output={tmp_path}", "device=cpu"]
    return train.main([*common, *words])


def test_the_command_trains_on_any_model_that_offers_features(toy_size, tmp_path, monkeypatch):
    c = feature_config()
    size = [
        "feature.model.taps=[1,3]", "feature.model.feature_dim=24", "feature.model.latent_frames=3",
        "feature.model.grid=[3,4]", f"feature.model.frames={FRAMES}", "feature.model.goal_tokens=4",
        f"feature.model.resampler.width={c.resampler.width}", "feature.model.resampler.heads=2",
        f"feature.model.head.width={c.head.width}", "feature.model.head.heads=4", "feature.validation_windows=2",
        "feature.fit.steps=2", "feature.fit.batch=4",
    ]  # fmt: skip
    model = Offered(toy_size.model, features_fingerprint="theirs")
    assert run_command(size, tmp_path, monkeypatch, model) == 0
    loaded = load_decoder(tmp_path / "model", text=Words())
    assert loaded.needs.features_fingerprint == "theirs"
    with pytest.raises(UserError, match=r"feature\.model\.feature_dim: got 256, wanted 24"):
        run_command(
            [word for word in size if "feature_dim" not in word], tmp_path / "b", monkeypatch, Offered(toy_size.model)
        )
    with pytest.raises(UserError, match="decoder=feature"):
        run_command(["decoder=latent"], tmp_path / "c", monkeypatch, model)


@pytest.mark.parametrize("name", ["pico", "paper", "worldarena"])
def test_the_command_chooses_the_published_sizes(name):
    from physisforcing.core.config import compose
    from physisforcing.planner.feature_decoder.config import preset
    from physisforcing.planner.train import TrainIdmCommand

    words = ["data=[x]", "decoder=feature", f"feature_decoder={name}"]
    assert compose("train_idm", words, TrainIdmCommand).feature.model == preset(name)
    one = compose("train_idm", [*words, "feature.model.goal_dim=7"], TrainIdmCommand).feature.model
    assert one == dataclasses.replace(preset(name), goal_dim=7)
    with pytest.raises(UserError, match=name):
        compose("train_idm", ["data=[x]", f"feature_decoder={name}x"], TrainIdmCommand)


def test_the_published_size_is_trained_and_decoded_by_the_command(tmp_path, monkeypatch):
    """One step of all 48 million parameters, on features that depend on the seed alone."""

    class Wide:
        """As Wan2.2-TI2V-5B would answer: 45 frames a control step apart, 30 blocks of width 3072."""

        text = None
        spec = WorldModelSpec(
            name="wide", views=ViewLayout(height=HEIGHT, width=WIDTH), context_frames=1, horizons=(45,), frame_dt=DT,
            conditions=frozenset({"text"}), returns=frozenset({"features"}), fingerprint="w", blocks=30,
        )  # fmt: skip

        def rollout(self, request):
            assert request.features.taps == (15, 16) and request.features.first_frame_mask == "worldarena_compat"
            shape = (*request.seeds_BS.shape, 2, 12, 15, 20, 3072)
            base = np.random.default_rng(int(request.seeds_BS[0, 0])).normal(size=(12, 15, 20, 1)).astype(np.float32)
            return Rollout(times_T=np.arange(45) * DT, features_BSKFhwD=np.broadcast_to(base, shape))

    model = Wide()
    model.text = Words()
    words = [
        "feature_decoder=worldarena", "feature.model.goal_dim=384", "feature.fit.steps=1", "feature.fit.batch=1",
        "feature.validation_windows=1",
    ]  # fmt: skip
    assert run_command(words, tmp_path, monkeypatch, model) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["parameters"] == 48_341_774 - 2 * 2 * 384 * (4096 - 384), (
        "narrower sentences, else the published size"
    )
    assert metrics["anywhere"]["model"]["joint_deg"] > 0 and metrics["anywhere"]["model_measured"]["joint_deg"] > 0
    decoder = load_decoder(tmp_path / "model", text=Words())
    rollout = model.rollout(
        RolloutRequest(
            context_BVTHWC=np.zeros((1, 1, 1, HEIGHT, WIDTH, 3), np.uint8), instructions=["up"], horizon=45,
            seeds_BS=np.zeros((1, 1), np.int64), returns=frozenset({"features"}), features=decoder.needs.features,
        )
    )  # fmt: skip
    assert decoder.decode(rollout, np.zeros((1, 14), np.float32), ["up"])[0][0].actions_PA.shape == (44, 14)


def test_a_pipeline_folder_is_trained_on_and_planned_with(tiny_wan_folder, tmp_path, monkeypatch):
    """A stock Wan pipeline with a time step a token, in the layout of TI2V-5B: its own features, its own sentences."""
    from physisforcing.eval_plan import PlannerSettings
    from physisforcing.planner import train_decoders
    from physisforcing.planner.train import main
    from physisforcing.planners import check_model, make_planner
    from physisforcing.world_models import load_any

    settings = {
        "pipeline": str(tiny_wan_folder),
        "height": 64,
        "width": 96,
        "frames": FRAMES,
        "fps": 1 / (2 * DT),
        "steps": 1,
    }
    settings |= {"view_height": HEIGHT, "view_width": WIDTH}
    (tmp_path / "physis_pipeline.json").write_text(json.dumps(settings))
    monkeypatch.setattr(train_decoders, "load_frame_store", lambda data, **size: demonstrations(episodes=6))
    words = [
        "data=[x]", "decoder=feature", f"world_model={tmp_path / 'physis_pipeline.json'}", f"output={tmp_path / 'run'}", "device=cpu",
        "feature.model.taps=[1,2]", "feature.model.feature_dim=24", f"feature.model.frames={FRAMES}", "feature.model.latent_frames=3",
        "feature.model.grid=[2,3]", "feature.model.goal_dim=16", "feature.model.goal_tokens=4", "feature.fit.steps=1", "feature.fit.batch=2",
        "feature.validation_windows=2",
    ]  # fmt: skip
    assert main(words) == 0
    model, decoder = load_any(str(tmp_path / "physis_pipeline.json")), load_decoder(tmp_path / "run" / "model")
    policy = make_planner(PlannerSettings(execute_horizon=8), model, decoder)
    tokens, mask = decoder.text.batch(["press the bell", "press the bell with the left arm"])
    assert tokens.shape[0] == 2 and tokens.shape[2] == 16 and mask[1].all() and not mask[0].all()
    with pytest.raises(UserError, match=r"planner\.server"):
        check_model(types.SimpleNamespace(spec=model.spec), decoder)
    policy.reset(task="toy", seed=3, instruction="press the bell")
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    state = np.zeros(14, np.float32)
    seen = Observation(images={"head": picture}, state_A=state, measured_A=state, instruction="press the bell", step=0)
    actions = policy.act(seen)
    assert actions.shape == (8, 14) and np.isfinite(actions).all()
    policy.reset(task="toy", seed=3, instruction="lift the red bottle")
    other = Observation(
        images={"head": picture}, state_A=state, measured_A=state, instruction="lift the red bottle", step=0
    )
    assert not np.array_equal(policy.act(other), actions)
    filmed = {**settings, "steps": 3, "guidance": 4.0, "name": "other"}  # what features do not depend on may change
    (tmp_path / "physis_pipeline.json").write_text(json.dumps(filmed))
    check_model(load_any(str(tmp_path / "physis_pipeline.json")), decoder)
    (tmp_path / "physis_pipeline.json").write_text(json.dumps(filmed | {"prompt": "Robot: {instruction}"}))
    with pytest.raises(MissingCapabilityError):
        check_model(load_any(str(tmp_path / "physis_pipeline.json")), decoder)


def test_commands_that_make_no_sense_are_errors():
    from physisforcing.planner.train import TrainIdmCommand, run

    with pytest.raises(UserError, match="did you mean 'feature'"):
        run(TrainIdmCommand(data=["x"], decoder="features"))
    with pytest.raises(UserError, match="resume"):
        run(TrainIdmCommand(data=["x"], decoder="pixel", resume=True))


def test_the_benchmark_rehearses_and_reads_a_run(frozen, tmp_path, monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    import feature_decoder as benchmark

    lines = benchmark.main(["--tiny", "--steps", "3", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    found = {line["claim"].removeprefix("planner/feature_decoder/"): line for line in lines}
    for preset, draws in (("paper", 4), ("worldarena", 1)):
        plan = found[f"{preset}/plan_p50_ms"]
        parts = [plan["against"][f"{part}_p50_ms"] for part in ("features", "resampler", "ddim")]
        assert plan["n"] == 3 and plan["against"]["draws"] == draws
        assert max(parts) <= plan["value"] <= found[f"{preset}/plan_p95_ms"]["value"]
    assert [step for step, _ in found["paper/overfit/loss_last"]["against"]["loss_curve"]] == [1, 2, 3]
    assert len(json.loads((tmp_path / "found.json").read_text())) == len(lines) == 6
    config = feature_run(steps=1)
    _, metrics = train_feature_decoder(config, frozen, folder=tmp_path / "run")
    metrics |= {"parameters": 1, "train_seconds": 1.0, "tasks": ["toy"], "world_model": "x"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "config.json").write_text(json.dumps({"decoder": "feature", "feature": dataclasses.asdict(config)}))
    shared = {"command": "x", "provenance": benchmark.machine_provenance()}
    read = {line["claim"]: line for line in benchmark.pico(tmp_path, "pico", shared)}
    start = read["planner/feature_decoder/pico/start/joint_deg_drive"]
    assert start["value"] == pytest.approx(metrics["start"]["model"]["joint_deg"], abs=1e-3) and start["n"] == 1
    assert "planner/feature_decoder/pico/anywhere/joint_deg_measured" in read
    for place in ("start", "anywhere"):
        metrics[place]["real"] = metrics[place].pop("model")
    (tmp_path / "metrics.json").write_text(
        json.dumps({k: v for k, v in metrics.items() if k not in ("tasks", "now_deg")})
    )
    (tmp_path / "config.json").write_text(json.dumps({"decoder": "single_frame"}))
    single = benchmark.pico(tmp_path, "single", shared)
    assert single[0]["claim"] == "planner/feature_decoder/single/start/joint_deg_drive"
    assert single[0]["value"] == start["value"] and single[0]["against"]["decoder"] == "single_frame"
