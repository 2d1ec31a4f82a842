"""The task's expert beside an episode that somebody else acts in: it watches, and can go on from any moment of it.

RoboTwin's experts are scripts (``play_once``) that start from the untouched scene: run again in the middle of an episode they would
grasp what the hand already holds. So the script is run once along the episode. Every motion that it asks for is planned in the scene as
it then is, and lasts as many control steps as planned, during which the episode's own commands are executed; what the script reads of the
scene is therefore what the episode made of it. Where the commands end, the script itself acts: it goes on with the motion under way.

The script starts again from the scene as it is (hands opened first) when it ends without success, when an object that it is about to place
is not in the hand, and, once somebody asks for the expert, after the commands have left what it planned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.types import PHYSICS_STEPS_PER_ACTION

from .fork import is_plain
from .observation import drive_targets
from .roles import actor_ids, hand_ids
from .runtime import seeded_globals

if TYPE_CHECKING:
    from .env import RoboTwinEnv

#: Commands this far from the plan (radians; opening of a gripper) have left it.
OFF_PLAN_RAD, OFF_PLAN_GRIPPER = 0.5, 0.7
#: Drive targets this near to the plan are the plan's, rounded to float32.
SAME = 1e-6
#: Control steps in which the difference between commands and plan fades when the expert takes over.
FADE = 6
#: A hand opened less than this is opened before the script starts again; control steps that opening fully takes, and the wait after it.
OPEN, OPENING, WAIT = 0.9, 14, 4


class Asked(Exception):
    """Raised out of ``next_command`` while the guide drifts: somebody asks for the expert."""


class _OffPlan(Exception):
    """The commands have left what the script planned."""


class _Lost(Exception):
    """What the script is about to place is not in the hand."""


class Guide:
    """``next_command(drifting)`` gives the episode's next command [A] and may block, or None: from here on the expert acts. While
    ``drifting`` it raises ``Asked`` instead. ``acted(action_A)`` is called after each step of the expert's own.

    ``failure``: why the expert cannot act (it then holds still), or an empty string.
    """

    def __init__(
        self,
        env: RoboTwinEnv,
        next_command: Callable[[bool], NDArray[np.float64] | None],
        acted: Callable[[NDArray[np.float32]], None],
    ) -> None:
        self.env, self.failure, self.acting = env, "", False
        self._next_command, self._acted = next_command, acted
        left, right = env._embodiment.left, env._embodiment.right
        self._arms = {"left": left, "right": right}
        self._grippers = {"left": left.stop, "right": right.stop}
        self._standing_A = drive_targets(env._task.robot)
        self._reference_A = self._standing_A.copy()
        self._fading_A, self._faded = np.zeros_like(self._standing_A), 0

    def run(self) -> NoReturn:
        """Go along the episode until a callback raises."""
        while True:
            begun, self.failure = self.env.steps, ""
            try:
                self._attempt()
            except _Lost:
                reason = "the object slipped out of the hand"
            except _OffPlan:
                self._drift()
                continue
            else:
                reason = self.failure or "the task's check fails at the end"
            if self.env.success:
                self.failure = ""
                self._hold()
            if self.env.steps == begun:  # starting again here would end the same way
                self.failure = reason
                self._stand()

    # ------------------------------------------------------------------ one run of the script

    def _attempt(self) -> None:
        env, task = self.env, self.env._task
        self._standing_A = drive_targets(task.robot)
        self._reference_A = self._standing_A.copy()
        if env.steps:
            self._open_hands()
        performer = self._performer()
        try:
            with seeded_globals(env.seed_used % 2**32):
                performer.play_once()
            self.failure = "" if performer.plan_success else "no motion found"
        except (_Lost, _OffPlan, EOFError, OSError):  # the last two from the callbacks: whoever asks is gone
            raise
        except Exception as error:
            # scripts expect scenes that are as they were set up; "target_pose cannot be None" says that no grasp was found
            no_grasp = isinstance(error, AssertionError) and "target_pose cannot be None" in str(error)
            self.failure = "no reachable grasp" if no_grasp else f"its script raised {type(error).__name__}: {error}"
        finally:
            performer.__dict__.clear()  # it refers to itself and to the scene

    def _performer(self) -> Any:
        """A stand-in for the task: reads its scene, keeps its own notes, and moves by asking the guide."""
        task = self.env._task
        performer = object.__new__(type(task))
        own = {name: copy.deepcopy(value) if is_plain(value) else value for name, value in vars(task).items()}
        performer.__dict__.update(own)
        performer.plan_success = True
        performer.take_dense_action = self._dense
        performer.together_move_to_pose = lambda *poses, **kept: self._together(performer, *poses, **kept)
        place = performer.place_actor

        def place_actor(actor: Any, arm_tag: Any, *values: Any, **kept: Any) -> Any:
            if performer.plan_success and not self._in_hand(actor, str(arm_tag)):
                raise _Lost
            return place(actor, arm_tag, *values, **kept)

        performer.place_actor = place_actor
        return performer

    def _in_hand(self, actor: Any, side: str) -> bool:
        """Whether this hand has touched the actor in the last control step."""
        wanted, hand = actor_ids(actor), hand_ids(self.env._task.robot, side)
        return any((a in wanted and b in hand) or (b in wanted and a in hand) for a, b, _ in self.env._contacts.pairs())

    def _open_hands(self) -> None:
        shut = [column for column in self._grippers.values() if self._standing_A[column] < OPEN]
        rows_PA = np.repeat(self._standing_A[None], OPENING + WAIT if shut else 0, axis=0)
        for column in shut:
            rows_PA[:OPENING, column] = np.linspace(self._standing_A[column], 1.0, OPENING + 1)[1:]
            rows_PA[OPENING:, column] = 1.0
        self._perform(rows_PA)

    # ------------------------------------------------------------------ motions

    def _dense(self, control: dict[str, Any], save_freq: Any = -1) -> bool:
        """In place of ``Base_Task.take_dense_action``: each part at its own pace."""
        paths: list[tuple[slice | int, NDArray[np.float64]]] = []
        for side in ("left", "right"):
            if (arm := control[f"{side}_arm"]) is not None:
                paths.append((self._arms[side], np.asarray(arm["position"], float)))
            if (gripper := control[f"{side}_gripper"]) is not None:
                paths.append((self._grippers[side], np.asarray(gripper["result"], float)[: gripper["num_step"]]))
        length = max((len(path) for _, path in paths), default=0)
        ends = _control_steps(length)
        self._move([(columns, path[np.minimum(ends, len(path)) - 1]) for columns, path in paths], len(ends))
        return True

    def _together(
        self,
        performer: Any,
        left_target_pose: Any,
        right_target_pose: Any,
        left_constraint_pose: Any = None,
        right_constraint_pose: Any = None,
        **_: Any,
    ) -> None:
        """In place of ``Base_Task.together_move_to_pose``: both arms arrive at the same time; none moves unless both can."""
        if not performer.plan_success:
            return
        poses = {"left": left_target_pose, "right": right_target_pose}
        limits = {"left": left_constraint_pose, "right": right_constraint_pose}
        paths = {}
        for side, pose in poses.items():
            found = {"status": "Fail"}
            if pose is not None:
                plan = getattr(performer.robot, f"{side}_plan_path")
                found = plan([*pose.p, *pose.q] if hasattr(pose, "p") else pose, constraint_pose=limits[side])
            if found["status"] != "Success":
                performer.plan_success = False
                return
            paths[side] = np.asarray(found["position"], float)
        length = max(map(len, paths.values()))
        share = _control_steps(length) / length
        rows = [(self._arms[side], path[np.ceil(share * len(path)).astype(int) - 1]) for side, path in paths.items()]
        self._move(rows, len(share))

    def _move(self, parts: Sequence[tuple[slice | int, NDArray[np.float64]]], count: int) -> None:
        now_A = drive_targets(self.env._task.robot)
        rows_PA = np.repeat(self._standing_A[None], count, axis=0)
        for columns, values in parts:
            rows_PA[:, columns] = values
            # planned from where the joints are, not from where they should be
            self._reference_A[columns], self._fading_A[columns] = now_A[columns], 0.0
        self._perform(rows_PA)

    def _perform(self, rows_PA: NDArray[np.float64]) -> None:
        for row_A in rows_PA:
            self._pass(row_A)
            self._standing_A = row_A

    # ------------------------------------------------------------------ control steps

    def _pass(self, row_A: NDArray[np.float64]) -> None:
        """One control step for which ``row_A`` is planned: the episode's, or the expert's own."""
        if not self.acting:
            command_A = self._next_command(False)
            if command_A is not None:
                self.env._act(command_A)
                self._reference_A = row_A.copy()
                apart_A = np.abs(command_A - row_A)
                apart_A[list(self._grippers.values())] *= OFF_PLAN_RAD / OFF_PLAN_GRIPPER
                if apart_A.max() > OFF_PLAN_RAD:
                    raise _OffPlan
                return
            self.acting = True
            apart_A = drive_targets(self.env._task.robot) - self._reference_A
            self._fading_A = np.where(np.abs(apart_A) < SAME, 0.0, apart_A)
        self._faded += 1
        self._act(row_A + self._fading_A * max(0.0, 1 - self._faded / FADE))
        self._reference_A = row_A.copy()

    def _act(self, wanted_A: NDArray[np.float64]) -> None:
        action_A = wanted_A.astype(np.float32)
        self.env.step_blind(action_A)
        self._acted(action_A)

    def _hold(self) -> NoReturn:
        """Stay, along whatever the episode does, until a callback raises."""
        while not self.acting:
            self._follow()
        self._stay()

    def _stand(self) -> None:
        """The expert finds no way from here: whoever asks now gets it standing still; after the next command it may look again."""
        if not self.acting:
            self._follow()
        if self.acting:
            self._stay()
        self._drift()

    def _follow(self) -> None:
        """The episode's next command, without a plan; ``acting`` afterwards where there is none."""
        command_A = self._next_command(False)
        if command_A is None:
            self.acting = True
        else:
            self.env._act(command_A)

    def _stay(self) -> NoReturn:
        still_A = drive_targets(self.env._task.robot)
        while True:
            self._act(still_A)

    def _drift(self) -> None:
        """Go along without a plan until somebody asks for the expert."""
        try:
            while True:
                command_A = self._next_command(True)
                assert command_A is not None
                self.env._act(command_A)
        except Asked:
            return


def _control_steps(length: int) -> NDArray[np.int64]:
    """How far a path of ``length`` physics steps has come at the end of each control step; the last one is filled up by waiting."""
    count = -(-length // PHYSICS_STEPS_PER_ACTION)
    return np.minimum(np.arange(1, count + 1) * PHYSICS_STEPS_PER_ACTION, length)
