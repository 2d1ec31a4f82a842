"""Short demonstrations to export in WorldArena's layouts, and a world model and a decoder whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from physisforcing.core.ground_truth import GroundTruth, save
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, HEAD, LeRobotWriter, robot_features
from physisforcing.core.types import DT, ActionChunk, DecoderNeeds, Rollout, RolloutRequest, ViewLayout, WorldModelSpec

JOINTS = [f"joint{k}" for k in range(14)]


def joints_of(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(length, 14)).astype(np.float32)


def poses_of_links(seed: int, length: int) -> np.ndarray:
    poses = np.random.default_rng(seed).normal(size=(length, 2, 7))
    poses[..., 3:] /= np.linalg.norm(poses[..., 3:], axis=-1, keepdims=True)
    return poses.astype(np.float32)


def truth(seed: int, length: int) -> GroundTruth:
    nothing = np.zeros(0, np.uint8)
    return GroundTruth(
        body_ids_K=np.array([3, 5], np.uint16),
        body_poses_TK7=poses_of_links(seed, length),
        body_names={3: "fr_link6", 5: "fl_link6"},
        view_names=("head",),
        size=(120, 160),
        intrinsics_V33=np.eye(3)[None],
        world_to_camera_TV44=np.tile(np.eye(4), (length, 1, 1, 1)),
        contact_frame_M=np.zeros(0, np.int32),
        contact_pair_M2=np.zeros((0, 2), np.uint16),
        contact_impulse_M=np.zeros(0, np.float32),
        stored_frames_D=np.zeros(0, np.int32),
        depth_png=nothing,
        depth_offsets=np.zeros(1, np.int64),
        ids_png=nothing,
        ids_offsets=np.zeros(1, np.int64),
    )


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Smooth, so that a video keeps it."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    return (np.stack([x, y, 0.5 + 0.3 * np.sin(seed + 3 * x)], axis=-1) * 200).astype(np.uint8)


def write_demonstrations(root: Path) -> Path:
    """Twelve short episodes of two tasks with the poses of both last links."""
    writer = LeRobotWriter(root, robot_features(JOINTS, height=120, width=160))
    for task, count in (("adjust_bottle", 11), ("click_bell", 1)):
        for seed in range(count):
            length = 6 + seed % 3
            joints = joints_of(seed, length)
            writer.add_episode(
                columns={
                    "observation.state": joints,
                    "observation.state_measured": joints,
                    "action": np.concatenate([joints[1:], joints[-1:]]),
                    "next.success": np.arange(length) == length - 1,
                },
                frames={HEAD: np.stack([picture(seed + t) for t in range(length)])},
                instruction=f"do {task} {seed}",
                task_name=task,
                seed=seed,
                success=True,
                scene_hash=f"hash{seed}",
                policy="expert",
                attachments={GROUND_TRUTH_PATH: lambda path, s=seed, n=length: save(path, truth(s, n))},
            )
    return writer.finalize()


class Drift:
    """A world model whose pictures get brighter by the frame, from the seed and the joints at its lags."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.spec = WorldModelSpec(
            name="drift",
            views=ViewLayout(),
            context_frames=1,
            horizons=(5,),
            frame_dt=2 * DT,
            conditions=frozenset({"text", "proprioception"}),
            returns=frozenset({"frames"}),
            proprioception_lags=(0, 4),
            fingerprint="drift-1",
        )

    def rollout(self, request: RolloutRequest) -> Rollout:
        self.requests.append(request)
        first = request.context_BVTHWC[0, :, -1].astype(np.int64)
        frames = np.stack([np.clip(first + 3 * k, 0, 255) for k in range(request.horizon)], axis=1).astype(np.uint8)
        return Rollout(
            times_T=np.arange(request.horizon) * self.spec.frame_dt,
            frames_BSVTHWC=frames[None, None],
            cost={"seconds": 1.0},
        )


class Ramp:
    """A decoder that adds 0.1 to every joint a step."""

    fingerprint = "ramp-1"
    needs = DecoderNeeds(horizons=(5,), frame_dt=2 * DT)

    def decode(self, rollout: Rollout, state_BA: np.ndarray, instructions: Sequence[str]) -> list[list[ActionChunk]]:
        rows = 0.1 * np.arange(1, 9)[:, None] + state_BA[0]
        return [[ActionChunk(actions_PA=rows.astype(np.float32))]]


def replace_models(monkeypatch: pytest.MonkeyPatch) -> Drift:
    """The export's models replaced by the two above."""
    import physisforcing.planner.inverse_dynamics as decoders
    import physisforcing.world_models as models

    model = Drift()
    monkeypatch.setattr(models, "load_any", lambda *_, **__: model)
    monkeypatch.setattr(decoders, "load_inverse_dynamics", lambda *_: Ramp())
    return model
