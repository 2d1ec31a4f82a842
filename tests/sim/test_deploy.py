"""Policies of others in our loop, ours in theirs: by RoboTwin's deploy interface and by XPolicyLab's."""

import threading
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from physisforcing.core.errors import UserError
from physisforcing.core.protocols import Policy
from physisforcing.core.types import ActionSpec, Observation
from physisforcing.envs.baselines import CHUNK, NoOp, Random, Replay
from physisforcing.envs.deploy import DeployPolicy, XPolicy, XPolicyModel, deploy_interface
from physisforcing.envs.deploy.formats import (
    from_robotwin,
    from_xpolicylab,
    from_xpolicylab_actions,
    robotwin_observation,
    xpolicylab_actions,
    xpolicylab_observation,
)
from physisforcing.envs.rollout import run_episode

SPEC = ActionSpec(names=tuple("abcdefghijklmn"), low=(-2.0,) * 14, high=(2.0,) * 14)


class Arm(gymnasium.Env):
    """Reaches its targets at once; succeeds when the last joint passes 1.5. ``seen``: what it was sent."""

    action_space = gymnasium.spaces.Box(-2, 2, (14,), np.float32)
    task_name = "click_bell"
    limit = 40

    def reset(self, *, seed=None, options=None):
        self.steps, self.seed_, self.success = 0, seed, False
        self.state = np.random.default_rng(seed).uniform(-1, 1, 14).astype(np.float32)
        return self._look(), self._info()

    def step(self, action):
        self.state, self.steps = np.asarray(action, np.float32), self.steps + 1
        self.success |= bool(self.state[-1] > 1.5)
        return self._look(), 0.0, self.success, self.steps >= self.limit, self._info()

    def _look(self):
        pictures = {"head_rgb": np.full((240, 320, 3), self.steps, np.uint8)}
        pictures["right_wrist_rgb"] = np.full((240, 320, 3), 100 + self.steps, np.uint8)
        return {**pictures, "state": self.state, "state_measured": self.state, "instruction": f"press {self.seed_}"}

    def _info(self):
        return {"is_success": self.success, "scene_hash": "h", "step_limit": self.limit, "seed": self.seed_}


def ramp(count=10, last=2.0):
    rows = np.zeros((count, 14), np.float32)
    rows[:, -1] = np.linspace(0, last, count)
    return rows


# ---------------------------------------------------------------------- foreign modules, as such folders define them


def hold_module():
    """One action a call, read from the observation."""
    log = []

    def get_model(usr_args):
        log.append(("get_model", usr_args["task_name"]))
        return {"resets": 0}

    def eval_(TASK_ENV, model, observation):
        log.append((TASK_ENV.take_action_cnt, TASK_ENV.get_instruction(), TASK_ENV.step_lim, TASK_ENV.eval_success))
        TASK_ENV.take_action(observation["joint_action"]["vector"])

    def reset_model(model):
        model["resets"] += 1

    return SimpleNamespace(__name__="hold", get_model=get_model, eval=eval_, reset_model=reset_model), log


class ChunkModel:
    def __init__(self, rows):
        self.rows, self.seen, self.closed = rows, [], False


def replay_module(rows):
    """A chunk a call, looking after every action, as most policies do."""

    def eval_(TASK_ENV, model, observation):
        assert observation is TASK_ENV.now_obs
        for row in model.rows:
            before = TASK_ENV.take_action_cnt
            TASK_ENV.take_action(list(map(float, row)), action_type="qpos")
            observation = TASK_ENV.get_obs()
            assert TASK_ENV.take_action_cnt == min(before + 1, TASK_ENV.step_lim)
            model.seen.append(observation["observation"]["head_camera"]["rgb"][0, 0, 0])

    return SimpleNamespace(
        get_model=lambda usr_args: ChunkModel(rows), eval=eval_, reset_model=lambda m: m.seen.clear()
    )


def deployed(module, **options):
    return DeployPolicy(module, {"task_name": "click_bell", "seed": 0}, step_limit=Arm.limit, **options)


