"""Actions in the denoiser: they start from zero, change their own latent frame only, and lead up to the pictures of their window."""

import numpy as np
import pytest
import torch

from physisforcing.worldmodel.backbones.actions import JOINTS, ActionConditioner, ActionConfig
from physisforcing.worldmodel.backbones.wan import ConditionerConfig, WanConfig, build_denoiser, embed
from physisforcing.worldmodel.data.batches import build_bank
from physisforcing.worldmodel.data.windows import Episode, FrameStore, WindowTable, kept_steps, window_actions
from tiny_actions import FRAMES, ROWS, action_denoiser, inputs, text_denoiser


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


def test_pico_with_actions_has_at_most_8_million_parameters():
    model = build_denoiser(WanConfig(), ConditionerConfig(), ActionConfig())
    assert 7.9e6 < sum(p.numel() for p in model.parameters()) <= 8e6
    assert model.actions.project.out_features == WanConfig().dim
