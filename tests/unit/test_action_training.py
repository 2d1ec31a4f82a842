"""Training with actions: it starts from a text model bit by bit, actions decide what text cannot, and ``physis generate`` takes an episode's."""

import json

import numpy as np
import pytest
import torch

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.worldmodel.backbones.actions import JOINTS
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, load_denoiser
from physisforcing.worldmodel.data.batches import WindowBank, step_generator
from physisforcing.worldmodel.data.windows import WindowTable, window_actions
from physisforcing.worldmodel.flow_matching import FlowMatchingConfig, euler_sample
from physisforcing.worldmodel.training.objective import draw_noise, objective
from tiny_actions import FRAMES, ROWS, TINY, action_denoiser, inputs, text_denoiser, tiny_codec, world_model


@pytest.fixture(scope="module")
def codec():
    return tiny_codec()


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
        drawn = draw_noise(batch["latents_BCFhw"].shape, flow, step_generator(0, step))
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