def test_a_foreign_hold_acts_in_our_loop():
    module, log = hold_module()
    policy = deployed(module)
    assert isinstance(policy, Policy) and policy.fingerprint.startswith("deploy-hold-")
    first = run_episode(Arm(), policy, seed=7)
    assert first.status == "failure" and first.steps == 40 and np.ptp(first.executed_PA, axis=0).max() == 0
    assert log[:3] == [("get_model", "click_bell"), (0, "press 7", 40, False), (1, "press 7", 40, False)]
    assert first.telemetry == {"evaluations": 40.0, "actions": 40.0}
    second = run_episode(Arm(), policy, seed=8, max_steps=5)
    assert second.steps == 5 and policy._model["resets"] == 2 and log[-1][:2] == (4, "press 8")
    policy.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "foreign eval"]


def test_a_foreign_chunk_sees_every_step_and_stops_at_success():
    policy = deployed(replay_module(ramp(10)))
    for seed in (1, 2):
        result = run_episode(Arm(), policy, seed=seed)
        assert result.success and result.steps == 8, "the eighth row passes 1.5"
        np.testing.assert_array_equal(result.executed_PA, ramp(10)[:8])
        assert policy._model.seen == [1, 2, 3, 4, 5, 6, 7]
    assert deployed(replay_module(ramp(3, last=1.0)))._env is None
    result = run_episode(Arm(), deployed(replay_module(ramp(3, last=1.0))), seed=1)
    assert (result.steps, result.status) == (40, "failure")
    np.testing.assert_array_equal(result.executed_PA[3:6], ramp(3, last=1.0))


def foreign(eval_):
    return deployed(SimpleNamespace(get_model=lambda args: None, eval=eval_, reset_model=lambda model: None))


@pytest.mark.parametrize(
    ("eval_", "words"),
    [
        (lambda env, model, obs: env.take_action(np.zeros(16), action_type="ee"), "action_type"),
        (lambda env, model, obs: 1 / 0, "ZeroDivisionError"),
        (lambda env, model, obs: None, "100 calls without take_action"),
        (lambda env, model, obs: obs["endpose"]["left_endpose"], "left_endpose"),
        (lambda env, model, obs: obs["observation"]["left_camera"], "more cameras"),
        (lambda env, model, obs: obs["observation"]["head_camera"]["depth"], "depth"),
        (lambda env, model, obs: env.robot, "TASK_ENV.robot is not offered"),
        (lambda env, model, obs: env.take_action(np.zeros(13)), r"wanted \[P,14\]"),
        (lambda env, model, obs: env.take_action(np.full(14, np.nan)), "NaN"),
    ],
)
def test_what_a_foreign_policy_does_wrong_is_an_error(eval_, words):
    result = run_episode(Arm(), foreign(eval_), seed=1)
    assert result.status == "error"
    assert words.replace("\\", "") in result.error


def test_a_foreign_eval_that_swallows_errors_still_ends():
    def stubborn(env, model, obs):
        while True:
            try:
                env.take_action(np.zeros(14))
            except Exception:
                continue

    policy = foreign(stubborn)
    for seed in (1, 2):
        assert run_episode(Arm(), policy, seed=seed, max_steps=3).steps == 3
    policy.close()
    with pytest.raises(UserError, match="reset_model"):
        DeployPolicy(SimpleNamespace(get_model=print, eval=print), {})


# ---------------------------------------------------------------------- round trips


class Noisy:
    """A policy whose targets depend on everything it is told."""

    fingerprint = "noisy"

    def reset(self, *, task, seed, instruction):
        self._rng = np.random.default_rng([seed, len(task), len(instruction)])

    def act(self, observation):
        assert observation.images["head"].shape == (240, 320, 3) and observation.instruction.startswith("press")
        seen = float(observation.images["head"].mean() + observation.images["right_wrist"].mean()) / 1000
        noise_PA = self._rng.normal(size=(3, 14)) + observation.step / 100 + seen
        return (0.5 * observation.state_A + 0.1 * noise_PA).astype(np.float32)

    def telemetry(self):
        return {}


POLICIES = {"noisy": Noisy, "noop": NoOp, "random": lambda: Random(SPEC), "replay": lambda: Replay(ramp(21, 1.2))}


