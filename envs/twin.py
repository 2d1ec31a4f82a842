"""A twin of a live episode in another process, from any moment of which the future can be tried out as often as wanted.

The simulator's engine can neither save nor load a moment (``robotwin/fork.py``). So the twin builds the live episode's scene and repeats its
commands as they come; what could happen next is tried out in a copy of the process (``os.fork``), which ends afterwards, while the twin
itself stays at the moment. A try costs the physics of its own steps and their pictures; the commands since the last one are repeated once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.types import ActionSpec

from .processes import PASSED_ON, EnvProcess
from .robotwin.fork import SimulatorState, StateDriftError, capture, differences
from .robotwin.guide import Asked, Guide
from .robotwin.live import claim, release
from .robotwin.stage import Stage
from .tries import Copy, Film, Order, Try, drawn, fork_copy, moment

Environments = Callable[[], tuple[Any, Any]]


def twin_process(task: str, options: dict[str, Any], views: tuple[str, ...]) -> EnvProcess:
    """Start a twin for episodes of ``RoboTwinEnv(task, **options)``, drawn by the cameras ``views``. It answers ``spaces`` (on its own, with
    the action spec), ``meet``, ``imagine`` and ``redraw``: see these methods of ``Twin``."""
    return EnvProcess(partial(_environments, task, options, views), body=_body)


def _environments(task: str, options: dict[str, Any], views: tuple[str, ...]) -> tuple[Any, Any]:
    from .robotwin.env import RoboTwinEnv

    return RoboTwinEnv(task, **{**options, "cameras": ()}), RoboTwinEnv(task, **{**options, "cameras": views})


def _body(pipe: Any, make: Environments) -> None:
    """Life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which closes the pipe
    twin = Twin(pipe, make)
    try:
        twin.live()
    except (EOFError, OSError):
        pass
    except BaseException:
        if twin.copy is None:
            raise
        twin.copy.fail(traceback.format_exc(limit=12))
    finally:
        if twin.copy is not None:
            os._exit(1)  # the twin is gone, and this is its copy
        twin.close()


@dataclass(slots=True, kw_only=True)
class Met:
    """A moment of a live episode: its pictures uint8 [V,240,320,3], the episode's instruction, the drive targets float32 [A]."""

    pictures_VHWC: NDArray[np.uint8]
    instruction: str
    state_A: NDArray[np.float32]


class _Elsewhere(BaseException):
    """The moment asked for does not follow from this one: out of the expert's script."""


