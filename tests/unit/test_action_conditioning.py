"""Actions in the denoiser: from zero, frame by frame, saved beside a stock transformer, and they decide what happens."""

import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.types import FeatureRequest, RolloutRequest
from physisforcing.worldmodel.backbones.actions import JOINTS, ActionConditioner, ActionConfig
from physisforcing.worldmodel.backbones.wan import (
    ConditionerConfig,
    WanConfig,
    build_denoiser,
    embed,
    load_denoiser,
    save_denoiser,
)
from physisforcing.worldmodel.data.batches import WindowBank, build_bank, step_generator
from physisforcing.worldmodel.data.windows import Episode, FrameStore, WindowTable, kept_steps, window_actions
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, euler_sample
from physisforcing.worldmodel.model import FlowWorldModel
from physisforcing.worldmodel.training.objective import draw_noise, objective

TINY = WanConfig(latent_channels=4, num_heads=2, head_dim=12, num_layers=3, ffn_dim=32, tap=2)
FRAMES, ROWS = 3, 8


def text_denoiser():
    torch.manual_seed(0)
    model = build_denoiser(TINY, ConditionerConfig(hidden=16))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def action_denoiser(*, trained: bool = True):
    """A text model with actions; ``trained``: its projection is not zero any more."""
    model = text_denoiser()
    added = model.add_actions(ActionConfig(hidden=24))
    if trained:
        torch.nn.init.normal_(added.project.weight, std=0.5)
    return model


def inputs(batch: int = 2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, FRAMES, 4, 5, generator=generator)
    timesteps = torch.tensor([[0.0, 300.0, 300.0], [0.0, 900.0, 900.0]])[:batch]
    text, state = torch.randn(batch, 32, 384, generator=generator), torch.randn(batch, 3, 14, generator=generator)
    actions = torch.randn(batch, ROWS * (FRAMES - 1), 14, generator=generator)
    return x, timesteps, text, state, actions


def test_the_conditioner_is_what_a_loop_over_frames_computes():
    torch.manual_seed(3)
    module = ActionConditioner(ActionConfig(hidden=24), width=10)
    torch.nn.init.normal_(module.project.weight)
    torch.nn.init.normal_(module.project.bias)
    *_, state, actions = inputs()
    module.set_statistics(torch.randn(50, 16, 14) * 2 + 1, torch.randn(50, 14) - 3)
    found = module(actions, state[:, 0])
    assert found.shape == (2, FRAMES, 10) and found[:, 0].abs().max() == 0
    for b in range(2):
        now = state[b, 0]
        for k in range(1, FRAMES):
            rows = [(actions[b, step - 1] - now) / module.difference_std for step in range(8 * k - 7, 8 * k + 1)]
            seen = torch.cat([*rows, (now - module.present_mean) / module.present_std])
            torch.testing.assert_close(found[b, k], module.project(module.net(seen)), atol=1e-6, rtol=1e-5)


