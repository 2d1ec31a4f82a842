"""The feature decoder learns from demonstrations, and its errors are of held-out episodes."""

from __future__ import annotations

import json
import math

import numpy as np
import torch

from physisforcing.core.types import Observation
from physisforcing.planner.decoder_fit import Fit, FitConfig
from physisforcing.planner.feature_decoder.decoder import FeatureInverseDynamics, chunk_of
from physisforcing.planner.feature_decoder.training import (
    LiveFeatures,
    StoredFeatures,
    score_matching,
    train_feature_decoder,
)
from physisforcing.planner.idm_training import statistics
from toy_decoders import FRAMES, Words, feature_config, feature_run


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