@pytest.mark.parametrize("name", POLICIES)
def test_ours_through_their_interfaces_acts_as_ours(name):
    make = POLICIES[name]
    direct = [run_episode(Arm(), make(), seed=seed) for seed in (3, 4)]
    through_robotwin = deployed(deploy_interface(lambda usr_args: make()))
    through_xpolicylab = XPolicy(XPolicyModel({"task_name": "click_bell"}, lambda cfg: make()))
    for policy in (through_robotwin, through_xpolicylab):
        assert isinstance(policy, Policy)
        for expected in direct:
            result = run_episode(Arm(), policy, seed=expected.seed)
            assert (result.status, result.steps) == (expected.status, expected.steps), result.error
            np.testing.assert_array_equal(result.executed_PA, expected.executed_PA)


def test_ours_in_a_runner_like_robotwins():
    """Upstream's loop: it owns TASK_ENV, and says neither seed nor measured joints."""
    interface = deploy_interface(lambda usr_args: Replay(ramp(10)))
    model = interface.get_model({"task_name": "click_bell", "seed": 1, "policy_name": "x"})
    arm, taken = Arm(), []

    class TheirEnv:
        step_lim, take_action_cnt, eval_success = 12, 0, False

        def get_obs(self):
            views = {"head_camera": {"rgb": arm._look()["head_rgb"]}}
            return {"observation": views, "joint_action": {"vector": arm.state.astype(np.float64)}}

        def get_instruction(self):
            return "press it"

        def take_action(self, action, action_type="qpos"):
            assert action_type == "qpos" and not self.eval_success
            self.take_action_cnt += 1
            taken.append(action)
            self.eval_success = arm.step(action)[2]

    seeds = []
    model.policy.reset = lambda *, task, seed, instruction, inner=model.policy.reset: (
        seeds.append((task, seed, instruction)),
        inner(task=task, seed=seed, instruction=instruction),
    )
    for _ in range(2):
        arm.reset(seed=0)
        env = TheirEnv()
        interface.reset_model(model)
        while env.take_action_cnt < env.step_lim and not env.eval_success:
            interface.eval(env, model, env.get_obs())
        assert env.eval_success and env.take_action_cnt == 8
    np.testing.assert_array_equal(taken[:8], ramp(10)[:8])
    assert seeds == [("click_bell", 200_000, "press it"), ("click_bell", 200_001, "press it")]
    with pytest.raises(UserError, match=r"data_type\.qpos"):
        interface.eval(TheirEnv(), model, {"observation": {}})


def test_ours_on_a_server_like_xpolicylabs():
    """Their websocket server: prepare_case, reset(), then update_obs and get_action once a chunk."""
    model = XPolicyModel({"action_type": "joint", "seed": 5}, lambda cfg: Random(SPEC))
    model.prepare_case({"task_name": "click_bell", "seed": 9, "instruction": "press", "action_type": "joint"})
    model.reset()
    expected = Random(SPEC)
    expected.reset(task="click_bell", seed=9, instruction="press")
    observation = Observation(
        images={"head": np.zeros((240, 320, 3), np.uint8)},
        state_A=np.linspace(-1, 1, 14, dtype=np.float32),
        measured_A=np.zeros(14, np.float32),
        instruction="press",
        step=0,
    )
    for _ in range(2):
        model.update_obs(xpolicylab_observation(observation))
        actions = model.get_action()
        assert len(actions) == CHUNK and actions[0]["left_arm_joint_state"].shape == (6,)
        rows_PA = from_xpolicylab_actions(actions, observation.state_A)
        np.testing.assert_array_equal(rows_PA, expected.act(observation))
    with pytest.raises(UserError, match="eval_batch"):
        model.update_obs_batch([])
    with pytest.raises(UserError, match="action_type"):
        XPolicyModel({"action_type": "ee"}, lambda cfg: NoOp())
    model.reset()
    with pytest.raises(UserError, match="update_obs"):
        model.get_action()


# ---------------------------------------------------------------------- foreign XPolicyLab models