def test_statistics_are_those_of_the_differences_from_now():
    generator = np.random.default_rng(0)
    present = generator.normal(1.0, 0.3, (40, 14)).astype(np.float32)
    actions = present[:, None] + generator.normal(0.0, 0.2, (40, 16, 14)).astype(np.float32)
    actions[:, :, 5] = present[:, None, 5]  # a joint that is never told to move
    module = ActionConditioner(ActionConfig(hidden=8), width=4)
    module.set_statistics(torch.from_numpy(actions), torch.from_numpy(present))
    moved = (actions - present[:, None]).reshape(-1, 14)
    wanted = moved.std(0, ddof=1)
    wanted[5] = 1.0
    np.testing.assert_allclose(module.difference_std, wanted, rtol=1e-4)
    np.testing.assert_allclose(module.present_mean, present.mean(0), rtol=1e-4)
    np.testing.assert_allclose(module.present_std, present.std(0, ddof=1), rtol=1e-4)
    both = np.concatenate([actions.reshape(-1, 14), present])
    np.testing.assert_allclose(module.spec.low, both.min(0))
    np.testing.assert_allclose(module.spec.high, both.max(0))
    assert module.spec.names == JOINTS and module.spec.dim == 14 and module.spec.dt == 0.06
    assert (JOINTS[0], JOINTS[6], JOINTS[7], JOINTS[13]) == (
        "left_joint_1",
        "left_gripper",
        "right_joint_1",
        "right_gripper",
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_it_starts_bit_equal_to_the_text_model(autocast):
    text, action = text_denoiser(), action_denoiser(trained=False)
    x, timesteps, tokens, state, actions = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = text(x, timesteps, text.context(tokens, state), need_tap=True)
        for given in (actions, 100 * actions):
            context, added = action.context(tokens, state), action.action_embedding(given, state)
            found = action(x, timesteps, context, action_BFD=added, need_tap=True)
            assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
    assert text.action_embedding(actions, state) is None, "a text model reads no actions"
    with pytest.raises(AssertionError):
        action(x, timesteps, action.context(tokens, state))
    with pytest.raises(AssertionError):
        text(x, timesteps, text.context(tokens, state), action_BFD=added)


def test_gradients_reach_the_projection_first_and_then_the_whole_module():
    x, timesteps, tokens, state, actions = inputs()
    for trained in (False, True):
        model = action_denoiser(trained=trained)
        context, added = model.context(tokens, state), model.action_embedding(actions, state)
        model(x, timesteps, context, action_BFD=added)[0].square().mean().backward()
        assert model.actions.project.weight.grad.abs().sum() > 0
        assert (model.actions.net[0].weight.grad.abs().sum() > 0) == trained


def test_actions_of_a_latent_frame_change_the_time_embedding_of_that_frame_only():
    model = action_denoiser()
    x, timesteps, tokens, state, actions = inputs()
    context = model.context(tokens, state)

    def embedded(given):
        at = embed(model.transformer, x, timesteps, context, model.action_embedding(given, state))
        return at.temb_BFD, at.modulation_BF6D, at

    temb, modulation, at = embedded(actions)
    plain = embed(model.transformer, x, timesteps, context)
    assert torch.equal(at.x_BLD, plain.x_BLD) and torch.equal(at.context_BLD, plain.context_BLD)
    assert torch.equal(temb[:, 0], plain.temb_BFD[:, 0]) and torch.equal(modulation[:, 0], plain.modulation_BF6D[:, 0])
    for k in range(1, FRAMES):
        for row in (ROWS * (k - 1), ROWS * k - 1):
            other = actions.clone()
            other[:, row] += 1.0
            changed = [(now != before).flatten(2).any(2) for now, before in zip(embedded(other), (temb, modulation))]
            wanted = torch.arange(FRAMES) == k
            assert all(torch.equal(flags, wanted.expand(2, -1)) for flags in changed), (k, row)


@pytest.mark.parametrize("length", [1, 2, 20, 33, 34, 70])
def test_window_actions_lead_up_to_the_pictures(length):
    states = np.arange(length, dtype=np.float32)[:, None].repeat(14, 1)
    for start in range(0, length, 2):
        rows = window_actions(states, start)
        wanted = []
        for step in range(start, start + 32):  # action t is the state of step t + 1; the last row repeats its state
            here = min(step, length - 1)
            wanted.append(states[here + 1] if here + 1 < length else states[here])
        np.testing.assert_array_equal(rows, np.stack(wanted))
        for k in range(1, 5):  # the last picture of latent k is window picture 4k, at stride 2
            assert rows[8 * k - 1, 0] == min(start + 2 * 4 * k, length - 1)


class MeanCodec:
    latent_channels = 1

    def encode(self, frames):
        groups = [frames[:, :1], *[frames[:, 4 * k - 3 : 4 * k + 1] for k in range(1, 5)]]
        return torch.stack([g.float().mean((1, 2, 3, 4)) for g in groups], 1)[:, None, :, None, None]


def test_a_bank_holds_the_actions_of_its_windows(tmp_path):
    from physisforcing.worldmodel.text import _key, _store

    _store(tmp_path / f"{_key('do it')}.safetensors", np.zeros((3, 384), np.float16), "do it")
    episodes = []
    for number, length in enumerate((50, 41)):
        states = np.random.default_rng(number).normal(size=(length, 14)).astype(np.float32)
        frames = np.zeros((len(kept_steps(length)), 120, 160, 3), np.uint8)
        episodes.append(
            Episode(frames=frames, states_TA=states, instruction="do it", task="t", index=number, seed=0, success=True)
        )
    table = WindowTable.build([50, 41], stride=8)
    bank = build_bank(FrameStore.build(episodes, "cpu"), table, MeanCodec(), (0, 8, 16), text_cache=tmp_path)
    rows = torch.tensor([len(table) - 1, 2])
    found = bank.batch(rows)["actions_BPA"].numpy()
    for row, actions in zip(rows.tolist(), found, strict=True):
        states, start = episodes[int(table.episode_W[row])].states_TA, int(table.start_W[row])
        np.testing.assert_array_equal(actions, window_actions(states, start))


# --- files and rollouts ------------------------------------------------------------------------------------------------


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


class FixedText:
    def batch(self, sentences):
        rows = [torch.full((32, 384), 0.01 * len(sentence)) for sentence in sentences]
        return torch.stack(rows), torch.ones(len(rows), 32, dtype=torch.bool)


@pytest.fixture(scope="module")
def codec():
    from physisforcing.worldmodel.autoencoder import CausalVideoAutoencoder

    torch.manual_seed(0)
    made = CausalVideoAutoencoder(
        latent_channels=4, fine_channels=8, decoder_fine_channels=8, coarse_channels=8, group_channels=8
    )
    made.set_statistics(torch.zeros(4), torch.ones(4))
    return made.eval()


def world_model(denoiser, codec):
    settings = {
        "name": "x", "frames": 17, "frame_stride": 2, "sample_shift": 3.0, "denoising_steps": 2, "home_state": [0.0] * 14
    }  # fmt: skip
    return FlowWorldModel(denoiser, codec, settings, weights_fingerprint="w", text=FixedText())


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


def test_pico_with_actions_has_at_most_8_million_parameters():
    model = build_denoiser(WanConfig(), ConditionerConfig(), ActionConfig())
    assert 7.9e6 < sum(p.numel() for p in model.parameters()) <= 8e6
    assert model.actions.project.out_features == WanConfig().dim


# --- training ----------------------------------------------------------------------------------------------------------


def two_clips(seed: int) -> WindowBank:
    """Two clips that begin alike and are told alike; what differs is the action, and what comes of it."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, FRAMES, 3, 4, generator=generator)
    latents[1, :, 0] = latents[0, :, 0]
    actions = torch.randn(2, ROWS * (FRAMES - 1), 14, generator=generator) * 0.3
    return WindowBank(
        table=WindowTable(episode_W=torch.arange(2), start_W=torch.zeros(2, dtype=torch.long)),
        latents_WCFhw=latents,
        text_SLD=torch.randn(1, 32, 384, generator=generator),
        sentence_W=torch.zeros(2, dtype=torch.long),
        proprioception_WKA=torch.zeros(2, 3, 14),
        actions_WPA=actions,
    )


def fit(denoiser, bank: WindowBank, steps: int) -> list[float]:
    """Adam on the flow-matching objective of both clips; the losses."""
    import contextlib

    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    batch, losses, flow = bank.batch(torch.arange(2).repeat(4)), [], FlowMatchingConfig(motion_weight=0.0)
    for step in range(steps):
        drawn = draw_noise(batch["latents_BCFhw"], flow, step_generator(0, step))
        terms = objective(denoiser, None, batch, drawn, flow, contextlib.nullcontext())
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["fm"].detach()))
    return losses


@torch.no_grad()
def imagined(denoiser, bank: WindowBank, actions_WPA) -> torch.Tensor:
    """Samples of both clips' first frame, each with its own row of ``actions_WPA``, from the same noise."""
    batch = bank.batch(torch.arange(2))
    noise = torch.randn(1, *bank.latents_WCFhw.shape[1:], generator=torch.Generator().manual_seed(9)).repeat(
        2, 1, 1, 1, 1
    )
    context = denoiser.context(batch["text_BLD"], batch["proprioception_BKA"])
    added = denoiser.action_embedding(actions_WPA, batch["proprioception_BKA"])

    def velocity(x, timesteps):
        return denoiser(x, timesteps, context, action_BFD=added)[0]

    return euler_sample(velocity, batch["latents_BCFhw"][:, :, :1], noise, steps=8, shift=3.0)


def test_actions_decide_what_text_cannot():
    bank = two_clips(0)
    text, action = text_denoiser(), action_denoiser(trained=False)
    action.actions.set_statistics(bank.actions_WPA, bank.proprioception_WKA[:, 0])
    text_losses, action_losses = fit(text, bank, 160), fit(action, bank, 160)
    assert action_losses[0] == text_losses[0], "they start as the same model"
    assert np.mean(action_losses[-20:]) < 0.5 * np.mean(text_losses[-20:])
    clips = bank.latents_WCFhw
    apart = (clips[0] - clips[1])[:, 1:].square().mean().sqrt()

    def error(sampled, clip):
        return float((sampled - clip)[:, 1:].square().mean().sqrt() / apart)

    found = imagined(action, bank, bank.actions_WPA)
    swapped = imagined(action, bank, bank.actions_WPA.flip(0))
    for own in range(2):
        assert error(found[own], clips[own]) < 0.4 < 0.8 < error(found[own], clips[1 - own])
        assert error(swapped[own], clips[1 - own]) < 0.4, "the picture and the text are the same: actions alone decide"
    same = imagined(text, bank, None)
    assert torch.allclose(same[0], same[1], atol=1e-5), "a text model cannot know which of the two it is"


def small_config(tmp_path, name: str, **settings):
    from safetensors.torch import save_file

    from physisforcing.worldmodel.training.config import TrainWorldModelConfig

    folder = tmp_path / "codec"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")  # only its fingerprint is read here
    save_file({"encode_in.weight": torch.zeros(2)}, folder / "weights.safetensors")
    made = TrainWorldModelConfig(codec=str(folder), heldout_windows=2)
    made.run.out, made.run.steps, made.run.batch, made.run.device = str(tmp_path / name), 3, 2, "cpu"
    made.optim.warmup = 1
    for key, value in settings.items():
        setattr(made.run if key == "init" else made, key, value)
    return made


def test_training_starts_from_a_text_model_bit_by_bit_and_goes_on_from_an_action_model(tmp_path):
    from physisforcing.worldmodel.training.worldmodel import Trainer, train_world_model

    banks = two_clips(1), two_clips(2)
    text = train_world_model(
        small_config(tmp_path, "text", backbone=TINY, conditioner=ConditionerConfig(hidden=16)), banks
    )
    config = small_config(tmp_path, "actions", init=str(text), actions=True)
    trainer = Trainer(config_adopted(config), banks[0], torch.device("cpu"))
    x, timesteps, tokens, state, actions = inputs()
    stored, fresh = load_denoiser(text), trainer.denoiser
    with torch.no_grad():
        context, added = fresh.context(tokens, state), fresh.action_embedding(actions, state)
        plain = stored(x, timesteps, stored.context(tokens, state))[0]
        assert torch.equal(fresh(x, timesteps, context, action_BFD=added)[0], plain)
    assert torch.equal(fresh.actions.low, banks[0].actions_WPA.flatten(0, 1).amin(0).clamp(max=0)), "now is 0"

    export = train_world_model(config, banks)
    before = [json.loads((tmp_path / run / "heldout.json").read_text()) for run in ("text", "actions")]
    assert before[1]["before"]["heldout_fm"] == pytest.approx(before[0]["after"]["heldout_fm"], rel=2e-3)
    model = load_denoiser(export)
    assert model.actions.project.weight.abs().sum() > 0, "it has learned something"
    assert json.loads((export / "world_model.json").read_text())["name"] == "physis-pico-actions"

    more = small_config(tmp_path, "more", init=str(export))
    assert not more.actions
    again = train_world_model(more, banks)
    assert more.actions and (again / "actions.safetensors").is_file(), "an action model stays one"
    assert torch.equal(load_denoiser(again).actions.difference_std, model.actions.difference_std)


def config_adopted(config):
    from physisforcing.worldmodel.training.initial import adopt_world_model

    adopt_world_model(config)
    return config


def test_sentences_are_left_out_of_a_share_of_the_windows(tmp_path):
    from physisforcing.core.errors import UserError
    from physisforcing.worldmodel.training.config import TrainWorldModelConfig
    from physisforcing.worldmodel.training.objective import without_text
    from physisforcing.worldmodel.training.worldmodel import Trainer

    text = torch.ones(4000, 2, 3)
    left = without_text(text, 0.25, step_generator(0, 0))
    kept = left.flatten(1).amax(1)
    assert set(kept.tolist()) == {0.0, 1.0} and torch.equal(left, text * kept[:, None, None])
    assert kept.mean().item() == pytest.approx(0.75, abs=0.03)
    with pytest.raises(UserError, match=r"text_dropout.*0\.\.1"):
        TrainWorldModelConfig(text_dropout=1.5)

    def later_loss(bank: WindowBank, share: float) -> float:
        """Of the third update: the output starts at zero and knows no text before."""
        config = small_config(
            tmp_path, "dropout", backbone=TINY, conditioner=ConditionerConfig(hidden=16), text_dropout=share
        )
        trainer = Trainer(config, bank, torch.device("cpu"))
        return [float(trainer.step(step)["fm"]) for step in range(3)][-1]

    silent = two_clips(1)
    silent.text_SLD.zero_()
    assert later_loss(two_clips(1), 1.0) == later_loss(silent, 0.0) != later_loss(two_clips(1), 0.0)


def test_the_experiment_composes():
    from physisforcing.core.config import compose
    from physisforcing.worldmodel.training.config import TrainWorldModelConfig

    config = compose("train_worldmodel", ["experiment=pico_actions"], TrainWorldModelConfig)
    assert config.actions and not config.data.success_only and config.backbone == WanConfig()
    assert not compose("train_worldmodel", [], TrainWorldModelConfig).actions


# --- physis generate -----------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    from physisforcing.core.lerobot import HEAD, LeRobotWriter, robot_features

    writer = LeRobotWriter(tmp_path / "data", robot_features(JOINTS, height=120, width=160), robot_type="aloha")
    for seed, length in ((0, 9), (1, 40)):
        state = np.random.default_rng(seed).normal(size=(length, 14)).astype(np.float32)
        success = np.zeros(length, bool)
        columns = {
            "observation.state": state,
            "observation.state_measured": state,
            "action": np.concatenate([state[1:], state[-1:]]),
            "next.success": success,
        }
        writer.add_episode(
            columns=columns,
            frames={HEAD: np.full((length, 120, 160, 3), 90, np.uint8)},
            instruction="click the bell",
            task_name="click_bell",
            seed=seed,
            success=False,
            scene_hash=f"{seed}",
            policy="expert+random",
            embodiment="robot",
            assets_version="1",
        )
    return writer.finalize()


def test_generate_takes_the_actions_of_an_episode(dataset, codec, tmp_path, monkeypatch):
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.worldmodel import generate as module
    from physisforcing.worldmodel import model as models

    asked = []
    kinds = {"action": action_denoiser(), "text": text_denoiser()}

    def load(folder, *_, **__):
        made = world_model(kinds[str(folder)], codec)
        plain = made.rollout
        made.rollout = lambda request: asked.append(request) or plain(request)
        return made

    monkeypatch.setattr(models, "load_world_model", load)
    states = [np.asarray(LeRobotDataset(dataset).columns(i)["observation.state"], np.float32) for i in range(2)]

    def generate(model, **changes):
        out = tmp_path / "out.mp4"
        module.generate(module.GenerateConfig(**{"dataset": str(dataset), "model": model, "out": str(out)} | changes))
        return asked[-1].actions_BSPA

    np.testing.assert_array_equal(generate("action", episode=1, start=4)[0, 0], window_actions(states[1], 4))
    other = generate("action", episode=0, start=4, actions_episode=1)
    np.testing.assert_array_equal(other[0, 0], window_actions(states[1], 4))
    np.testing.assert_array_equal(asked[-1].proprioception_BKA[0, 0], states[0][4])
    assert generate("text", episode=1) is None
    with pytest.raises(MissingCapabilityError, match="actions"):
        generate("text", actions_episode=1)
    with pytest.raises(UserError, match=r"actions_episode.*0\.\.1"):
        generate("action", actions_episode=2)
    picture = {"dataset": None, "image": str(tmp_path / "out.mp4"), "instruction": "click the bell"}
    with pytest.raises(UserError, match="demonstration"):
        generate("action", **picture)
