"""The perfect world model: what it imagines is what the live environment then shows, bit by bit."""

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.pictures import shrink_area
from physisforcing.core.types import DT, RolloutRequest

pytestmark = pytest.mark.sim
SEED = 100_000


@pytest.fixture(scope="module")
def live():
    """A live click_bell environment."""
    from physisforcing.envs.robotwin.env import RoboTwinEnv

    env = RoboTwinEnv("click_bell")
    yield env
    env.close()


@pytest.fixture(scope="module")
def models(live):
    """Models of both modes with one twin."""
    from physisforcing.envs.simulator_world_model import SimulatorConfig, SimulatorWorldModel
    from physisforcing.envs.twin_client import TwinClient

    twin = TwinClient(live.task_name, live.options)
    configs = {mode: SimulatorConfig(mode=mode, horizons=(5, 17)) for mode in ("text", "actions")}
    yield {mode: SimulatorWorldModel(config, twin=twin).bind(live) for mode, config in configs.items()}
    twin.close()


def request(observation, horizon=5, actions_SPA=None, seeds=((0,),), instruction=None):
    return RolloutRequest(
        context_BVTHWC=shrink_area(observation["head_rgb"], 2)[None, None, None],
        instructions=[observation["instruction"] if instruction is None else instruction],
        seeds_BS=np.array(seeds, np.int64),
        horizon=horizon,
        actions_BSPA=None if actions_SPA is None else actions_SPA[None],
    )


def rollouts(model, asked, count):
    for _ in range(count):
        model.rollout(asked)


def waves(state_A, steps, phase=0.0):
    joints = np.arange(len(state_A))
    return np.stack([state_A + 0.2 * np.sin(0.3 * k + joints + phase) for k in range(1, steps + 1)]).astype(np.float32)


# ---------------------------------------------------------------------- exact


