"""Action models in files and rollouts: saved beside a stock transformer, actions of every sample, and those that do not fit are refused."""

import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest
from physisforcing.worldmodel.backbones.actions import JOINTS
from physisforcing.worldmodel.backbones.wan import load_denoiser, save_denoiser
from physisforcing.worldmodel.data.windows import Episode, kept_steps, window_actions
from tiny_actions import action_denoiser, inputs, text_denoiser, tiny_codec, world_model


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


def test_the_conditioner_is_saved_beside_a_stock_transformer(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    text, action = text_denoiser(), action_denoiser()
    action.actions.low.fill_(0.1)  # no float16 number
    save_denoiser(text, tmp_path / "text")
    save_denoiser(action, tmp_path / "action")
    save_denoiser(action, tmp_path / "half", torch.float16)
    names = {path.relative_to(tmp_path / "text") for path in (tmp_path / "text").rglob("*.*")}
    more = {path.relative_to(tmp_path / "action") for path in (tmp_path / "action").rglob("*.*")}
    assert {str(path) for path in more - names} == {"actions.safetensors"} and names <= more
    for name in names - {path for path in names if path.name == "denoiser.json"}:
        assert (tmp_path / "text" / name).read_bytes() == (tmp_path / "action" / name).read_bytes(), name
    assert "actions" not in json.loads((tmp_path / "text" / "denoiser.json").read_text())
    diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "action" / "transformer", local_files_only=True)
    x, timesteps, tokens, state, actions = inputs()

    def velocity(model):
        context, added = model.context(tokens, state), model.action_embedding(actions, state)
        return model(x, timesteps, context, action_BFD=added)[0]

    with torch.no_grad():
        assert torch.equal(velocity(load_denoiser(tmp_path / "action")), velocity(action))
        assert load_denoiser(tmp_path / "text").actions is None
        half = load_denoiser(tmp_path / "half")
        torch.testing.assert_close(velocity(half), velocity(action), atol=0.05, rtol=0.05)
    assert half.actions.config == action.actions.config
    assert torch.equal(half.actions.low, action.actions.low), "the limits are kept as they are"


def request(actions, **changes):
    batch = 1 if actions is None else len(actions)
    samples = 1 if actions is None else actions.shape[1]
    context = np.random.default_rng(0).integers(0, 256, (batch, 1, 1, 120, 160, 3), dtype=np.uint8)
    values = {
        "context_BVTHWC": context,
        "instructions": ["click the bell"] * batch,
        "seeds_BS": np.full((batch, samples), 7, dtype=np.int64),
        "horizon": 17,
        "proprioception_BKA": np.random.default_rng(1).normal(size=(batch, 3, 14)).astype(np.float32),
        "actions_BSPA": actions,
        "returns": frozenset({"latents"}),
    }
    return RolloutRequest(**{**values, **changes})


def chunks(batch, samples):
    return np.random.default_rng(5).normal(size=(batch, samples, 32, 14)).astype(np.float32)


def test_rollouts_take_actions_of_every_sample(codec):
    model = world_model(action_denoiser(), codec)
    assert model.spec.conditions == {"text", "proprioception", "actions"}
    assert model.spec.action_spec.names == JOINTS
    given = chunks(2, 2)
    given[1, 1] = given[1, 0]
    both = model.rollout(request(given)).latents_BSCFhw
    assert np.array_equal(both[1, 0], both[1, 1]), "same seed, same actions"
    assert np.array_equal(both[0, 0, :, 0], both[0, 1, :, 0]) and not np.allclose(both[0, 0], both[0, 1], atol=1e-3)
    whole = request(given)
    for b in range(2):
        for s in range(2):
            alone = request(
                given[b : b + 1, s : s + 1],
                context_BVTHWC=whole.context_BVTHWC[b : b + 1],
                proprioception_BKA=whole.proprioception_BKA[b : b + 1],
            )
            assert np.array_equal(model.rollout(alone).latents_BSCFhw[0, 0], both[b, s]), "wherever it stands"


def test_without_training_pictures_are_the_text_models(codec):
    text, action = world_model(text_denoiser(), codec), world_model(action_denoiser(trained=False), codec)
    assert "actions" not in text.spec.conditions and text.spec.action_spec is None
    plain = text.rollout(request(None))
    found = action.rollout(request(chunks(1, 1)))
    assert np.array_equal(plain.latents_BSCFhw, found.latents_BSCFhw)


def test_features_of_an_action_model_depend_on_the_actions(codec):
    wanted = {"returns": frozenset({"features"}), "features": FeatureRequest(taps=(2,))}
    untrained, model = world_model(action_denoiser(trained=False), codec), world_model(action_denoiser(), codec)
    plain = world_model(text_denoiser(), codec).rollout(request(None, **wanted)).features_BSKFhwD
    given = chunks(1, 2)
    assert np.array_equal(untrained.rollout(request(given, **wanted)).features_BSKFhwD[:, :1], plain)
    found = model.rollout(request(given, **wanted)).features_BSKFhwD
    assert not np.allclose(found[0, 0], found[0, 1], atol=1e-3)


def test_previews_give_an_action_model_the_executed_actions(codec, tmp_path):
    from physisforcing.worldmodel.training.preview import preview

    states = np.random.default_rng(0).normal(size=(40, 14)).astype(np.float32)
    frames = np.zeros((len(kept_steps(40)), 120, 160, 3), np.uint8)
    episode = Episode(
        frames=frames, states_TA=states, instruction="do it", task="t", index=0, seed=0, success=False
    )  # fmt: skip
    model, asked = world_model(action_denoiser(), codec), []
    plain = model.rollout
    model.rollout = lambda request: asked.append(request.actions_BSPA) or plain(request)
    preview(model, [episode], tmp_path / "preview.mp4", start=4)
    np.testing.assert_array_equal(asked[0][0, 0], window_actions(states, 4))
    assert np.isfinite(preview(world_model(text_denoiser(), codec), [episode], tmp_path / "t.mp4")["preview_seconds"])


@pytest.mark.parametrize(
    ("kind", "actions", "error", "match"),
    [
        ("text", chunks(1, 1), MissingCapabilityError, "the model's conditions are"),
        ("action", None, MissingCapabilityError, "drive targets of the next control steps"),
        ("action", chunks(1, 1)[:, :, :31], UserError, r"\[1, 1, 32, 14\]"),
        ("action", chunks(1, 1)[..., :13], UserError, r"\[1, 1, 32, 14\]"),
        ("action", chunks(1, 1) * np.float32(np.nan), UserError, "finite"),
    ],
)
def test_actions_that_do_not_fit_are_refused(codec, kind, actions, error, match):
    model = world_model(text_denoiser() if kind == "text" else action_denoiser(), codec)
    with pytest.raises(error, match=match):
        model.rollout(request(actions))
