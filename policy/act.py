"""The policy in a closed loop: looks, plans a chunk, executes the beginning of it, looks again, or plans while it executes.

``receding``: the first ``execute`` rows of each plan are executed, and the plan takes no time of the episode. ``async``: a plan is begun while
rows of the one before are still executed, and its rows for the moments that pass meanwhile are dropped (the reference's section 7, point 11).
"""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.history import StateHistory
from physisforcing.core.results import config_hash
from physisforcing.core.types import RATE_TOLERANCE, ActionSpec, Observation
from physisforcing.worldmodel.data.canvas import compose

from .requests import CanvasSource, ChunkSource, PlanAnswer, PlanRequest, PolicySpec
from .sampling import plan_seed

EXECUTIONS = ("receding", "async")
#: Seconds that are counted, by stage.
STAGES = ("canvas", "encode", "prefill", "steps")


@dataclass(slots=True, kw_only=True)
class ExecutionConfig:
    """``execute``: rows between two looks that begin a plan. ``execution``: one of ``EXECUTIONS``. ``delay``: control steps that an asynchronous
    plan takes: its first ``delay`` rows are dropped, and a plan that is not there in time is waited for, so that an episode is repeatable;
    0: as long as it takes by the clock, row by row, with whatever is left of the plan before. ``seed``: of the noise, beside the episode's."""

    execute: int = 12
    execution: str = "receding"
    delay: int = 4
    seed: int = 0

    def check(self, chunk: int) -> None:
        """``UserError`` for settings that a chunk of so many rows cannot serve."""
        if self.execution not in EXECUTIONS:
            raise unknown_name("policy.execution", self.execution, EXECUTIONS, see="docs/bring_your_policy.md")
        if not 1 <= self.execute <= chunk:
            raise UserError("policy.execute", got=self.execute, wanted=f"1 to {chunk}", fix="policy.execute=12")
        most = min(self.execute, chunk - self.execute)
        if self.execution == "async" and not (0 <= self.delay <= most and most):
            fix = "a smaller policy.delay, or another policy.execute"
            wanted = f"0 to {most}, at most execute={self.execute} and both within a chunk of {chunk}"
            raise UserError("policy.delay", got=self.delay, wanted=wanted, fix=fix)


def check_rate(spec: PolicySpec, dt: float, fix: str = "") -> None:
    """``UserError`` unless the rows of a chunk are as far apart as the rows that an environment takes, ``dt`` seconds. ``fix``: where it is another
    one than in our own evaluation."""
    if abs(spec.control_hz * dt - 1.0) > RATE_TOLERANCE:
        got, wanted = f"{spec.control_hz:.4g} actions a second", f"{1.0 / dt:.4g}, at which the environment takes them"
        usual = (
            "control=topp, which drives to each target in its own time, or a policy trained on recordings of that rate"
        )
        raise UserError(f"policy {spec.name}", got=got, wanted=wanted, fix=fix or usual)


