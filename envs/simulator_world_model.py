"""The perfect world model: exact dynamics, by a twin of the live episode (``twin.py``).

Under the same planner it shows what a learned model could at best reach, and what everything else costs: the decoder, the execute horizon,
the task itself. In text mode the task's expert acts from the state as it is (``robotwin/guide.py``), in action mode the drive targets of
the request. A picture alone does not say where everything is: the model knows the state from the live environment that it is bound to,
and refuses a request whose picture is not that state's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError, unknown_name
from physisforcing.core.pictures import shrink_area
from physisforcing.core.requests import check_request, plan_steps
from physisforcing.core.types import DT, ActionSpec, Rollout, RolloutRequest, WorldModelSpec

from .geometry import Geometry
from .robotwin.fork import SimulatorState
from .tries import Order, Try
from .twin_client import TwinClient

MODES = ("text", "actions")
#: Raised when imagined futures change for the same state.
VERSION = 1


@dataclass(slots=True, kw_only=True)
class SimulatorConfig(Geometry):
    """``mode``: whether the expert or the request's actions act. ``hide_objects``: the task's objects are not drawn (they are there for the
    physics). ``timeout_s``: how long an answer of the twin may take."""

    mode: str = "text"
    hide_objects: bool = False
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        Geometry.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.mode not in MODES:
            raise unknown_name("mode", self.mode, MODES, see="SimulatorConfig")


class SimulatorWorldModel:
    """A ``core.protocols.WorldModel``. ``bind`` it to the live environment first; ``close`` ends its process. ``twin``: one that others use
    as well, for environments of its task and options.

    The rollout depends on the state and, in action mode, on the actions alone: seeds change nothing, candidates of one context are one
    rollout in text mode. In text mode an instruction must be the episode's own (or empty): the expert can do nothing else.

    A plan of several rollouts (``plan_steps``) is imagined in one go in text mode: a later one is answered from the moment at which the
    plan of its ``ids`` began, whatever its picture, with what follows so many control steps later. The expert does not plan anew there.

    ``rollout`` says in ``cost``: ``seconds``; ``success``, the share of samples in which the task's check has succeeded by the end;
    ``expert_failed``, the share in which the expert found no way and holds still from there (``imagine`` says why).

    Raises ``UserError`` for a picture that is not the bound state's, ``TwinLostError`` when the process dies, ``StateDriftError`` when the
    twin is not bit-equal to the live episode (moved by hand, or by ``play_expert``).
    """

    def __init__(self, config: SimulatorConfig | None = None, *, twin: TwinClient | None = None) -> None:
        self.config, self._twin = config or SimulatorConfig(), twin
        self._action_spec: ActionSpec | None = None
        self._source: Callable[[], SimulatorState | Sequence[SimulatorState]] | None = None
        #: Plans (``RolloutRequest.ids``) and the moments at which they began.
        self._begun: dict[tuple[str, int, int], tuple[str, bytes]] = {}

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
        twin, config = self._twin, self.config
        if twin is None or (twin.task, twin.options, twin.views) != (task, options, tuple(config.views)):
            self.close()
            self._twin = TwinClient(task, options, views=config.views, timeout_s=config.timeout_s)
        self._action_spec, self._source = action_spec, source
        return self

    @property
    def spec(self) -> WorldModelSpec:
        twin, config = self.twin, self.config
        name = "simulator" if config.mode == "text" else "simulator-actions"
        # the scene says which assets; their folder is this machine's
        options = {key: str(value) for key, value in twin.options.items() if key != "assets"}
        shown = {"mode": config.mode, "hide_objects": config.hide_objects, "version": VERSION}
        fingerprint = Geometry.fingerprint(config, name, task=twin.task, options=options, **shown)
        return config.spec(name, fingerprint, conditions=frozenset({config.mode}), action_spec=self._action_spec)

    @property
    def twin(self) -> TwinClient:
        """The twin of the environment that the model is bound to. ``UserError`` before ``bind``."""
        if self._twin is None:
            raise UserError("env", got="none", wanted="the live environment", fix="call bind(env) first")
        return self._twin

    def close(self) -> None:
        """End the twin's process. Bound to an environment again, the model may be used again."""
        twin, self._twin = self._twin, None
        if twin is not None:
            twin.close()

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
        """What follows, ``[b][s]``: with the drive targets that were sent, and why the expert failed. ``truth``: with poses and contacts
        (where the context is the start of its plan)."""
        check_request(request, self.spec)
        rows: list[list[Try] | None] = [None] * len(request.instructions)
        later, states = self._later(request), self._states()
        self._begun = {plan: at for plan, at in self._begun.items() if at in [_moment(state) for state in states]}
        for state in states:
            met = self.twin.meet(state)
            shown_VHWC = shrink_area(met.pictures_VHWC, self.config.shrink)
            here = [b for b, row in enumerate(rows) if row is None and self._meant(request, b, state, shown_VHWC)]
            if here:
                self._check_instructions([request.instructions[b] for b in here], met.instruction)
            for step in sorted({later[b] for b in here}):
                mine = [b for b in here if later[b] == step]
                for b, row in zip(mine, self._futures(request, mine, truth, step), strict=True):
                    rows[b] = row
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            missing = ", ".join(str(b) for b, row in enumerate(rows) if row is None)
            got = f"other pictures, or a plan that did not begin now, in contexts {missing}"
            wanted = "the pictures of the live episode now, or a plan that began with them"
            fix = "ask from inside the episode that the model is bound to, with its own observation"
            raise UserError("context_BVTHWC", got=got, wanted=wanted, fix=fix)
        return found

    def examples(self) -> list[RolloutRequest]:
        """A request for each state that the source gives now, for the contract suite; in action mode the robot holds still."""
        steps, found = (min(self.config.horizons) - 1) * self.config.stride, []
        for state in self._states():
            met = self.twin.meet(state)
            hold_PA = np.repeat(met.state_A[None], steps, axis=0)
            request = RolloutRequest(
                context_BVTHWC=shrink_area(met.pictures_VHWC, self.config.shrink)[None, :, None],
                instructions=[met.instruction],
                seeds_BS=np.zeros((1, 1), np.int64),
                horizon=min(self.config.horizons),
                actions_BSPA=hold_PA[None, None] if self.config.mode == "actions" else None,
            )
            found.append(request)
        return found

    def _states(self) -> list[SimulatorState]:
        source = self._source
        assert source is not None, "bound, or the spec would have refused"
        given = source()
        return [given] if isinstance(given, SimulatorState) else list(given)

    def _later(self, request: RolloutRequest) -> list[int]:
        """Control steps from the start of its plan to each context. ``MissingCapabilityError`` for actions that begin later: those before
        them are not known."""
        later = plan_steps(request)
        if any(later) and request.actions_BSPA is not None:
            fix = "give the whole plan's actions in one request"
            raise MissingCapabilityError("plan_steps", got=max(later), wanted="0 with actions", fix=fix)
        return later

    def _meant(
        self, request: RolloutRequest, context: int, state: SimulatorState, shown_VHWC: NDArray[np.uint8]
    ) -> bool:
        """Whether a context is this moment, or goes on from a plan that began at it."""
        plan = None if request.ids is None else request.ids[context]
        if plan_steps(request)[context]:
            return plan is not None and self._begun.get(plan) == _moment(state)
        shows = bool(np.array_equal(request.context_BVTHWC[context, :, -1], shown_VHWC))
        if shows and plan is not None:
            self._begun[plan] = _moment(state)
        return shows

    def _futures(self, request: RolloutRequest, contexts: list[int], truth: bool, begin: int) -> list[list[Try]]:
        """Of the moment met last, for these contexts, ``begin`` control steps later."""
        samples, config = request.seeds_BS.shape[1], self.config
        order = Order(
            steps=begin + (request.horizon - 1) * config.stride,
            stride=math.gcd(begin, config.stride),
            shrink=config.shrink,
            hide_objects=config.hide_objects,
            truth=truth and not begin,
        )
        if request.actions_BSPA is None:
            whole, every = self.twin.imagine(order), config.stride // order.stride
            frames = whole.frames_VTHWC[:, begin // order.stride :: every]
            part = dataclasses.replace(whole, frames_VTHWC=frames, actions_PA=whole.actions_PA[begin:])
            return [[part] * samples] * len(contexts)
        actions = np.asarray(request.actions_BSPA, np.float32)
        return [
            [self.twin.imagine(dataclasses.replace(order, actions_PA=actions[b, s])) for s in range(samples)]
            for b in contexts
        ]

    def _check_instructions(self, given: list[str], sentence: str) -> None:
        if self.config.mode == "text" and (other := [text for text in given if text not in ("", sentence)]):
            wanted = f"{sentence!r}, what the expert of this scene does"
            fix = "ask with the episode's own instruction; a model that follows others must be a learned one"
            raise MissingCapabilityError("instructions", got=other[0], wanted=wanted, fix=fix)


def _moment(state: SimulatorState) -> tuple[str, bytes]:
    """What tells the moments of episodes apart."""
    return state.scene_hash, state.commands_TA.tobytes()