class TheirReplay:
    """Chunks of three dictionaries; notes what it was shown."""

    def __init__(self, rows):
        self.rows, self.cases = rows, []

    def prepare_case(self, case_meta):
        self.cases.append((case_meta["task_name"], case_meta["seed"]))

    def reset(self):
        self.at, self.seen, self.asked = 0, [], []

    def update_obs(self, obs):
        assert obs["vision"]["cam_head"]["shape"] == (240, 320) and obs["data_format_version"] == "v1.0"
        self.seen.append(int(obs["vision"]["cam_head"]["color"][0, 0, 0]))

    def get_action(self):
        self.asked.append(self.seen[-1])
        rows = self.rows[self.at : self.at + 3]
        self.at += 3
        return xpolicylab_actions(rows)


def test_a_foreign_xpolicylab_model_in_our_loop():
    model = TheirReplay(ramp(30))
    result = run_episode(Arm(), XPolicy(model), seed=4)
    assert result.success and result.steps == 23 and model.cases == [("click_bell", 4)]
    assert model.seen == list(range(23)) and model.asked == list(range(0, 23, 3))
    np.testing.assert_array_equal(result.executed_PA, ramp(30)[:23])
    with pytest.raises(UserError, match="get_action"):
        XPolicy(SimpleNamespace(update_obs=print, reset=print))


def test_xpolicylab_actions_in_every_shape():
    state_A = np.arange(14, dtype=np.float32)
    rows_PA = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)
    for actions in (rows_PA, rows_PA.tolist(), {"actions": rows_PA}, xpolicylab_actions(rows_PA)):
        np.testing.assert_array_equal(from_xpolicylab_actions(actions, state_A), rows_PA)
    for single in (rows_PA[0], xpolicylab_actions(rows_PA)[0], {"actions": xpolicylab_actions(rows_PA)[0]}):
        np.testing.assert_array_equal(from_xpolicylab_actions(single, state_A), rows_PA[:1])
    one_arm = from_xpolicylab_actions({"right_arm_joint_state": np.zeros(6), "right_gripper": 1.0}, state_A)
    np.testing.assert_array_equal(one_arm, [[0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0, 0, 1]])
    for wrong in (
        {"left_ee_pose": np.zeros(7)},
        {"left_arm_joint_state": np.zeros(7)},
        {"left_arm_joints": np.zeros(6)},
        np.zeros((2, 7)),
        np.zeros((0, 14)),
    ):
        with pytest.raises(UserError):
            from_xpolicylab_actions(wrong, state_A)


def test_observations_survive_both_formats():
    images = {"head": np.full((240, 320, 3), 3, np.uint8), "left_wrist": np.full((240, 320, 3), 4, np.uint8)}
    state_A = np.random.default_rng(0).normal(size=14).astype(np.float32)
    ours = Observation(images=images, state_A=state_A, measured_A=state_A, instruction="press", step=6)
    theirs = robotwin_observation(ours)
    assert set(theirs) == {"observation", "joint_action", "endpose", "pointcloud"}
    assert theirs["joint_action"]["vector"].dtype == np.float64 and len(theirs["joint_action"]["left_arm"]) == 6
    assert theirs["joint_action"]["right_gripper"] == state_A[13] and "endpose" in theirs and "depth" not in theirs
    for back in (
        from_robotwin(theirs, instruction="press", step=6),
        from_xpolicylab(xpolicylab_observation(ours), step=6),
    ):
        np.testing.assert_array_equal(back.state_A, state_A)
        assert back.state_A.dtype == np.float32 and set(back.images) == set(images)
        np.testing.assert_array_equal(back.images["left_wrist"], images["left_wrist"])
        assert (back.instruction, back.step) == ("press", 6)
    with pytest.raises(UserError, match="head"):
        from_xpolicylab({**xpolicylab_observation(ours), "vision": {}}, step=0)