class WorldActionPolicy:
    """``core.protocols.Policy`` over whatever plans chunks (``planning.ChunkModel``, or a client of one).

    Noise depends on (``config.seed``, episode seed, number of the plan). ``action_spec``: limits that rows are clipped to, as the environment would do, so that
    the history holds what is executed; clipped rows are counted.
    """

    def __init__(
        self, source: ChunkSource, config: ExecutionConfig | None = None, *, action_spec: ActionSpec | None = None
    ) -> None:
        self.source, self.config = source, config or ExecutionConfig()
        self.spec: PolicySpec = source.spec
        self.config.check(self.spec.chunk)
        plain = functools.partial(compose, self.spec.canvas)
        self._compose = source.compose if isinstance(source, CanvasSource) else plain
        self._limits_2A = None if action_spec is None else np.array([action_spec.low, action_spec.high], np.float32)
        self._coming: _Coming | None = None
        self.reset(task="", seed=0, instruction="")

    @property
    def fingerprint(self) -> str:
        """Weights and settings; what does not change the result is left out."""
        parts: dict[str, Any] = {"policy": self.spec.fingerprint, "execute": self.config.execute}
        if self.config.execution == "async":
            parts["delay"] = self.config.delay
        if self.config.seed:
            parts["seed"] = self.config.seed
        return f"{self.spec.name}-{config_hash(parts)}"

    def reset(self, *, task: str, seed: int, instruction: str) -> None:
        self.close()
        self._seed, self._instruction = seed, instruction
        self._history = StateHistory()
        self._executed: NDArray[np.float32] | None = None
        self._chunk: _Chunk | None = None
        names = ("plans", "clipped", "dropped", "waited_s", "late", *(f"{stage}_s" for stage in STAGES))
        self._counts = dict.fromkeys(names, 0.0)

    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Joint targets [n,A] from now: the next ``execute`` rows, or in ``async`` as many as are executed before it wants to look."""
        self._history.observe(observation.step, observation.state_A, self._executed)
        rows = self._receding(observation) if self.config.execution == "receding" else self._async(observation)
        self._executed = self._clipped(rows)
        return self._executed

    def telemetry(self) -> dict[str, float]:
        """Plans, rows clipped to the joint limits, rows of plans dropped because their moments were past, asynchronous plans that were waited for
        (``late``) and the seconds of it, and seconds by stage: canvas, encode, prefill, steps."""
        return dict(self._counts)

    def close(self) -> None:
        """Wait for a plan that is under way and forget it."""
        coming, self._coming = self._coming, None
        if coming is not None:
            coming.thread.join()

    def _receding(self, observation: Observation) -> NDArray[np.float32]:
        return self._planned(self._request(observation)).actions_BPA[0, : self.config.execute]

    def _async(self, observation: Observation) -> NDArray[np.float32]:
        step = observation.step
        if self._chunk is None:
            self._chunk = _Chunk(step, self._planned(self._request(observation)).actions_BPA[0])
        if self._coming is not None and self._arrived(step):
            self._chunk = self._adopt(step)
        begins = self._chunk.begun + self.config.execute
        if self._coming is None and step >= begins:
            self._coming = _Coming(self, self._request(observation), step)
        if self._coming is None:
            return self._chunk.rows(step, begins)
        if self.config.delay:
            return self._chunk.rows(step, self._coming.step + self.config.delay)
        return self._chunk.rows(step, step + 1)

    def _arrived(self, step: int) -> bool:
        """Whether the plan that is coming is to be used now; waits for it where it must be there."""
        coming, chunk, delay = self._coming, self._chunk, self.config.delay
        assert coming is not None and chunk is not None
        due = step >= (coming.step + delay if delay else chunk.ends)
        # one that is there before its delay has to wait: on a slower machine the episode would be another
        if not due and (delay or coming.thread.is_alive()):
            return False
        if coming.thread.is_alive():
            begun = time.perf_counter()
            coming.thread.join()
            self._counts["waited_s"] += time.perf_counter() - begun
            self._counts["late"] += 1
        return True

    def _adopt(self, step: int) -> _Chunk:
        coming, self._coming = self._coming, None
        assert coming is not None
        chunk = _Chunk(coming.step, self._counted(coming.result()).actions_BPA[0])
        self._counts["dropped"] += step - coming.step
        return chunk

    def _request(self, observation: Observation) -> PlanRequest:
        begun = time.perf_counter()
        canvas = self._compose(observation.images)
        self._counts["canvas_s"] += time.perf_counter() - begun
        seed = plan_seed(self._seed, int(self._counts["plans"]), self.config.seed)
        self._counts["plans"] += 1
        return PlanRequest(
            canvas_BHWC=canvas[None],
            instructions=[self._instruction or observation.instruction],
            state_BKA=self._history.lagged(self.spec.lags)[None],
            seeds_B=np.array([seed], np.int64),
        )

    def _planned(self, request: PlanRequest) -> PlanAnswer:
        return self._counted(self.source.plan(request))

    def _counted(self, answer: PlanAnswer) -> PlanAnswer:
        for name, value in answer.seconds.items():
            self._counts[f"{name}_s"] = self._counts.get(f"{name}_s", 0.0) + value
        return answer

    def _clipped(self, rows_PA: NDArray[np.float32]) -> NDArray[np.float32]:
        rows_PA = np.ascontiguousarray(rows_PA, np.float32)
        if self._limits_2A is None:
            return rows_PA
        clipped = np.clip(rows_PA, *self._limits_2A)
        self._counts["clipped"] += float((clipped != rows_PA).any(axis=1).sum())
        return clipped


@dataclass(slots=True)
class _Chunk:
    """A plan by the clock of the episode: row i is approached during control step ``begun + i``."""

    begun: int
    rows_PA: NDArray[np.float32]

    @property
    def ends(self) -> int:
        return self.begun + len(self.rows_PA)

    def rows(self, step: int, until: int) -> NDArray[np.float32]:
        """Those of the control steps from ``step`` to before ``until``."""
        found = self.rows_PA[step - self.begun : until - self.begun]
        assert len(found), f"no rows from step {step} to {until} in a plan of steps {self.begun} to {self.ends}"
        return found


class _Coming:
    """A plan that is computed in a thread of its own. ``step``: when its picture was taken."""

    def __init__(self, policy: WorldActionPolicy, request: PlanRequest, step: int) -> None:
        self.step = step
        self._answer: PlanAnswer | None = None
        self._error: BaseException | None = None

        def compute() -> None:
            try:
                self._answer = policy.source.plan(request)
            except BaseException as error:  # raised where the plan is used
                self._error = error

        self.thread = threading.Thread(target=compute, daemon=True, name="policy plan")
        self.thread.start()

    def result(self) -> PlanAnswer:
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer
