"""Copies of a process that try something out: what they say arrives, and one that breaks or dies is an error at once."""

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from physisforcing.envs.tries import Film, Order, fork_copy


class World:
    """Counts its steps and falls apart at step 3 where asked to."""

    def __init__(self, breaks=False):
        self.steps, self.success, self.breaks = 0, False, breaks

    def step_blind(self, action_A):
        if self.breaks and self.steps == 2:
            raise ValueError("broken")
        self.steps += 1
        self.success = self.steps >= 4

    def body_poses(self):
        return np.zeros(1, np.uint16), np.full((1, 7), self.steps, np.float32)

    def contacts(self):
        return [(0, 1, float(self.steps))]


class Stage:
    """Pictures whose every number is the step that they show."""

    def objects(self):
        return frozenset()

    def arrange(self, poses_K7, hidden=()):
        self.shown = int(poses_K7[0, 0])

    def pictures(self):
        return np.full((1, 4, 4, 3), self.shown, np.uint8)


def try_out(world, order, deed):
    """The film of what a copy of this process says; ``deed(copy)`` is what the copy does."""
    now = SimpleNamespace(poses_K7=world.body_poses()[1], contacts=world.contacts(), success=False)
    copy, pipe, pid = fork_copy(world, order.steps, close=lambda: None)
    if copy is not None:
        try:
            deed(copy)
        finally:
            os._exit(3)
    try:
        return Film(Stage(), order, now, world.steps).watch(pipe)
    finally:
        pipe.close()
        assert os.waitpid(pid, 0)[0] == pid


def test_what_the_copy_does_is_filmed_and_the_original_has_not_moved():
    world, actions = World(), np.arange(12, dtype=np.float32).reshape(6, 2)
    found = try_out(world, Order(steps=6, stride=3, shrink=2, actions_PA=actions), lambda copy: copy.play(actions))
    assert found.frames_VTHWC.shape == (1, 3, 2, 2, 3) and found.frames_VTHWC[0, :, 0, 0, 0].tolist() == [0, 3, 6]
    np.testing.assert_array_equal(found.actions_PA, actions)
    assert found.success and found.failure == "" and found.executed is None and world.steps == 0


def test_a_copy_that_breaks_or_dies():
    actions, order = np.zeros((6, 2), np.float32), Order(steps=6, stride=3, shrink=2)

    def breaks(copy):
        try:
            copy.play(actions)
        except ValueError as error:
            copy.fail(f"no way: {error}")

    with pytest.raises(RuntimeError, match="no way: broken"):
        try_out(World(breaks=True), order, breaks)
    with pytest.raises(EOFError):
        try_out(World(), order, lambda copy: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(EOFError):
        try_out(World(), order, lambda copy: copy.play(actions[:4]))  # fewer than ordered


def test_numbers_that_are_none_are_not_drawn():
    """The physics may diverge; the last picture then stays, and the film says why."""
    world, actions = World(), np.zeros((4, 2), np.float32)
    finite = world.body_poses
    world.body_poses = lambda: (finite()[0], finite()[1] if world.steps < 3 else np.full((1, 7), np.nan, np.float32))
    found = try_out(world, Order(steps=4, stride=1, shrink=2), lambda copy: copy.play(actions))
    assert found.frames_VTHWC[0, :, 0, 0, 0].tolist() == [0, 1, 2, 2, 2] and found.failure == "the physics diverged"
