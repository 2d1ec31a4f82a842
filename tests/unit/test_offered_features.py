"""Feature decoders are trained on any world model that offers features, and planned with."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
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
from physisforcing.planner.offered_features import OfferedFeatures
from physisforcing.worldmodel.features import denoiser_features
from toy_decoders import FRAMES, HEIGHT, WIDTH, CellCodec, Words, demonstrations, feature_config


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