def test_actions_give_what_the_live_environment_then_shows(live, models):
    """Every picture, pose, contact and the success flag, bit by bit; in the middle of an episode as at its start."""
    from physisforcing.envs.executed import ChunkRecorder

    observation, _ = live.reset(seed=SEED)
    for phase in (0.0, 2.0):
        actions = waves(observation["state"], 8, phase)
        (found,) = models["actions"].imagine(request(observation, actions_SPA=actions[None]), truth=True)[0]
        recorder = ChunkRecorder(live, every=8)
        recorder.frame(live, observation)
        shown = [observation["head_rgb"]]
        for k, action_A in enumerate(actions):
            observation = live.step(action_A)[0]
            recorder.frame(live, observation)
            shown += [observation["head_rgb"]] if k % 2 else []
        (real,) = recorder.finish()
        assert found.frames_VTHWC.shape == (1, 5, 120, 160, 3)
        np.testing.assert_array_equal(found.frames_VTHWC[0], shrink_area(np.stack(shown), 2))
        real.start_step = found.executed.start_step  # the recorder began in the middle
        for field in dataclasses.fields(real):
            a, b = getattr(found.executed, field.name), getattr(real, field.name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name
        np.testing.assert_array_equal(found.actions_PA, actions)
    moved = np.linalg.norm(real.poses_TK7[-1, :, :3] - real.poses_TK7[0, :, :3], axis=1)
    assert moved.max() > 0.01, "the arms moved"


def test_the_expert_presses_the_bell_as_it_imagined(live, models):
    """Replanned twice; each plan's last picture is the next plan's context, and the last plan says that it succeeds."""
    observation, _ = live.reset(seed=SEED)
    model, said = models["text"], []
    for _ in range(3):
        asked = request(observation, horizon=17)
        (found,) = model.imagine(asked)[0]
        said.append(found.success)
        np.testing.assert_array_equal(found.frames_VTHWC[0, 0], asked.context_BVTHWC[0, 0, 0])
        for action_A in found.actions_PA[:-1]:
            live.step_blind(action_A)
        observation = live.step(found.actions_PA[-1])[0]
        np.testing.assert_array_equal(found.frames_VTHWC[0, -1], shrink_area(observation["head_rgb"], 2))
        assert not found.failure
        if live.success:
            break
    assert live.success and said == [False] * (len(said) - 1) + [True] and len(said) >= 2


def test_a_plan_of_two_rollouts_is_one_imagination(live, models):
    """The second rollout, asked for from the first one's last picture, is what the live environment then shows."""
    observation, _ = live.reset(seed=SEED)
    asked = dataclasses.replace(request(observation), ids=[(live.task_name, SEED, 0)], plan_steps=[0])
    first = models["text"].rollout(asked).frames_BSVTHWC
    later = dataclasses.replace(asked, context_BVTHWC=first[:, 0, :, -1:], plan_steps=[8])
    (found,) = models["text"].imagine(later)[0]
    np.testing.assert_array_equal(found.frames_VTHWC[:, 0], first[0, 0, :, -1])
    (whole,) = models["text"].imagine(request(observation, horizon=17))[0]
    np.testing.assert_array_equal(found.actions_PA, whole.actions_PA[8:16])
    for action_A in whole.actions_PA[:15]:
        live.step_blind(action_A)
    observation = live.step(whole.actions_PA[15])[0]
    np.testing.assert_array_equal(found.frames_VTHWC[0, -1], shrink_area(observation["head_rgb"], 2))


def test_the_expert_goes_on_after_commands_that_were_read_imperfectly(live, models):
    """Smooth errors of about 2 degrees on every target, as a decoder makes them: the next plan starts from where the robot is, and does
    not jump back to where it should be."""
    observation, _ = live.reset(seed=SEED + 1)
    generator, kernel = np.random.default_rng(0), np.hanning(9) / np.sqrt((np.hanning(9) ** 2).sum())
    for _ in range(4):
        (found,) = models["text"].imagine(request(observation, horizon=17))[0]
        jump_A = np.abs(found.actions_PA[0] - observation["state"])
        assert jump_A.max() < 0.2, "2 rad/s and a part of the error"
        white = generator.normal(0, 0.04, (32 + 8, 14))
        error = np.stack([np.convolve(white[:, j], kernel, mode="valid") for j in range(14)], axis=1)
        for action_A in (found.actions_PA + error).astype(np.float32):
            observation = live.step_blind(action_A)[0]
        observation = live.observe()
        if live.success:
            break
    assert live.success


# ---------------------------------------------------------------------- contract


def test_the_contract(live, models):
    """The suite of ``physis check worldmodel``, on two moments of one episode."""
    from physisforcing.planner.check_worldmodel import check_world_model

    live.reset(seed=SEED, options={"observe": False})
    start = live.fork()
    for action_A in waves(live.observe(pictures=False)["state"], 6):
        live.step_blind(action_A)
    states = [start, live.fork()]
    model = models["actions"]
    about = {"task": live.task_name, "options": live.options, "action_spec": live.action_spec}
    model.bind_source(lambda: states, **about)
    only = [
        "spec", "shapes", "times", "first-frame", "returns", "determinism", "seeds", "request-kept", "batch-invariance",
        "actions-sensitivity", "refuses-horizon", "refuses-goal", "refuses-small-context", "refuses-nan-actions",
        "refuses-short-actions", "refuses-uneven-rows",
    ]  # fmt: skip
    try:
        results = check_world_model(lambda: model, only=only)
    finally:
        model.bind(live)
    assert [r.line() for r in results if r.status != "pass"] == []
    assert len(results) == len(only) + 1


def test_candidates_of_one_context_are_one_rollout_in_text_mode(live, models):
    observation, _ = live.reset(seed=SEED)
    rollout = models["text"].rollout(request(observation, seeds=((0, 1, 2),)))
    assert rollout.frames_BSVTHWC.shape == (1, 3, 1, 5, 120, 160, 3)
    np.testing.assert_array_equal(rollout.times_T, np.arange(5) * 2 * DT)
    assert (rollout.frames_BSVTHWC == rollout.frames_BSVTHWC[:, :1]).all() and rollout.cost["expert_failed"] == 0
    assert (rollout.frames_BSVTHWC[0, 0, 0, 0] != rollout.frames_BSVTHWC[0, 0, 0, -1]).any()


def test_what_is_refused(live, models):
    from physisforcing.envs.robotwin.fork import StateDriftError
    from physisforcing.envs.simulator_world_model import SimulatorConfig, SimulatorWorldModel

    observation, _ = live.reset(seed=SEED)
    text = models["text"]
    with pytest.raises(UserError, match=r"env.*bind"):
        SimulatorWorldModel().rollout(request(observation))
    for bad in ({"height": 100}, {"width": 320}, {"stride": 0}, {"mode": "words"}):
        with pytest.raises(UserError, match=next(iter(bad)) if "mode" in bad else "size|horizons"):
            SimulatorConfig(**bad)
    with pytest.raises(MissingCapabilityError, match="actions"):
        text.rollout(request(observation, actions_SPA=waves(observation["state"], 8)[None]))
    with pytest.raises(MissingCapabilityError, match="instructions"):
        text.rollout(request(observation, instruction="open the laptop"))
    foreign = request(observation)
    foreign.context_BVTHWC[0, 0, 0, 60, 80, 0] ^= 1
    with pytest.raises(UserError, match="context_BVTHWC"):
        text.rollout(foreign)
    live.step_blind(observation["state"] + 0.05)
    with pytest.raises(UserError, match="context_BVTHWC"):
        text.rollout(request(observation))  # the picture of the moment before
    state = live.fork()
    about = {"task": live.task_name, "options": live.options, "action_spec": live.action_spec}
    moved = dataclasses.replace(state, poses_K7=state.poses_K7 + np.float32(1e-6))
    other = dataclasses.replace(state, scene_hash="0" * 64)
    try:
        for wrong, error in ((moved, StateDriftError), (other, UserError)):
            text.bind_source(lambda wrong=wrong: wrong, **about)
            with pytest.raises(error, match=r"poses_K7|scene_hash"):
                text.rollout(request(live.observe()))
    finally:
        text.bind(live)
    text.rollout(request(live.observe()))  # and it goes on


# ---------------------------------------------------------------------- drawn again


def test_an_episode_is_recorded_in_chunks_and_drawn_only_where_they_begin(live):
    from physisforcing.envs.executed import ChunkRecorder
    from physisforcing.envs.rollout import run_episode

    class Waves:
        fingerprint = "waves"

        def reset(self, **_):
            pass

        def act(self, observation):
            assert observation.images["head"].shape == (240, 320, 3)
            return waves(observation.state_A, 5)

        def telemetry(self):
            return {}

    recorder, draws = ChunkRecorder(live, every=5), []
    begin, live.begin_observe = live.begin_observe, lambda **kept: (draws.append(live.steps), begin(**kept))[1]
    try:
        result = run_episode(live, Waves(), seed=SEED, max_steps=12, recorder=recorder)
    finally:
        del live.begin_observe
    assert not result.error and result.steps == 12 and draws == [0, 5, 10]
    chunks = recorder.finish()
    assert [(c.start_step, c.steps) for c in chunks] == [(0, 5), (5, 5), (10, 2)]
    np.testing.assert_array_equal(chunks[0].poses_TK7[-1], chunks[1].poses_TK7[0])
    np.testing.assert_array_equal(chunks[-1].poses_TK7[-1], live.body_poses()[1])
    assert chunks[0].bodies("object") == chunks[2].bodies("object") and len(chunks[0].bodies("gripper")) == 6
    assert {chunks[0].body_names[b] for b in chunks[0].bodies("scenery")} == {"ground", "table", "wall"}
    for bad in ({"every": 0}, {"every": 5, "camera": "left_wrist"}):
        with pytest.raises(UserError, match=list(bad)[-1]):
            ChunkRecorder(live, **bad)


def test_erased_objects(live, models):
    """The same moments without the bell: its pixels change, the robot's stay but for shadows."""
    from physisforcing.envs.erase import ObjectEraser
    from physisforcing.envs.executed import ChunkRecorder

    observation, info = live.reset(seed=SEED)
    actions = models["text"].imagine(request(observation, horizon=17))[0][0].actions_PA
    for action_A in actions[:20]:
        live.step_blind(action_A)
    recorder, seen = ChunkRecorder(live, every=9), []
    for action_A in actions[20:24]:
        seen.append(live.observe())
        recorder.frame(live, seen[-1])
        live.step_blind(action_A)
    (chunk,) = recorder.finish()
    seen_THWC, twin = np.stack([s["head_rgb"] for s in seen]), models["text"].twin
    again = ObjectEraser(twin, height=240, width=320, hide_objects=False).chunk(SEED, info["scene_hash"], chunk)
    np.testing.assert_array_equal(again[0], seen_THWC)
    erased = ObjectEraser(twin, height=240, width=320).chunk(SEED, info["scene_hash"], chunk)[0]
    objects, robot = chunk.bodies("object"), chunk.bodies("robot") + chunk.bodies("gripper")
    assert [chunk.body_names[b] for b in objects] == ["050_bell"] and len(robot) >= 20
    on_object, on_robot = np.isin(chunk.body_HW, objects), np.isin(chunk.body_HW, robot)
    changed = (erased[0] != seen_THWC[0]).any(-1)
    assert on_object.sum() > 100 and changed[on_object].mean() > 0.99
    assert on_robot.sum() > 1000 and changed[on_robot].mean() < 0.02
    model = models["text"]
    imagined = model.imagine(request(live.observe()))[0][0].frames_VTHWC
    model.config.hide_objects = True
    try:
        hidden = model.imagine(request(live.observe()))[0][0].frames_VTHWC
    finally:
        model.config.hide_objects = False
    assert (imagined[:, 0] != hidden[:, 0]).any() and (imagined[:, -1] != hidden[:, -1]).any()
    with pytest.raises(UserError, match="scene_hash"):
        ObjectEraser(twin).chunk(SEED + 1, info["scene_hash"], chunk)
    with pytest.raises(UserError, match="ids_K"):
        ObjectEraser(twin).poses(SEED, info["scene_hash"], chunk.body_ids_K[:-1], chunk.poses_TK7[:, :-1])


# ---------------------------------------------------------------------- loss


def test_a_twin_that_is_killed_is_an_error_and_not_a_hang(live, models):
    from physisforcing.envs.twin_client import TwinLostError

    observation, _ = live.reset(seed=SEED)
    model = models["text"]
    model.rollout(request(observation))
    pid = model.twin.pid
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(TwinLostError, match="exit code -9"):
        rollouts(model, request(observation, horizon=17), 100)
    assert time.monotonic() - began < 60 and model.twin.pid is None
