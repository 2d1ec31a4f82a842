"""Diverted demonstrations, and two executions from one fork: in the real simulator."""

from __future__ import annotations

import importlib
import multiprocessing

import gymnasium
import numpy as np
import pytest

from physisforcing.core.lerobot import LeRobotDataset
from physisforcing.envs.collect import CollectConfig, collect
from physisforcing.envs.diversions import TAIL_STEPS, record_diverted_expert
from physisforcing.envs.recording import EpisodeRecorder, expert_targets
from physisforcing.envs.seeds import Job

pytestmark = pytest.mark.sim
TASK = "adjust_bottle"


@pytest.fixture(scope="module")
def env():
    import physisforcing.envs.robotwin  # noqa: F401

    made = gymnasium.make(f"RoboTwin/{TASK}-v0", disable_env_checker=True)
    yield made.unwrapped
    made.close()


def test_a_diverted_episode_is_the_experts_and_then_another(env):
    expert_TA = expert_targets(env, 0)
    recorder = EpisodeRecorder(ground_truth="poses")
    info = record_diverted_expert(env, 0, recorder, hold_frames=2)
    states_TA = recorder.columns()["observation.state"]
    kept = len(recorder) - 1 - TAIL_STEPS - 2
    assert len(expert_TA) / 6 - 1 <= kept < len(expert_TA) and info["task"] == TASK
    np.testing.assert_allclose(states_TA[: kept + 1], expert_TA[: kept + 1], atol=1e-6)
    tail = np.abs(np.diff(states_TA[kept:-2], axis=0))
    assert 0.01 < tail[:, [*range(6), *range(7, 13)]].max() < 0.12
    assert recorder.success[-1] == env.success and (np.diff(np.array(recorder.success, int)) >= 0).all()
    assert not recorder.success[0]
    again = EpisodeRecorder(ground_truth="none")
    record_diverted_expert(env, 0, again, hold_frames=2)
    np.testing.assert_array_equal(again.columns()["observation.state"], states_TA)


def test_collections_say_which_behaviour_an_episode_holds(env, tmp_path):
    env.close()  # one live environment a process
    for policy in ("expert+random", "expert+errors", "expert"):
        config = CollectConfig(output=str(tmp_path / "data"), tasks=[TASK], episodes=1, workers=0, policy=policy)
        config.ground_truth = "poses"
        row = collect(config, progress=False)["tasks"][TASK]
        assert row["recorded"] == 1
    data = LeRobotDataset(tmp_path / "data")
    assert not multiprocessing.active_children(), "the twin has ended"
    assert sorted(episode.policy.split()[0] for episode in data.episodes) == [
        "expert",
        "expert+errors",
        "expert+random",
    ]
    states = {e.policy.split()[0]: np.asarray(data.columns(e.index)["observation.state"]) for e in data.episodes}
    erred, exact = states["expert+errors"], states["expert"]
    shared = min(len(erred), len(exact), 33)  # the first plan: the expert's own targets but for the errors
    off = np.degrees(erred[1:shared] - exact[1:shared])[:, [*range(6), *range(7, 13)]]
    assert np.array_equal(erred[0], exact[0]) and 0.05 < off.std() < np.degrees(config.noise_rad)
    said = next(float(e.policy.split()[1].removesuffix("deg")) for e in data.episodes if " " in e.policy)
    assert off.std() == pytest.approx(said, rel=0.3)
    assert np.array_equal(erred[-1], erred[-1 - config.hold_frames]), "it holds at the end"
    assert np.diff(off, axis=0).std() < 0.8 * off.std(), "smooth: white errors would have 1.4"
    for episode in data.episodes:
        assert episode.instruction and episode.task_name == TASK
        assert bool(data.columns(episode.index)["next.success"][-1]) == episode.success


@pytest.mark.slow
def test_a_state_has_two_executions_of_one_fork(env, repository, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    states = importlib.import_module("action_following_states")
    env.close()
    maker = states.StateMaker(tmp_path)
    try:
        outcome = maker.handle(Job(task=TASK, seed=100_000))
    finally:
        maker.close()
    assert outcome.kind == "recorded", outcome.message
    made = states.States.load(tmp_path / f"{TASK}-00100000.safetensors")
    about, true = made.about[0], made.points_S2TN2[0]
    assert about["task"] == TASK and len(about["scene_hash"]) == 64 and made.context_SHWC.shape == (1, 120, 160, 3)
    real = made.group_SN[0] >= 0
    assert (made.group_SN[0] == 0).sum() >= states.LEAST <= (made.group_SN[0] == 1).sum()
    np.testing.assert_array_equal(true[0, 0], true[1, 0])
    both = made.visible_S2TN[0].all(0)
    apart = np.linalg.norm(true[0] - true[1], axis=-1)
    assert ((both & (apart > states.APART_PX)).any(0) == real).all()
    np.testing.assert_array_equal(made.proprioception_SKA[0, 0], expert_of(states, about)[about["step"]])
    first = np.abs(made.actions_S2PA[0, :, 0] - made.proprioception_SKA[0, 0])
    assert first.max() < 0.13, "both go on from where the robot is"
    error = np.linalg.norm(made.tracked_S2TN2[0] - true, axis=-1)[made.seen_S2TN[0] & made.visible_S2TN[0]]
    assert np.median(error) < 1.0, "the tracker finds them in the executed video"


def expert_of(states, about):
    made = gymnasium.make(f"RoboTwin/{about['task']}-v0", disable_env_checker=True)
    try:
        return states.expert_path(made.unwrapped, about["seed"])[0]
    finally:
        made.close()
