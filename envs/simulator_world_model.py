"""The perfect world model: exact dynamics, by a twin of the live episode (``twin.py``).

Under the same planner it shows what a learned model could at best reach, and what everything else costs: the decoder, the execute horizon,
the task itself. In text mode the task's expert acts from the state as it is (``robotwin/guide.py``), in action mode the drive targets of
the request. A picture alone does not say where everything is: the model knows the state from the live environment that it is bound to,
and refuses a request whose picture is not that state's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError, unknown_name
from physisforcing.core.pictures import shrink_area
from physisforcing.core.requests import check_request
from physisforcing.core.results import config_hash
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

from .machine import few_threads
from .processes import Died, EnvProcess
from .robotwin.fork import SimulatorState
from .robotwin.observation import HEIGHT, WIDTH
from .tries import Order, Try
from .twin import twin_process

MODES = ("text", "actions")
#: Raised when imagined futures change for the same state.
VERSION = 1


class TwinLostError(RuntimeError):
    """The twin's process died or hung. The next request starts another one."""


@dataclass(slots=True, kw_only=True)
class SimulatorConfig:
    """``mode``: whether the expert or the request's actions act. ``height`` x ``width``: 240x320 made smaller by area, a whole number of
    times. ``stride``: control steps from one frame to the next. ``hide_objects``: the task's objects are not drawn (they are there: the
    physics is the same). ``timeout_s``: how long an answer of the twin may take."""

    mode: str = "text"
    views: tuple[str, ...] = ("head",)
    height: int = 120
    width: int = 160
    stride: int = 2
    horizons: tuple[int, ...] = (17,)
    hide_objects: bool = False
    timeout_s: float = 600.0

    def check(self) -> int:
        """How many times smaller pictures are than drawn. ``UserError`` for what cannot be."""
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, MODES, see="SimulatorConfig")
        shrink = HEIGHT // self.height if self.height > 0 else 0
        if (shrink * self.height, shrink * self.width) != (HEIGHT, WIDTH):
            wanted = f"{HEIGHT}x{WIDTH}, or a whole number of times smaller"
            raise UserError("size", got=f"{self.height}x{self.width}", wanted=wanted, fix="height=120 width=160")
        if self.stride < 1 or not self.horizons or min(self.horizons) < 2:
            got, wanted = f"stride {self.stride}, horizons {self.horizons}", "stride >= 1, horizons >= 2"
            raise UserError("horizons", got=got, wanted=wanted, fix="stride=2 horizons=(17,)")
        return shrink


