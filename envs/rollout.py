"""The closed loop: environment and policy meet through core's protocols only."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UnstableSceneError, UserError
from physisforcing.core.protocols import Policy
from physisforcing.core.types import Observation


class Recorder(Protocol):
    """Sees every control step of an episode, frame 0 first (see ``recording.EpisodeRecorder``).

    Where it also has ``needs_picture(step) -> bool``, only those moments are drawn for it, and the other observations have no pictures.
    """

    def frame(self, env: Any, observation: dict[str, Any]) -> None: ...


class Scene(Protocol):
    """What a frozen manifest says about a scene (see ``manifest.ManifestEntry``)."""

    def check(self, info: dict[str, Any], instruction: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class EpisodeResult:
    """One closed-loop episode.

    ``status``: ``success``, ``failure``, or ``error`` when policy, scene or simulator raised; then ``error`` holds the
    traceback. ``steps``: control steps executed. Times in seconds. ``frames``: head pictures uint8 [steps+1,240,320,3]
    when they were asked for, ``executed_PA``: the targets that were sent, [steps,14].
    """

    task: str
    seed: int
    status: str
    steps: int = 0
    instruction: str = ""
    scene_hash: str = ""
    fingerprint: str = ""
    error: str = ""
    reset_s: float = 0.0
    policy_s: float = 0.0
    simulator_s: float = 0.0
    telemetry: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    frames: NDArray[np.uint8] | None = None
    executed_PA: NDArray[np.float32] | None = None

    @property
    def success(self) -> bool:
        return self.status == "success"

    def row(self) -> dict[str, Any]:
        """The JSON fields of a results line (status apart)."""
        keep = ("task", "seed", "steps", "instruction", "scene_hash", "error", "reset_s", "policy_s", "simulator_s")
        row = {name: getattr(self, name) for name in keep} | {"telemetry": self.telemetry}
        names = ("control", "embodiment", "assets", "runtime", "renderer", "randomization", "scene_of")
        names += ("clipped_steps", "step_limit")
        return row | {name: self.info[name] for name in names if name in self.info}


def to_observation(raw: dict[str, Any], step: int) -> Observation:
    """The environment's observation dictionary as core's ``Observation``."""
    images = {name.removesuffix("_rgb"): picture for name, picture in raw.items() if name.endswith("_rgb")}
    return Observation(
        images=images,
        state_A=raw["state"],
        measured_A=raw["state_measured"],
        instruction=raw["instruction"],
        step=step,
    )


def run_episode(
    env: Any,
    policy: Policy,
    *,
    seed: int,
    max_steps: int | None = None,
    record: bool = False,
    recorder: Recorder | None = None,
    expect: Scene | None = None,
) -> EpisodeResult:
    """Reset ``env`` to ``seed`` and let ``policy`` act until success, the step limit or ``max_steps``.

    The rows of a chunk are executed one by one and the policy is asked again when they are used up. ``expect``: a manifest
    entry that the scene must match (its error is raised: a drifted scene makes the whole evaluation invalid). Whatever else
    goes wrong inside the episode becomes status ``error``.
    """
    result = EpisodeResult(task=env.unwrapped.task_name, seed=seed, status="error")
    began = time.perf_counter()
    try:
        raw, info = env.reset(seed=seed)
    except UnstableSceneError as error:
        result.error = f"UnstableSceneError: {error}"
        return result
    result.reset_s = time.perf_counter() - began
    result.instruction, result.scene_hash, result.info = raw["instruction"], info["scene_hash"], info
    if expect is not None:
        expect.check(info, raw["instruction"])
    loop = _Loop(env, policy, result, recorder, frames=[raw["head_rgb"]] if record else None)
    try:
        result.fingerprint = policy.fingerprint
        policy.reset(task=result.task, seed=seed, instruction=result.instruction)
        loop.run(raw, max_steps)
        result.status = "success" if result.info["is_success"] else "failure"
    except Exception:
        result.error = traceback.format_exc(limit=20)
    result.telemetry = _telemetry(policy, result)
    if loop.executed:
        result.executed_PA = np.stack(loop.executed)
    if loop.frames is not None:
        result.frames = np.stack(loop.frames)
    return result


class _Loop:
    def __init__(
        self,
        env: Any,
        policy: Policy,
        result: EpisodeResult,
        recorder: Recorder | None,
        frames: list[NDArray[np.uint8]] | None,
    ) -> None:
        self.env, self.policy, self.result, self.recorder, self.frames = env, policy, result, recorder, frames
        self.executed: list[NDArray[np.float32]] = []
        self._blind = getattr(env, "step_blind", None) or getattr(env.unwrapped, "step_blind", env.step)

    def run(self, raw: dict[str, Any], max_steps: int | None) -> None:
        result = self.result
        if self.recorder is not None:
            self.recorder.frame(self.env.unwrapped, raw)
        limit = max_steps if max_steps is not None else result.info["step_limit"]
        while result.steps < limit:
            began = time.perf_counter()
            chunk_PA = _checked(self.policy.act(to_observation(raw, result.steps)), self.env.action_space.shape[0])
            result.policy_s += time.perf_counter() - began
            rows_PA = chunk_PA[: limit - result.steps]
            for left, target_A in zip(reversed(range(len(rows_PA))), rows_PA, strict=True):
                raw, ended = self._step(target_A, looks=left == 0 and result.steps + 1 < limit)
                if ended:
                    return

    def _step(self, target_A: NDArray[np.float32], looks: bool) -> tuple[dict[str, Any], bool]:
        """``looks``: the policy sees what follows. Between its chunks nothing is drawn unless somebody records it."""
        began = time.perf_counter()
        step = self.env.step if looks or self.frames is not None or self._recorded() else self._blind
        raw, _, terminated, truncated, self.result.info = step(target_A)
        self.result.simulator_s += time.perf_counter() - began
        self.result.steps += 1
        self.executed.append(target_A)
        if self.frames is not None:
            self.frames.append(raw["head_rgb"])
        if self.recorder is not None:
            self.recorder.frame(self.env.unwrapped, raw)
        return raw, bool(terminated or truncated)

    def _recorded(self) -> bool:
        """Whether the recorder wants to see the moment after the next step."""
        if self.recorder is None:
            return False
        needs_picture = getattr(self.recorder, "needs_picture", None)
        return needs_picture is None or bool(needs_picture(self.result.steps + 1))


def _checked(chunk: Any, dim: int) -> NDArray[np.float32]:
    rows_PA = np.asarray(chunk, dtype=np.float32)
    if rows_PA.ndim != 2 or rows_PA.shape[0] < 1 or rows_PA.shape[1] != dim:
        raise UserError(
            "policy.act",
            got=f"shape {list(rows_PA.shape)}",
            wanted=f"[P,{dim}] with P >= 1",
            fix="see core.protocols.Policy",
        )
    if not np.isfinite(rows_PA).all():
        raise UserError(
            "policy.act", got="NaN or infinity", wanted="finite joint targets", fix="check the policy's weights"
        )
    return rows_PA


def _telemetry(policy: Policy, result: EpisodeResult) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in policy.telemetry().items()}
    except Exception:
        result.error += traceback.format_exc(limit=5)
        result.status = "error"
        return {}