def test_policies_by_name_behind_both_interfaces(tmp_path, monkeypatch):
    from physisforcing import deploy

    (tmp_path / "my_policies.py").write_text(
        "from physisforcing.envs.baselines import NoOp\ndef hold(settings):\n    settings['task_name'].lower\n    return NoOp()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    model = deploy.get_model({"physis_policy": "noop", "task_name": "click_bell", "seed": None})
    assert isinstance(model.policy, NoOp) and callable(deploy.eval) and callable(deploy.reset_model)
    settings = {"physis_policy": "my_policies:hold", "task_name": "click_bell"}
    assert isinstance(deploy.Model(settings).policy, NoOp)
    with pytest.raises(KeyError):  # the factory's own mistake stays its own
        deploy.Model({"physis_policy": "my_policies:hold"})
    for settings, words in [
        ({"physis_policy": "noup"}, "noop"),
        ({"physis_policy": "json:nothing"}, "module:factory"),
        ({"physis_policy": "json:dumps"}, "Policy"),
        ({"planner": {"devise": "cpu"}}, "device"),
    ]:
        with pytest.raises(UserError, match=words):
            deploy.make_policy(settings)


@pytest.mark.slow
def test_the_shipped_planner_through_both_interfaces():
    from physisforcing import deploy

    settings = {"task_name": "click_bell", "planner": {"denoising_steps": 1, "max_resamples": 0}}
    expected = run_episode(Arm(), deploy.make_policy(settings), seed=5, max_steps=4)
    assert expected.status == "failure" and np.ptp(expected.executed_PA) > 0, expected.error
    for policy in (DeployPolicy(deploy, settings, step_limit=40), XPolicy(deploy.Model(settings))):
        result = run_episode(Arm(), policy, seed=5, max_steps=4)
        np.testing.assert_array_equal(result.executed_PA, expected.executed_PA)
        assert result.steps == 4, result.error


# ---------------------------------------------------------------------- RoboTwin


@pytest.mark.sim
@pytest.mark.parametrize("control", ["topp", "interpolated"])
def test_foreign_replays_of_the_expert_succeed_in_the_simulator(control):
    import physisforcing.envs.robotwin  # noqa: F401

    make = gymnasium.make("RoboTwin/click_bell-v0", disable_env_checker=True, control=control)
    env = make.unwrapped
    try:
        env.reset(seed=1, options={"observe": False})
        targets = []
        assert env.play_expert(lambda _: targets.append(env.observe(pictures=False)["state"]))
        rows = np.stack(targets[1:])
        usr_args = {"task_name": "click_bell", "task_config": "demo_clean", "seed": 0}
        theirs = replay_module(rows)
        theirs.reset_model = lambda model: model.seen.clear()
        policy = DeployPolicy(theirs, usr_args, cameras=env.cameras)
        result = run_episode(env, policy, seed=1)
        assert result.success and result.info["control"] == control, result.error
        assert policy._env.step_lim == env.step_limit == 400
        shown = policy._env.now_obs["observation"]["head_camera"]
        camera = env._pictures.cameras["head"]
        np.testing.assert_allclose(shown["intrinsic_cv"], camera.get_intrinsic_matrix(), atol=1e-4)
        np.testing.assert_allclose(shown["extrinsic_cv"], camera.get_extrinsic_matrix()[:3], atol=1e-5)
        np.testing.assert_allclose(shown["cam2world_gl"], camera.get_model_matrix(), atol=1e-5)
        if control == "topp":
            ours_with_upstreams_own_task(env, rows)
            return
        ours = deploy_interface(lambda usr_args: Replay(rows))
        again = run_episode(env, DeployPolicy(ours, usr_args), seed=1)
        np.testing.assert_array_equal(again.executed_PA, result.executed_PA)
        assert again.success and again.steps == result.steps
    finally:
        make.close()


def ours_with_upstreams_own_task(env, rows):
    """RoboTwin's task object as TASK_ENV, with its own ``get_obs`` and ``take_action``, in the order of its runner."""
    _, info = env.reset(seed=1, options={"observe": False})
    task = env._task
    task.data_type = {"rgb": True, "qpos": True}
    task.set_instruction(instruction="click the bell")
    module = deploy_interface(lambda usr_args: Replay(rows))
    model = module.get_model({"task_name": "click_bell", "seed": 0})
    module.reset_model(model)
    while task.take_action_cnt < task.step_lim and not task.eval_success:
        observation = type(task).__mro__[1].get_obs(task)  # ours draws nothing
        assert {"head_camera", "left_camera", "right_camera"} <= set(observation["observation"])
        module.eval(task, model, observation)
    assert task.eval_success and 0 < task.take_action_cnt <= len(rows) and info["control"] == "topp"