class SimulatorWorldModel:
    """A ``core.protocols.WorldModel``. ``bind`` it to the live environment first; ``close`` ends its process.

    The rollout depends on the state and, in action mode, on the actions alone: seeds change nothing, candidates of one context are one
    rollout in text mode. In text mode an instruction must be the episode's own (or empty): the expert can do nothing else.

    ``rollout`` says in ``cost``: ``seconds``; ``success``, the share of samples in which the task's check has succeeded by the end;
    ``expert_failed``, the share in which the expert found no way and holds still from there (``imagine`` says why).

    Raises ``UserError`` for a picture that is not the bound state's, ``TwinLostError`` when the process dies, ``StateDriftError`` when the
    twin is not bit-equal to the live episode (moved by hand, or by ``play_expert``).
    """

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        self.config = config or SimulatorConfig()
        self._shrink = self.config.check()
        self._about: tuple[str, dict[str, Any], ActionSpec] | None = None
        self._source: Callable[[], SimulatorState | Sequence[SimulatorState]] | None = None
        self._twin: EnvProcess | None = None

    # ------------------------------------------------------------------ binding

    def bind(self, env: Any) -> SimulatorWorldModel:
        """Answer for this live ``RoboTwinEnv`` (unwrapped) from now on; returns itself."""
        return self.bind_source(env.fork, task=env.task_name, options=env.options, action_spec=env.action_spec)

    def bind_source(
        self,
        source: Callable[[], SimulatorState | Sequence[SimulatorState]],
        *,
        task: str,
        options: dict[str, Any],
        action_spec: ActionSpec,
    ) -> SimulatorWorldModel:
        """Answer for states that come from elsewhere: ``source()`` gives the fork of the live episode now, or several forks among which
        the pictures of a request choose. ``options``: the live environment's (``RoboTwinEnv.options``)."""
        known = self._about
        if known is not None and known[:2] != (task, options):
            self.close()
        self._about, self._source = (task, dict(options), action_spec), source
        return self

    @property
    def spec(self) -> WorldModelSpec:
        task, options, action_spec = self._bound()
        config = self.config
        kept = {name: str(value) for name, value in options.items()}
        parts = {"version": VERSION, "task": task, "options": kept, "config": dataclasses.asdict(config)}
        return WorldModelSpec(
            name="simulator" if config.mode == "text" else "simulator-actions",
            views=ViewLayout(names=config.views, height=config.height, width=config.width),
            context_frames=1,
            horizons=tuple(config.horizons),
            frame_dt=config.stride * DT,
            conditions=frozenset({config.mode}),
            returns=frozenset({"frames"}),
            action_spec=action_spec,
            fingerprint=config_hash(parts),
        )

    def _bound(self) -> tuple[str, dict[str, Any], ActionSpec]:
        if self._about is None:
            raise UserError("env", got="none", wanted="the live environment", fix="call bind(env) first")
        return self._about

    # ------------------------------------------------------------------ imagining

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel`` and the class."""
        began = time.perf_counter()
        tries = self.imagine(request)
        frames = np.stack([np.stack([found.frames_VTHWC for found in row]) for row in tries])
        count = request.seeds_BS.size
        return Rollout(
            times_T=np.arange(request.horizon, dtype=np.float64) * (self.config.stride * DT),
            frames_BSVTHWC=frames,
            cost={
                "seconds": time.perf_counter() - began,
                "success": sum(found.success for row in tries for found in row) / count,
                "expert_failed": sum(bool(found.failure) for row in tries for found in row) / count,
            },
        )

    def imagine(self, request: RolloutRequest, *, truth: bool = False) -> list[list[Try]]:
        """What follows, ``[b][s]``: with the drive targets that were sent, and why the expert failed. ``truth``: with poses and contacts."""
        check_request(request, self.spec)
        assert self._source is not None
        given = self._source()
        states = [given] if isinstance(given, SimulatorState) else list(given)
        rows: list[list[Try] | None] = [None] * len(request.instructions)
        for state in states:
            pictures_VHWC, sentence = self._ask("meet", state)
            shown_VHWC = shrink_area(pictures_VHWC, self._shrink)
            here = [b for b, row in enumerate(rows) if row is None and _shows(request, b, shown_VHWC)]
            if here:
                self._check_instructions([request.instructions[b] for b in here], sentence)
                for b, row in zip(here, self._futures(request, here, truth), strict=True):
                    rows[b] = row
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            missing = ", ".join(str(b) for b, row in enumerate(rows) if row is None)
            got, wanted = f"other pictures in contexts {missing}", "the pictures of the live episode now"
            fix = "ask from inside the episode that the model is bound to, with its own observation"
            raise UserError("context_BVTHWC", got=got, wanted=wanted, fix=fix)
        return found

    def _futures(self, request: RolloutRequest, contexts: list[int], truth: bool) -> list[list[Try]]:
        """Of the moment met last, for these contexts."""
        samples, config = request.seeds_BS.shape[1], self.config
        order = Order(
            steps=(request.horizon - 1) * config.stride,
            stride=config.stride,
            shrink=self._shrink,
            hide_objects=config.hide_objects,
            truth=truth,
        )
        if request.actions_BSPA is None:
            return [[self._ask("imagine", order)] * samples] * len(contexts)
        actions = np.asarray(request.actions_BSPA, np.float32)
        return [
            [self._ask("imagine", dataclasses.replace(order, actions_PA=actions[b, s])) for s in range(samples)]
            for b in contexts
        ]

    def _check_instructions(self, given: list[str], sentence: str) -> None:
        if self.config.mode == "text" and (other := [text for text in given if text not in ("", sentence)]):
            wanted = f"{sentence!r}, what the expert of this scene does"
            fix = "ask with the episode's own instruction; a model that follows others must be a learned one"
            raise MissingCapabilityError("instructions", got=other[0], wanted=wanted, fix=fix)

    # ------------------------------------------------------------------ recorded scenes

    def redraw(self, seed: int, scene_hash: str, poses_TK7: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures [V,T,H,W,3] of the scene of ``seed`` with its bodies at these poses (order of ``RoboTwinEnv.body_poses``): what was
        recorded, drawn again. ``UserError`` where ``scene_hash`` is not that scene's, or the bodies are others."""
        return self._ask("redraw", seed, scene_hash, poses_TK7, self.config.hide_objects, self._shrink)

    # ------------------------------------------------------------------ the process

    def _ask(self, question: str, *arguments: Any) -> Any:
        try:
            if self._twin is None:
                task, options, _ = self._bound()
                with few_threads(1):
                    self._twin = twin_process(task, options, self.config.views)
                self._twin.answer(self.config.timeout_s)
            self._twin.ask(question, *arguments)
            return self._twin.answer(self.config.timeout_s)
        except Died as death:
            self.close()
            raise TwinLostError(f"the simulator's twin is lost: {death}") from death

    @property
    def pid(self) -> int | None:
        """The twin's process, where one runs."""
        return None if self._twin is None else self._twin.pid

    def close(self) -> None:
        """End the process. The model may be used again, with a new one."""
        twin, self._twin = self._twin, None
        if twin is not None:
            twin.end()


def _shows(request: RolloutRequest, context: int, shown_VHWC: NDArray[np.uint8]) -> bool:
    return bool(np.array_equal(request.context_BVTHWC[context, :, -1], shown_VHWC))
