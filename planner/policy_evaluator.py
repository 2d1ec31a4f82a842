"""A policy acting inside a world model: it sees imagined pictures, and what it commands is imagined next.

As in WorldArena: the policy's actions stand in a queue, the world model takes a chunk at a time, what is left is dropped when it is too
short for a chunk and the policy looks again; the video is ``length_scale`` times as long as the demonstration's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.history import lagged
from physisforcing.core.protocols import Policy, WorldModel
from physisforcing.core.types import DT, Observation, Rollout, RolloutRequest, WorldModelSpec

from .action_planner import noise_seed
from .evaluator_config import PolicyInModelConfig
from .imagined import frame_steps, head_context

#: Times closer than this, in seconds, are the same.
SAME_TIME = 1e-6


@dataclass(slots=True, kw_only=True)
class Start:
    """Where an episode begins: the first moment of a demonstration of ``steps`` control steps. ``picture_HW3``: head camera, uint8."""

    task: str
    seed: int
    instruction: str
    picture_HW3: NDArray[np.uint8]
    state_A: NDArray[np.float32]
    steps: int


@dataclass(slots=True, kw_only=True)
class ModelEpisode:
    """``frames_THWC``: the imagined video, at the model's rate. ``commands_PA``: what reached the model, one row a control step.

    ``truth``: ``success`` by the end of ``frames_THWC``, where the model knows it (a simulator's rollouts say in ``cost`` whether the task
    was done by their end, ``success``, and how many seconds after their start, ``success_s``); else empty.
    ``telemetry``: ``policy_calls``, ``stale_calls`` (the policy's chunk was too short for the model, and it was asked again before a new
    picture was there), ``dropped_rows``, ``rollouts``, ``imagination_s``.
    """

    frames_THWC: NDArray[np.uint8]
    commands_PA: NDArray[np.float32]
    truth: dict[str, bool] = field(default_factory=dict)
    telemetry: dict[str, float] = field(default_factory=dict)


def target_frames(steps: int, frame_dt: float, scale: float) -> int:
    """Pictures of the video: ceil(scale * steps / control steps a picture), and no fewer than two."""
    return max(2, math.ceil(round(scale * steps * DT / frame_dt, 6)))


class PolicyInModel:
    """Runs policies in one world model. ``MissingCapabilityError`` for a model that cannot be driven as the settings say."""

    def __init__(self, world_model: WorldModel, config: PolicyInModelConfig | None = None) -> None:
        self.world_model, self.config = world_model, config or PolicyInModelConfig()
        self.config.check()
        self.spec = world_model.spec
        self.horizon = max(self.spec.horizons)
        #: Control steps of a rollout, and between two rows that the model takes.
        self.rows = int(frame_steps(self.spec, self.horizon)[-1])
        self.stride = self._check(self.spec)

    def _check(self, spec: WorldModelSpec) -> int:
        if self.config.conditioning == "actions":
            if "actions" not in spec.conditions or spec.action_spec is None:
                got, fix = f"{spec.name}: {sorted(spec.conditions)}", "use an action model, or conditioning=text"
                raise MissingCapabilityError("world_model", got=got, wanted="the condition actions", fix=fix)
            stride = round(spec.action_spec.dt / DT)
            if stride < 1 or not math.isclose(stride * DT, spec.action_spec.dt, rel_tol=1e-3) or self.rows % stride:
                got, wanted = f"{spec.action_spec.dt} s", f"a multiple of {DT} s that divides a rollout"
                raise MissingCapabilityError(
                    "action_spec.dt", got=got, wanted=wanted, fix="use a model of another rate"
                )
            return stride
        if not spec.proprioception_lags:
            got = f"{spec.name} takes no joint targets"
            wanted = "a model on which the policy has any influence"
            raise MissingCapabilityError("world_model", got=got, wanted=wanted, fix="use an action model")
        return 1

    def run(self, policy: Policy, start: Start) -> ModelEpisode:
        """One episode. The first picture of the video is the model's own rendering of the demonstration's first one."""
        policy.reset(task=start.task, seed=start.seed, instruction=start.instruction)
        wanted = target_frames(start.steps, self.spec.frame_dt, self.config.length_scale)
        loop = _Loop(self, policy, start)
        while loop.frame_count < wanted:
            loop.imagine(loop.next_rows(), wanted - loop.frame_count)
        return ModelEpisode(
            frames_THWC=np.concatenate(loop.frames),
            commands_PA=np.stack(loop.past[1:]),
            truth=loop.truth,
            telemetry=loop.counts,
        )


class _Loop:
    """An episode as it goes on."""

    def __init__(self, setting: PolicyInModel, policy: Policy, start: Start) -> None:
        self.setting, self.policy, self.start = setting, policy, start
        self.context = head_context(start.picture_HW3, setting.spec)[None]
        self.picture, self.frame_count = start.picture_HW3, 0
        self.frames: list[NDArray[np.uint8]] = []
        self.past = [np.asarray(start.state_A, np.float32)]
        self.queue: list[NDArray[np.float32]] = []
        self.truth: dict[str, bool] = {}
        names = ("policy_calls", "stale_calls", "dropped_rows", "rollouts", "imagination_s")
        self.counts: dict[str, float] = dict.fromkeys(names, 0.0)

    def next_rows(self) -> NDArray[np.float32]:
        """Commands of the next rollout [rows,A]."""
        rows = self.setting.rows
        if len(self.queue) < rows and self.setting.config.remainder == "drop":
            self.counts["dropped_rows"] += len(self.queue)
            self.queue.clear()
        fresh = True
        while len(self.queue) < rows:
            self.queue += list(self._act())
            self.counts["policy_calls"] += 1
            self.counts["stale_calls"] += not fresh
            fresh = False
        taken, self.queue = self.queue[:rows], self.queue[rows:]
        return np.stack(taken)

    def _act(self) -> NDArray[np.float32]:
        """The policy's next rows. It is told the last picture there is, and the joints that its queued rows will have led to: measured
        joints are not known in a world model, and are taken to be the targets."""
        state = self.queue[-1] if self.queue else self.past[-1]
        step = len(self.past) - 1 + len(self.queue)
        seen = Observation(
            images={"head": self.picture},
            state_A=state,
            measured_A=state,
            instruction=self.start.instruction,
            step=step,
        )
        rows = np.asarray(self.policy.act(seen), np.float32)
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != len(state) or not np.isfinite(rows).all():
            got, wanted = f"shape {list(rows.shape)}", f"finite [P,{len(state)}] with P >= 1"
            raise UserError("policy.act", got=got, wanted=wanted, fix="see core.protocols.Policy")
        return rows

    def imagine(self, rows_PA: NDArray[np.float32], room: int) -> None:
        """One rollout: its pictures, the last of which the policy sees next. The video has room for so many of them."""
        setting, spec, start = self.setting, self.setting.spec, self.start
        number = int(self.counts["rollouts"])
        lags, by_actions = spec.proprioception_lags, setting.config.conditioning == "actions"
        seed = noise_seed(noise_seed(setting.config.seed, start.seed, 0), number, 0)
        request = RolloutRequest(
            context_BVTHWC=self.context,
            instructions=[start.instruction],
            seeds_BS=np.array([[seed]], np.int64),
            horizon=setting.horizon,
            proprioception_BKA=lagged(np.stack(self.past[-1 - max(lags) :]), lags)[None] if lags else None,
            # A coarser row is the target at the end of its time.
            actions_BSPA=rows_PA[setting.stride - 1 :: setting.stride][None, None] if by_actions else None,
            ids=[(start.task, start.seed, number)],
        )
        rollout = setting.world_model.rollout(request)
        assert rollout.frames_BSVTHWC is not None, "the contract: frames are what is returned by default"
        frames = rollout.frames_BSVTHWC[0, 0, 0]
        kept = frames[0 if number == 0 else 1 :][:room]
        self.frames.append(kept)
        self.frame_count += len(kept)
        self.past += list(rows_PA)
        self.context = frames[-1:][None, None]
        self.picture = _as_large_as(frames[-1], start.picture_HW3)
        self.counts["rollouts"] += 1
        self.counts["imagination_s"] += rollout.cost.get("seconds", 0.0)
        last = len(kept) - 1 if number == 0 else len(kept)
        self._learn(rollout, float(rollout.times_T[last]), cut=last + 1 < len(frames))

    def _learn(self, rollout: Rollout, until: float, *, cut: bool) -> None:
        """What the model knows of success by ``until`` seconds into a rollout, the last moment that the video shows."""
        if "success" not in rollout.cost or self.truth.get("success"):
            return
        done, when = rollout.cost["success"] > 0.5, rollout.cost.get("success_s")
        if done and cut and when is None:
            self.truth.clear()  # it may have come after the last picture
            return
        self.truth["success"] = done and (when is None or when <= until + SAME_TIME)


def _as_large_as(picture_HW3: NDArray[np.uint8], like_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The policy sees pictures of one size: imagined ones are enlarged by repeating pixels."""
    scale = like_HW3.shape[0] // picture_HW3.shape[0]
    return picture_HW3.repeat(scale, axis=0).repeat(scale, axis=1) if scale > 1 else picture_HW3
