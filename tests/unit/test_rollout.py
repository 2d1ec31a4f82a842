"""The closed loop and the baselines, on an arm without a simulator that reaches its targets at once."""

import gymnasium
import numpy as np
import pytest

from physisforcing.core.errors import UnstableSceneError, UserError
from physisforcing.core.lerobot import HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.protocols import Policy
from physisforcing.core.types import ActionSpec
from physisforcing.envs.baselines import NoOp, Random, Replay, Retrieval, grey_cells
from physisforcing.envs.manifest import ManifestDriftError, ManifestEntry
from physisforcing.envs.rollout import run_episode

SPEC = ActionSpec(names=tuple("abcdefghijklmn"), low=(-2.0,) * 14, high=(2.0,) * 14)


class Reach(gymnasium.Env):
    """Succeeds when joint 0 is within 0.1 of a goal that the picture's brightness shows; limit 40."""

    action_space = gymnasium.spaces.Box(-2, 2, (14,), np.float32)
    task_name = "reach"
    success = False

    def reset(self, *, seed=None, options=None):
        if seed == 13:
            raise UnstableSceneError("it moves")
        self.seed_, self.steps, self.success = seed, 0, False
        self.state = np.zeros(14, np.float32)
        self.goal = np.random.default_rng(seed).uniform(0.5, 1.5)
        return self._observe(), self._info()

    def step(self, action):
        self.state = np.asarray(action, np.float32)
        self.steps += 1
        self.success |= abs(self.state[0] - self.goal) < 0.1
        return self._observe(), 0.0, self.success, self.steps >= 40, self._info()

    def _observe(self):
        picture = np.full((240, 320, 3), int(self.goal * 100), np.uint8)
        picture[: self.steps] = 0
        return {"head_rgb": picture, "state": self.state, "state_measured": self.state, "instruction": "reach it"}

    def _info(self):
        return {
            "is_success": self.success,
            "step": self.steps,
            "seed": self.seed_,
            "scene_hash": f"hash{self.seed_}",
            "task": "reach",
            "step_limit": 40,
            "assets": "none",
            "runtime": "none",
        }


class Scripted:
    fingerprint = "scripted"

    def __init__(self, chunks):
        self.chunks = chunks

    def reset(self, *, task, seed, instruction):
        self.calls = []

    def act(self, observation):
        self.calls.append(observation.step)
        chunk = self.chunks[len(self.calls) - 1]
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def telemetry(self):
        return {"plans": len(self.calls)}


def rows(*values):
    out = np.zeros((len(values), 14), np.float32)
    out[:, 0] = values
    return out


def goal_of(seed):
    env = Reach()
    env.reset(seed=seed)
    return env.goal


def test_chunks_are_executed_row_by_row_until_success():
    goal = goal_of(1)
    policy = Scripted([rows(0.1, 0.2), rows(0.3, goal, 0.9), rows(0.0)])
    result = run_episode(Reach(), policy, seed=1, record=True)
    assert result.status == "success" and result.success and result.steps == 4
    assert policy.calls == [0, 2] and result.telemetry == {"plans": 2.0}
    np.testing.assert_allclose(result.executed_PA[:, 0], [0.1, 0.2, 0.3, goal], rtol=1e-6)
    assert result.frames.shape == (5, 240, 320, 3) and result.frames.dtype == np.uint8
    assert result.scene_hash == "hash1" and result.fingerprint == "scripted"
    assert result.row()["steps"] == 4 and result.row()["step_limit"] == 40


def test_limits():
    policy = Scripted([rows(*[0.1] * 16)] * 4)
    assert run_episode(Reach(), policy, seed=1).steps == 40
    result = run_episode(Reach(), policy, seed=1, max_steps=21)
    assert (result.status, result.steps, policy.calls) == ("failure", 21, [0, 16])


@pytest.mark.parametrize(
    "bad", [ZeroDivisionError("boom"), np.full((2, 14), np.nan), np.zeros((2, 13)), np.zeros(14), np.zeros((0, 14))]
)
def test_a_policy_that_fails_is_an_error(bad):
    result = run_episode(Reach(), Scripted([rows(0.1), bad]), seed=1)
    assert result.status == "error" and not result.success and result.steps == 1
    assert ("boom" if isinstance(bad, Exception) else "policy.act") in result.error and "Traceback" in result.error


def test_an_unstable_scene_is_an_error():
    result = run_episode(Reach(), NoOp(), seed=13)
    assert result.status == "error" and result.error == "UnstableSceneError: it moves"


