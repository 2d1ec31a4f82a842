"""What follows from a moment, tried out in a copy of the process: the copy computes, the process it came from draws."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.pictures import shrink_area

from .executed import Moment, SceneBodies, View, executed_chunk, moment
from .robotwin.stage import Stage

#: Seconds that a copy may take for one control step.
STEP_S = 120.0


@dataclass(slots=True, kw_only=True, frozen=True)
class Order:
    """What to try out: ``steps`` control steps, by the expert or with ``actions_PA`` (drive targets), a picture every ``stride`` steps.

    ``shrink``: pictures are made so many times smaller. ``hide_objects``: the task's objects are not drawn. ``truth``: with poses,
    contacts, and the first picture's depth and body ids.
    """

    steps: int
    stride: int = 2
    shrink: int = 2
    actions_PA: NDArray[np.float32] | None = None
    hide_objects: bool = False
    truth: bool = False


@dataclass(slots=True, kw_only=True)
class Try:
    """What followed. ``frames_VTHWC``: uint8, frame 0 is the moment itself. ``actions_PA``: the drive targets that were sent, float32.
    ``success``: whether the task's check had succeeded by the end. ``failure``: why the expert stood still, or empty."""

    frames_VTHWC: NDArray[np.uint8]
    actions_PA: NDArray[np.float32]
    success: bool
    failure: str
    executed: ExecutedChunk | None


class Copy:
    """Inside a copy of the process: says each step through a pipe, and ends the copy."""

    def __init__(self, pipe: Any, env: Any, steps: int) -> None:
        self._pipe, self._env, self._left = pipe, env, steps

    def play(self, actions_PA: NDArray[np.float32]) -> NoReturn:
        """Execute these drive targets."""
        for action_A in actions_PA:
            self._env.step_blind(action_A)
            self.acted(action_A, "")
        self._leave(1)  # fewer actions than steps

    def acted(self, action_A: NDArray[np.float32], failure: str) -> None:
        """One more step was executed; after the last one this does not return. ``failure``: why the expert stands still."""
        self._pipe.send((action_A, moment(self._env)))
        self._left -= 1
        if self._left == 0:
            self._pipe.send(failure)
            self._leave(0)

    def fail(self, text: str) -> NoReturn:
        """Something is broken; ``text`` says what."""
        self._pipe.send(RuntimeError(text))
        self._leave(1)

    @staticmethod
    def _leave(code: int) -> NoReturn:
        os._exit(code)  # nothing of the process may be torn down: its renderer lives on in the original


def fork_copy(env: Any, steps: int, *, close: Callable[[], None]) -> tuple[Copy | None, Any, int]:
    """Copy this process. In the copy: (``Copy``, None, 0) after ``close()``; here: (None, the pipe to read from, the copy's pid)."""
    reads, writes = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        gc.disable()  # what is freed in here could reach the renderer, whose threads this copy does not have
        reads.close()
        close()
        return Copy(writes, env, steps), None, 0
    writes.close()
    return None, reads, pid


def drawn(stage: Stage, poses_TK7: NDArray[np.float32], *, hide_objects: bool, shrink: int) -> NDArray[np.uint8]:
    """Pictures uint8 [V,T,H,W,3] of these moments of the scene that stands on the stage."""
    hidden = stage.objects() if hide_objects else frozenset()
    frames = []
    for poses_K7 in poses_TK7:
        stage.arrange(poses_K7, hidden)
        frames.append(shrink_area(stage.pictures(), shrink))
    return np.stack(frames, axis=1)


class Film:
    """Draws what a copy says, as it comes."""

    def __init__(self, stage: Stage, order: Order, now: Moment, start_step: int) -> None:
        self._stage, self._order, self._start = stage, order, start_step
        self._moments = [now]
        self._actions: list[NDArray[np.float32]] = []
        self._view: View | None = None
        if order.truth:
            stage.arrange(now.poses_K7)
            depth_HW, body_HW = stage.maps()
            self._view = View(camera=stage.camera(), depth_HW=depth_HW, body_HW=body_HW)
        self._frames = [self._draw(now)]

    def _draw(self, now: Moment) -> NDArray[np.uint8]:
        order = self._order
        return drawn(self._stage, now.poses_K7[None], hide_objects=order.hide_objects, shrink=order.shrink)

    def watch(self, pipe: Any) -> Try:
        """Until the copy has ended. ``RuntimeError`` where it failed or hangs."""
        order, failure = self._order, ""
        while len(self._moments) <= order.steps:
            action_A, now = self._receive(pipe)
            if not np.isfinite(now.poses_K7).all():
                now.poses_K7, failure = self._moments[-1].poses_K7, "the physics diverged"
            self._moments.append(now)
            self._actions.append(action_A)
            if (len(self._moments) - 1) % order.stride == 0:
                self._frames.append(self._draw(now))
        said = self._receive(pipe)
        return Try(
            frames_VTHWC=np.concatenate(self._frames, axis=1),
            actions_PA=np.stack(self._actions),
            success=self._moments[-1].success,
            failure=failure or said,
            executed=self._executed(),
        )

    def _receive(self, pipe: Any) -> Any:
        if not pipe.poll(STEP_S):
            raise RuntimeError(f"the copy of the twin said nothing for {STEP_S:g} s")
        said = pipe.recv()
        if isinstance(said, Exception):
            raise said
        return said

    def _executed(self) -> ExecutedChunk | None:
        if self._view is None:
            return None
        return executed_chunk(SceneBodies.of(self._stage.env), self._view, self._moments, self._start)
