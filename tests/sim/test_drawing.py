"""Pictures that are still being drawn while physics goes on: they belong to their frame, and nothing is freed under them."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import physisforcing.envs.robotwin  # noqa: F401  (registers the tasks)
from physisforcing.envs.recording import EpisodeRecorder

BROKEN = """
import gymnasium
import physisforcing.envs.robotwin
from physisforcing.envs.recording import EpisodeRecorder

env = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True).unwrapped

def on_frame(recorder, number):
    recorder.frame(env)
    if number == 10:
        raise ValueError("the expert failed")

for attempt in range(4):
    env.reset(seed=attempt % 2, options={"observe": False})
    recorder = EpisodeRecorder(ground_truth="sparse")
    try:
        env.play_expert(lambda t: on_frame(recorder, t))
    except ValueError as error:
        print(attempt, error, flush=True)
    if attempt == 2:
        env.close()
        env = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True).unwrapped
env.close()
print("done", flush=True)
"""


@pytest.mark.sim
def test_a_scene_goes_while_it_is_drawn():
    """An error between two frames: the next reset, and close, wait for the renderer. A crash would take the process."""
    run = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines() == [*(f"{k} the expert failed" for k in range(4)), "done"]


@pytest.mark.sim
def test_pictures_belong_to_their_frame_whatever_is_drawn_next():
    env = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True).unwrapped
    try:
        first, _ = env.reset(seed=3)
        truth = [{**first, "maps": env.depth_and_ids()}]
        actions = []
        for k in range(3):
            actions.append(first["state"] + np.float32(0.1 * (k + 1)) * (np.arange(14) == 1))
            seen = env.step(actions[-1])[0]
            truth.append({**seen, "maps": env.depth_and_ids()})
        env.reset(seed=3, options={"observe": False})
        recorder = EpisodeRecorder(ground_truth="full")
        recorder.frame(env)  # being drawn
        recorder.frame(env, env.step(actions[0])[0])  # the step draws before the first was fetched
        env.step_blind(actions[1])
        recorder.frame(env)
        env.observe()
        env.step_blind(actions[2])
        recorder.frame(env)
        recorder.finish()
    finally:
        env.close()
    for number, seen in enumerate(truth):
        np.testing.assert_array_equal(recorder.images["head"][number], seen["head_rgb"])
        np.testing.assert_array_equal(recorder.states[number], seen["state"])
        np.testing.assert_array_equal(recorder._depth[number], seen["maps"][0])
        np.testing.assert_array_equal(recorder._ids[number], seen["maps"][1])
    assert (recorder.images["head"][0] != recorder.images["head"][1]).any()