def test_a_drifted_scene_stops_the_evaluation():
    frozen = ManifestEntry(task="reach", seed=1, instruction="reach it", scene_hash="another")
    with pytest.raises(ManifestDriftError, match="another"):
        run_episode(Reach(), NoOp(), seed=1, expect=frozen)
    frozen = ManifestEntry(task="reach", seed=1, instruction="reach it", scene_hash="hash1")
    assert run_episode(Reach(), NoOp(), seed=1, expect=frozen).status == "failure"


def test_noop_holds_the_first_targets():
    result = run_episode(Reach(), NoOp(), seed=3)
    assert result.steps == 40 and np.ptp(result.executed_PA, axis=0).max() == 0


def test_random_is_uniform_in_the_limits_and_repeatable():
    policy = Random(SPEC)
    assert isinstance(policy, Policy)
    results = [run_episode(Reach(), policy, seed=5, max_steps=33) for _ in range(2)]
    np.testing.assert_array_equal(results[0].executed_PA, results[1].executed_PA)
    path = results[0].executed_PA
    assert np.abs(np.diff(path[:16], n=2, axis=0)).max() < 1e-5, "a straight line for 16 steps"
    assert np.abs(path[16] - path[15] - (path[15] - path[14])).max() > 0.01, "then another target"
    goals = []
    for seed in range(400):
        policy.reset(task="reach", seed=seed, instruction="")
        env = Reach()
        raw, _ = env.reset(seed=1)
        from physisforcing.envs.rollout import to_observation

        goals.append(policy.act(to_observation(raw, 0))[-1])
    assert np.abs(np.mean(goals, axis=0)).max() < 0.25 and np.min(goals) < -1.9 and np.max(goals) > 1.9


def test_replay_then_hold():
    goal = goal_of(2)
    result = run_episode(Reach(), Replay(rows(0.1, 0.2, 0.3)), seed=2)
    np.testing.assert_allclose(result.executed_PA[:5, 0], [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-6)
    assert result.status == "failure" and run_episode(Reach(), Replay(rows(0.1, goal)), seed=2).success
    with pytest.raises(UserError, match="actions"):
        Replay(np.zeros((0, 14)))


@pytest.fixture
def demonstrations(tmp_path):
    writer = LeRobotWriter(tmp_path / "demos", robot_features(SPEC.names))
    env = Reach()
    for seed in range(6):
        raw, _ = env.reset(seed=seed)
        frames, states = [raw["head_rgb"]], [raw["state"]]
        target = env.goal if seed != 4 else 0.0
        for share in (0.5, 1.0):
            raw, *_ = env.step(rows(share * target)[0])
            frames.append(raw["head_rgb"])
            states.append(raw["state"])
        states = np.stack(states)
        columns = {
            "observation.state": states,
            "observation.state_measured": states,
            "action": np.concatenate([states[1:], states[-1:]]),
            "next.success": np.array([False, env.success, env.success]),
        }
        writer.add_episode(
            columns=columns,
            frames={HEAD: np.stack(frames)},
            instruction="reach it",
            task_name="reach",
            seed=seed,
            success=bool(env.success),
        )
    return LeRobotDataset(writer.finalize())


def test_retrieval_replays_the_nearest_success(demonstrations, tmp_path):
    policy = Retrieval(demonstrations, cache_dir=tmp_path / "cache")
    goals = {seed: goal_of(seed) for seed in range(6) if seed != 4}
    for seed in range(20, 30):
        expected = min(goals, key=lambda s: abs(int(100 * goals[s]) - int(100 * goal_of(seed))))
        result = run_episode(Reach(), policy, seed=seed)
        assert demonstrations.episodes[int(result.telemetry["retrieved_episode"])].seed == expected
        assert result.executed_PA[1, 0] == pytest.approx(goals[expected], rel=1e-5)
    again = Retrieval(demonstrations, cache_dir=tmp_path / "cache")
    assert again.fingerprint == policy.fingerprint and list((tmp_path / "cache").glob("*.npz"))
    np.testing.assert_array_equal(again._index["grey"], policy._index["grey"])
    assert run_episode(Reach(), policy, seed=2).success, "a scene of the training set is found and solved"
    policy.reset(task="other", seed=0, instruction="")
    with pytest.raises(UserError, match="reach"):
        policy.nearest(np.zeros((240, 320, 3), np.uint8), np.zeros(14, np.float32), "other")


def test_grey_cells():
    picture = np.zeros((240, 320, 3), np.uint8)
    picture[8:16, 16:24] = (255, 255, 255)
    picture[16:24, 16:24] = (255, 0, 0)
    cells = grey_cells(picture)
    assert cells.shape == (30, 40) and cells[1, 2] == pytest.approx(1.0) and cells[2, 2] == pytest.approx(0.299)
    assert cells.sum() == pytest.approx(1.299)