class Twin:
    """Answers the questions that come through ``pipe``. ``copy``: set in a copy of the process only."""

    def __init__(self, pipe: Any, make: Environments) -> None:
        self._pipe, self._make = pipe, make
        self._env: Any = None
        self._stage: Any = None
        self._wanted: SimulatorState | None = None  # the moment to be at
        self._question: tuple[int, str, tuple[Any, ...]] | None = None  # not answered yet
        self._guide: Guide | None = None
        self.copy: Copy | None = None

    def live(self) -> NoReturn:
        """Answer until the other side closes the pipe (``EOFError``)."""
        while True:
            with contextlib.suppress(_Elsewhere):
                if self._wanted is None:
                    self._next_question()
                    self._answer()
                else:
                    self._go_along(self._wanted)

    def close(self) -> None:
        for scene in (self._env, self._stage):
            if scene is not None:
                scene.close()

    # ------------------------------------------------------------------ one episode

    def _go_along(self, state: SimulatorState) -> NoReturn:
        """Build its scene and repeat its commands, the expert beside it, until another episode is asked for."""
        try:
            self._build(state)
        except Exception as error:
            self._wanted = None
            self._reply(error=error)
            raise _Elsewhere from error
        self._guide = Guide(self._env, self._next_command, self._acted)
        self._guide.run()

    def _build(self, state: SimulatorState) -> None:
        self._env.close()
        self._set_stage(state.seed, state.scene_hash)
        self._env.reset(seed=state.seed, options={"observe": False})
        if self._env.control != state.control:
            fix = "give the world model the options of the live environment"
            raise UserError("control", got=self._env.control, wanted=f"the live episode's {state.control}", fix=fix)

    def _next_command(self, drifting: bool) -> NDArray[np.float64] | None:
        """For the guide: the episode's next command, once it is known; None in a copy, where the expert acts."""
        assert self.copy is None, "a copy acts and asks for nothing"
        while True:
            assert self._wanted is not None
            commands_TA = self._wanted.commands_TA
            if self._env.steps < len(commands_TA):
                return commands_TA[self._env.steps]
            _, operation, arguments = self._next_question()
            if operation == "meet" and not self._follows(arguments[0]):
                self._wanted = arguments[0]
                raise _Elsewhere
            if operation == "meet" and self._env.steps < len(arguments[0].commands_TA):
                self._wanted = arguments[0]
                continue
            if operation == "imagine" and drifting and arguments[0].actions_PA is None:
                raise Asked
            self._answer()
            if self._wanted is None:
                raise _Elsewhere
            if self.copy is not None:
                return None

    def _acted(self, action_A: NDArray[np.float32]) -> None:
        """For the guide: the expert has acted."""
        assert self.copy is not None and self._guide is not None
        self.copy.acted(action_A, self._guide.failure)

    def _set_stage(self, seed: int, scene_hash: str) -> None:
        """The stage shows the scene of ``seed``. ``UserError`` where that is another scene than ``scene_hash`` says."""
        if (self._stage.seed, self._stage.scene_hash) != (seed, scene_hash):
            live = self._env._task is not None
            release(self._env)
            try:
                self._stage.set_up(seed)
            finally:
                if live:
                    claim(self._env)
        if self._stage.scene_hash != scene_hash:
            fix = "use the task, assets and options that the episode was recorded with"
            raise UserError("scene_hash", got=self._stage.scene_hash, wanted=scene_hash, fix=fix)

    def _follows(self, state: SimulatorState) -> bool:
        """Whether a moment is this one or a later one of the same episode."""
        done, here = self._env._commands, self._wanted
        if here is None or (here.scene_hash, here.control) != (state.scene_hash, state.control):
            return False
        begin_TA = state.commands_TA[: len(done)]
        return len(done) == len(begin_TA) and bool(np.array_equal(np.reshape(done, begin_TA.shape), begin_TA))

    # ------------------------------------------------------------------ questions

    def _next_question(self) -> tuple[int, str, tuple[Any, ...]]:
        if self._question is None:
            self._question = self._pipe.recv()
        return self._question

    def _answer(self) -> None:
        """Answer the question at hand. In a copy, where nothing is answered, it is gone."""
        assert self._question is not None
        _, operation, arguments = self._question
        answers: dict[str, Callable[..., Any]] = {
            "spaces": self.spaces,
            "meet": self.meet,
            "imagine": self.imagine,
            "redraw": self.redraw,
        }
        try:
            value = answers[operation](*arguments)
        except Exception as error:
            self._reply(error=error)
        else:
            if self.copy is None:
                self._reply(value)

    def _reply(self, value: Any = None, error: Exception | None = None) -> None:
        assert self._question is not None
        number, self._question = self._question[0], None
        if error is None:
            reply = "done", value
        elif isinstance(error, (*PASSED_ON, StateDriftError)):
            reply = "refused", error
        else:
            reply = "raised", "".join(traceback.format_exception(error, limit=12))
        self._pipe.send((number, *reply))

    def spaces(self) -> ActionSpec:
        """Make the environments; what an action means."""
        self._env, stage = self._make()
        self._stage = Stage(stage)
        return self._env.action_spec

    def meet(self, state: SimulatorState) -> Met:
        """Be at this moment of a live episode.

        ``UserError`` for an episode of an environment with other options, ``StateDriftError`` where the repeated episode is not bit-equal.
        """
        if self._wanted is None:
            self._wanted = state
            raise _Elsewhere  # the question stays, and is answered when the moment has come
        self._env.clipped_steps = state.clipped_steps  # commands are kept as they were clipped
        if wrong := differences(capture(self._env), state):
            self._wanted = None
            raise StateDriftError(
                f"{state.task} seed {state.seed}: the twin differs from the live episode at step {state.steps} in {', '.join(wrong)}"
            )
        self._set_stage(state.seed, state.scene_hash)
        self._stage.arrange(self._env.body_poses()[1])
        seen = self._env.observe(pictures=False)
        return Met(pictures_VHWC=self._stage.pictures(), instruction=seen["instruction"], state_A=seen["state"])

    def imagine(self, order: Order) -> Try | None:
        """Try out what ``order`` says from the moment met last. None: this is the copy that does it."""
        if self._wanted is None:
            raise UserError("imagine", got="no moment", wanted="a moment of an episode", fix="meet one first")
        self._set_stage(self._wanted.seed, self._wanted.scene_hash)
        now, start = moment(self._env), self._env.steps
        self.copy, pipe, pid = fork_copy(self._env, order.steps, close=self._pipe.close)
        if self.copy is not None:
            if order.actions_PA is not None:
                self.copy.play(order.actions_PA)
            return None
        try:
            return Film(self._stage, order, now, start).watch(pipe)
        finally:
            pipe.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def redraw(
        self,
        seed: int,
        scene_hash: str,
        ids_K: NDArray[np.uint16],
        poses_TK7: NDArray[np.float32],
        hide_objects: bool,
        shrink: int,
    ) -> NDArray[np.uint8]:
        """Pictures [V,T,H,W,3] of the scene of ``seed`` with the bodies ``ids_K`` where they were at T moments."""
        self._set_stage(seed, scene_hash)
        if not np.array_equal(ids_K, self._stage.ids_K):
            got, fix = f"{len(ids_K)} bodies with other ids", "give the poses of an episode of this scene"
            raise UserError("ids_K", got=got, wanted=f"the {len(self._stage.ids_K)} bodies of this scene", fix=fix)
        return drawn(self._stage, poses_TK7, hide_objects=hide_objects, shrink=shrink)
