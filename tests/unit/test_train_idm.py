"""``physis train idm``: it writes folders that decode, keeps earlier runs and knows the published sizes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.planner.decoder_files import load_decoder
from physisforcing.planner.decoder_fit import FitConfig
from physisforcing.planner.feature_decoder.training import train_feature_decoder
from physisforcing.planner.latent_training import LatentTrainConfig
from toy_decoders import LATENT, Words, demonstrations, feature_run, latent_rollout


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


def test_commands_that_make_no_sense_are_errors():
    from physisforcing.planner.train import TrainIdmCommand, run

    with pytest.raises(UserError, match="did you mean 'feature'"):
        run(TrainIdmCommand(data=["x"], decoder="features"))
    with pytest.raises(UserError, match="resume"):
        run(TrainIdmCommand(data=["x"], decoder="pixel", resume=True))
