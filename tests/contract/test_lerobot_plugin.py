"""The policy type ``physis`` in LeRobot's own commands, where LeRobot is installed (Python 3.12, an environment of its own)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot", reason="needs LeRobot, in an environment of its own: docs/bring_your_policy.md")
pytest.importorskip("lerobot_policy_physis", reason="needs pip install -e setup/lerobot_policy_physis")

from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors

from acting_policy import acting_policy
from lerobot_toys import JOINTS, SENTENCE, ToyArm, ToyEnvConfig, ToyScene, picture
from physisforcing.core.errors import UserError
from physisforcing.core.types import Observation
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy
from physisforcing.policy.planning import load_chunk_model

EXECUTE = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return acting_policy(tmp_path_factory.mktemp("policy") / "tiny" / "export")


def words(source: Path, **more: Any) -> list[str]:
    given = {"type": "physis", "folder": source, "execute": EXECUTE, "device": "cpu", "cameras": "{head: top}"} | more
    return [f"--policy.{name}={value}" for name, value in given.items()]


def ours(folder: Path, scene: int, seed: int, steps: int) -> np.ndarray:
    """[steps, A] what our own loop executes in this scene."""
    policy = WorldActionPolicy(load_chunk_model(folder), ExecutionConfig(execute=EXECUTE))
    policy.reset(task="", seed=seed, instruction=SENTENCE)
    state, executed = np.zeros(JOINTS, np.float32), list[np.ndarray]()
    while len(executed) < steps:
        images = {"head": picture(scene, len(executed))}
        seen = Observation(
            images=images, state_A=state, measured_A=state, instruction=SENTENCE, step=len(executed)
        )  # fmt: skip
        executed += list(policy.act(seen))
        state = executed[-1]
    return np.stack(executed)[:steps]


@pytest.mark.parametrize("batch", [1, 2])
def test_lerobot_eval_executes_what_our_own_loop_does(folder, batch, tmp_path, monkeypatch) -> None:
    """Scenes 1000 and 1001 have the noise of the episode seeds 1000 and 1001, in one batch or one after the other."""
    from lerobot.scripts import lerobot_eval

    ToyScene.LOG.clear()
    command = [
        "lerobot-eval", *words(folder, fps=50 / 3), "--env.type=toys", "--eval.n_episodes=2",
        f"--eval.batch_size={batch}", "--eval.use_async_envs=false", f"--output_dir={tmp_path}", "--seed=1000",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    lerobot_eval.main()
    assert json.loads((tmp_path / "eval_info.json").read_text())["overall"]["pc_success"] == 100.0
    for seed in (1000, 1001):
        rows = np.stack([action for scene, action in ToyScene.LOG if scene == seed])
        np.testing.assert_array_equal(rows, ours(folder, seed, seed, 4))


def test_lerobot_rollout_drives_a_robot(folder, tmp_path, monkeypatch) -> None:
    from lerobot.scripts import lerobot_rollout

    ToyArm.SENT.clear()
    command = [
        "lerobot-rollout", *words(folder, fps=16.6667, seed=7), "--robot.type=toy_arm", f"--task={SENTENCE}", "--fps=16.6667",
        "--duration=1", "--device=cpu", "--return_to_initial_position=false", "--play_sounds=false",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    lerobot_rollout.main()
    assert len(ToyArm.SENT) >= 4
    np.testing.assert_array_equal(np.stack(ToyArm.SENT[:4]), ours(folder, 0, 7, 4))


def parsed(source: Path, **more: Any) -> PreTrainedConfig:
    import draccus

    given = [word.replace("policy.", "", 1) for word in words(source, **more)[1:]]  # without the type
    return draccus.parse(get_policy_class("physis").config_class, args=given)


def test_shapes_and_processors(folder) -> None:
    config = parsed(folder, fps=0)
    policy = make_policy(config, env_cfg=ToyEnvConfig())
    assert not list(policy.parameters())
    before, after = make_pre_post_processors(config)
    seen = {
        "observation.images.top": torch.from_numpy(picture(0, 0)).permute(2, 0, 1) / 255,
        "observation.state": torch.zeros(JOINTS), "task": SENTENCE,
    }  # fmt: skip
    batch = before(seen)
    chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (1, 16, JOINTS) and chunk.dtype == torch.float32
    policy.reset()  # the next episode: another seed, other noise
    rows = torch.cat([after(policy.select_action(batch)) for _ in range(EXECUTE)])
    assert rows.shape == (EXECUTE, JOINTS)
    np.testing.assert_array_equal(rows.numpy(), ours(folder, 0, 1001, EXECUTE))
    assert not torch.equal(rows, chunk[0, :EXECUTE])


def test_what_is_refused(folder, tmp_path) -> None:
    env = ToyEnvConfig()
    for more, field in (
        ({}, "policy.fps"), ({"fps": 30}, "policy tiny"), ({"fps": 0, "execute": 17}, "policy.execute"),
        ({"fps": 0, "folder": tmp_path}, "policy"), ({"fps": 0, "folder": ""}, "policy.folder"),
        ({"fps": 0, "cameras": "{wrist: top}"}, "policy.cameras"),
        ({"fps": 0, "mode": "idm"}, "policy.mode"),
    ):  # fmt: skip
        with pytest.raises(UserError) as refused:
            make_policy(parsed(folder, **more), env_cfg=env)
        assert refused.value.field == field
    config = parsed(folder, fps=0)
    with pytest.raises(UserError, match="action: got"):
        make_policy(config, env_cfg=ToyEnvConfig(width=7))
    config.pretrained_path = tmp_path
    with pytest.raises(UserError, match=r"policy\.path"):
        make_policy(config, env_cfg=env)
    config.pretrained_path = None
    for name, value, usual in (("device", "mps", "cpu"), ("use_amp", True, False)):
        setattr(config, name, value)
        with pytest.raises(UserError, match=rf"policy\.{name}"):
            make_policy(config, env_cfg=env)
        setattr(config, name, usual)
    policy = make_policy(config, env_cfg=env)
    for train in (
        lambda: policy.forward({}), policy.get_optim_params, config.get_optimizer_preset, config.get_scheduler_preset,
        lambda: config.action_delta_indices, lambda: policy.save_pretrained(tmp_path / "saved"),
    ):  # fmt: skip
        with pytest.raises(UserError, match="wanted inference"):
            train()
