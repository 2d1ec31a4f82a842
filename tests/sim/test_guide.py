"""The expert beside an episode: it goes on from any moment as if it had acted all along, and starts again after mishaps."""

import numpy as np
import pytest

pytestmark = pytest.mark.sim
BLIND = {"observe": False}


class Enough(BaseException):
    """Ends a guide."""


class Episode:
    """Commands that are known beforehand; from then on the expert acts, ``steps`` steps or until it succeeds."""

    def __init__(self, env, commands, steps=600):
        self.env, self.commands, self.steps, self.acted, self.asked = env, list(commands), steps, [], 0
        self.over = False

    def next_command(self, drifting):
        from physisforcing.envs.robotwin.guide import Asked

        if self.env.steps < len(self.commands):
            return np.asarray(self.commands[self.env.steps], float)
        if drifting:
            self.asked += 1
            raise Asked
        assert not self.over, "from here on the expert acts, and asks nobody"
        self.over = True
        return None

    def act(self, action_A):
        self.acted.append(action_A)
        if len(self.acted) == self.steps or self.env.success:
            raise Enough

    def run(self):
        from physisforcing.envs.robotwin.guide import Guide

        self.guide = Guide(self.env, self.next_command, self.act)
        with pytest.raises(Enough):
            self.guide.run()
        return self


@pytest.fixture(scope="module")
def stack():
    from physisforcing.envs.robotwin.env import RoboTwinEnv

    env = RoboTwinEnv("stack_blocks_two", cameras=())
    yield env
    env.close()


def test_it_goes_on_from_any_moment_as_it_would_have_gone_on(stack):
    """Bit by bit: while reaching, in the middle of a motion with a block in the hand."""
    stack.reset(seed=100_000, options=BLIND)
    whole = Episode(stack, [], steps=130).run().acted
    for begun in (37, 90):
        stack.reset(seed=100_000, options=BLIND)
        rest = Episode(stack, whole[:begun], steps=130 - begun).run().acted
        np.testing.assert_array_equal(rest, whole[begun:])


def test_it_takes_over_gently_from_commands_beside_its_plan(stack):
    stack.reset(seed=100_000, options=BLIND)
    whole = np.stack(Episode(stack, [], steps=60).run().acted)
    beside = whole[:40] + 0.05
    stack.reset(seed=100_000, options=BLIND)
    rest = np.stack(
        Episode(stack, np.clip(beside, *np.array([stack.action_spec.low, stack.action_spec.high])), steps=20)
        .run()
        .acted
    )
    apart = np.abs(rest - whole[40:60])
    assert 0.02 < apart[0].max() <= 0.051 and apart[6:].max() < 0.02


def test_a_dropped_block_is_picked_up_again(stack):
    stack.reset(seed=100_000, options=BLIND)
    whole = Episode(stack, [], steps=120).run().acted
    blocks = [n for n, name in stack.body_names().items() if name == "box"]
    stack.reset(seed=100_000, options=BLIND)
    lifted = 0
    for lifted, action_A in enumerate(whole, start=1):  # noqa: B007
        stack.step_blind(action_A)
        heights = {int(n): pose[2] for n, pose in zip(*stack.body_poses(), strict=True) if n in blocks}
        if max(heights.values()) > 0.80:
            break
    opened = np.repeat(np.float32(whole[lifted - 1])[None], 12, axis=0)
    opened[:, [6, 13]] = 1.0
    stack.reset(seed=100_000, options=BLIND)
    episode = Episode(stack, [*whole[:lifted], *opened]).run()
    assert episode.asked == 1 and stack.success and not episode.guide.failure


def test_where_it_finds_no_way_it_says_so_and_stands_still(stack):
    from physisforcing.envs.robotwin.expert import PlannerConfig

    stack.reset(seed=100_000, options=BLIND)
    robot = stack._task.robot
    for planner in (robot.left_planner, robot.right_planner):
        planner.config = PlannerConfig(attempts=0)
    still_A = stack.observe(pictures=False)["state"]
    episode = Episode(stack, [still_A, still_A], steps=3).run()
    assert episode.guide.failure == "no reachable grasp" and not stack.success
    np.testing.assert_array_equal(episode.acted, [still_A] * 3)
