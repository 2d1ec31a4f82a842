"""From a running environment to one dataset episode: pictures, joints, actions and exact ground truth.

Time base: frame t is taken after 15 t physics steps; ``observation.state[t]`` = u[t], RoboTwin's drive targets then, and
``action[t]`` = u[t+1]; the last row repeats its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.ground_truth import STORED_STRIDE, GroundTruth, encode_maps
from physisforcing.core.ground_truth import save as save_ground_truth
from physisforcing.core.lerobot import GROUND_TRUTH_PATH, LeRobotWriter
from physisforcing.core.pictures import shrink_area

#: Which frames get depth and body ids: every 8th, all of them, none (poses, cameras and contacts only), or no ground truth
#: file at all.
GROUND_TRUTH = ("sparse", "full", "poses", "none")
#: Sizes of recorded pictures: as drawn, or halved by area.
PICTURES = {"240x320": 1, "120x160": 2}


class EpisodeRecorder:
    """Collects frames of one episode. ``frame(env, observation)`` is called once a control step, frame 0 first, ``finish()``
    after the last.

    ``ground_truth`` is one of ``GROUND_TRUTH``, ``pictures`` one of ``PICTURES``; the ground truth keeps the drawn size.
    """

    def __init__(
        self, cameras: tuple[str, ...] = ("head",), ground_truth: str = "sparse", pictures: str = "240x320"
    ) -> None:
        if ground_truth not in GROUND_TRUTH:
            fix = f"choose from {', '.join(GROUND_TRUTH)}"
            raise UserError("ground_truth", got=ground_truth, wanted="a known level", fix=fix)
        if pictures not in PICTURES:
            fix = f"choose from {', '.join(PICTURES)}"
            raise UserError("pictures", got=pictures, wanted="a known size", fix=fix)
        self.cameras, self.level, self._factor = tuple(cameras), ground_truth, PICTURES[pictures]
        self.images: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in self.cameras}
        self.states: list[NDArray[np.float32]] = []
        self.measured: list[NDArray[np.float32]] = []
        self.success: list[bool] = []
        self.instruction = ""
        self._poses: list[NDArray[np.float32]] = []
        self._views: list[NDArray[np.float64]] = []
        self._contacts: list[tuple[int, int, int, float]] = []
        self._depth: list[NDArray[np.uint16]] = []
        self._ids: list[NDArray[np.uint16]] = []
        self._stored: list[int] = []
        self._size = (0, 0)
        self._intrinsics_V33: NDArray[np.float64] | None = None
        self._body_ids: NDArray[np.uint16] | None = None
        self._body_names: dict[int, str] = {}
        self._under_way: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.success)

    def frame(self, env: Any, observation: dict[str, Any] | None = None) -> None:
        """Record this moment of ``env`` (a ``RoboTwinEnv``, unwrapped). ``observation``: the one just drawn; None has it drawn
        here and fetched before the next frame, so that the GPU draws while physics goes on.
        """
        self.finish()
        number = len(self)
        stored = self.level == "full" or (self.level == "sparse" and number % STORED_STRIDE == 0)
        drawing = env.begin_observe(maps=stored) if observation is None else None
        self.success.append(bool(env.success))
        if self.level != "none":
            self._truth(env, number)
        if drawing is not None:
            self._under_way = lambda: self._keep(number, drawing(), stored)
            return
        maps: dict[str, Any] = {}
        for name in self.cameras if stored else ():
            maps[f"{name}_depth"], maps[f"{name}_body_ids"] = env.depth_and_ids(name)
        self._keep(number, {**observation, **maps}, stored)

    def finish(self) -> None:
        """Fetch the pictures that are still being drawn."""
        fetch, self._under_way = self._under_way, None
        if fetch is not None:
            fetch()

    def _keep(self, number: int, seen: dict[str, Any], stored: bool) -> None:
        for name in self.cameras:
            drawn = seen[f"{name}_rgb"]
            self._size = drawn.shape[:2]
            self.images[name].append(shrink_area(drawn, self._factor))
        self.states.append(seen["state"])
        self.measured.append(seen["state_measured"])
        self.instruction = seen["instruction"]
        if stored:
            self._stored.append(number)
            for name in self.cameras:
                self._depth.append(seen[f"{name}_depth"])
                self._ids.append(seen[f"{name}_body_ids"])

    def _truth(self, env: Any, number: int) -> None:
        specs = env.cameras()
        if number == 0:
            self._intrinsics_V33 = np.stack([spec.intrinsics_33 for spec in specs])
            self._body_names = env.body_names()
        self._views.append(np.stack([spec.world_to_camera_44 for spec in specs]))
        ids_K, poses_K7 = env.body_poses()
        assert self._body_ids is None or np.array_equal(ids_K, self._body_ids), "bodies appeared or vanished"
        self._body_ids = ids_K
        self._poses.append(poses_K7)
        self._contacts += [(number, a, b, impulse) for a, b, impulse in env.contacts()]

    def columns(self) -> dict[str, NDArray[Any]]:
        """Dataset columns; row t of ``next.success`` says whether the task's check has succeeded by frame t+1."""
        states_TA = np.stack(self.states)
        return {
            "observation.state": states_TA,
            "observation.state_measured": np.stack(self.measured),
            "action": np.concatenate([states_TA[1:], states_TA[-1:]]),
            "next.success": np.array([*self.success[1:], self.success[-1]], dtype=bool),
        }

    def ground_truth(self, extra: dict[str, str] | None = None) -> GroundTruth:
        """What the simulator knew, in the format of ``core.ground_truth``."""
        assert self.level != "none" and self._intrinsics_V33 is not None and self._body_ids is not None
        contacts = np.array(self._contacts, dtype=np.float64).reshape(-1, 4)
        depth_png, depth_offsets = encode_maps(self._depth)
        ids_png, ids_offsets = encode_maps(self._ids)
        return GroundTruth(
            body_ids_K=self._body_ids,
            body_poses_TK7=np.stack(self._poses),
            body_names=self._body_names,
            view_names=self.cameras,
            size=self._size,
            intrinsics_V33=self._intrinsics_V33,
            world_to_camera_TV44=np.stack(self._views),
            contact_frame_M=contacts[:, 0].astype(np.int32),
            contact_pair_M2=contacts[:, 1:3].astype(np.uint16),
            contact_impulse_M=contacts[:, 3].astype(np.float32),
            stored_frames_D=np.array(self._stored, dtype=np.int32),
            depth_png=depth_png,
            depth_offsets=depth_offsets,
            ids_png=ids_png,
            ids_offsets=ids_offsets,
            extra=extra or {},
        )

    def write(self, writer: LeRobotWriter, *, key: str, policy: str, info: dict[str, Any]) -> str:
        """Stage the episode. ``info``: the environment's, at the end of the episode. Returns the key."""
        about = {
            name: str(info[name]) for name in ("task", "seed", "scene_hash", "assets", "runtime", "renderer", "control")
        }
        truth = None if self.level == "none" else self.ground_truth(about | {"policy": policy})
        return writer.add_episode(
            key=key,
            columns=self.columns(),
            frames={f"observation.images.{name}": np.stack(pictures) for name, pictures in self.images.items()},
            instruction=self.instruction,
            task_name=info["task"],
            seed=info["seed"],
            success=self.success[-1],
            scene_hash=info["scene_hash"],
            policy=policy,
            embodiment=info["embodiment"],
            assets_version=info["assets"],
            runtime=info["runtime"],
            video_metadata={"comment": "recorded in a simulator, not generated by a model", **about, "policy": policy},
            attachments=None if truth is None else {GROUND_TRUTH_PATH: lambda path: save_ground_truth(path, truth)},
        )


def hold(env: Any, recorder: EpisodeRecorder, frames: int) -> None:
    """Hold the last drive targets for ``frames`` control steps, so that a model sees how the episode ends."""
    recorder.finish()
    target_A = recorder.states[-1]
    for _ in range(frames):
        env.step_blind(target_A)
        recorder.frame(env)
    recorder.finish()


def record_expert(env: Any, seed: int, recorder: EpisodeRecorder, *, hold_frames: int = 4) -> dict[str, Any]:
    """Reset to ``seed``, play the expert and hold. Returns the reset's info; ``UnstableSceneError`` comes from there."""
    _, info = env.reset(seed=seed, options={"observe": False})
    env.play_expert(lambda _: recorder.frame(env))
    hold(env, recorder, hold_frames)
    return info


def expert_targets(env: Any, seed: int) -> NDArray[np.float32]:
    """Reset to ``seed``, play the expert without drawing and give its drive targets [T,A], those of frame 0 first."""
    env.reset(seed=seed, options={"observe": False})
    targets: list[NDArray[np.float32]] = []
    env.play_expert(lambda _: targets.append(env.observe(pictures=False)["state"]))
    return np.stack(targets)


def record_noisy_expert(
    env: Any, seed: int, recorder: EpisodeRecorder, *, hold_frames: int = 4, noise_rad: float = 0.06
) -> dict[str, Any]:
    """The expert's targets replayed through ``step`` with smooth joint noise that fades out before the first grasp.

    The recorded action is the one executed, noise included, so pictures and joints stay consistent; what a model learns
    from it is how to come back from states beside the expert's path.
    """
    clean_PA = expert_targets(env, seed)[1:]
    _, info = env.reset(seed=seed, options={"observe": False})
    recorder.frame(env)
    grippers = [k for k, name in enumerate(env.action_spec.names) if name.endswith("gripper")]
    generator = np.random.default_rng([seed, 0x6E6F])
    noisy_PA = clean_PA + joint_noise(len(clean_PA), clean_PA.shape[1], generator, noise_rad, grippers)
    for target_A in np.clip(noisy_PA, env.action_spec.low, env.action_spec.high).astype(np.float32):
        env.step_blind(target_A)
        recorder.frame(env)
    hold(env, recorder, hold_frames)
    return info


def joint_noise(
    length: int, dim: int, generator: np.random.Generator, scale: float, grippers: Sequence[int] = (6, 13)
) -> NDArray[np.float64]:
    """Noise [length, dim] in radians: white noise smoothed over about 8 control steps with standard deviation ``scale``,
    rising from 0 over the first 5 steps, fading to 0 by step 32 or half of the episode, whichever is earlier, so that
    nothing is grasped yet; none on the columns ``grippers``.
    """
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / 4.0) ** 2)
    kernel /= np.sqrt((kernel**2).sum())
    white = generator.normal(size=(length + 24, dim))
    smooth = np.stack([np.convolve(white[:, j], kernel, mode="valid") for j in range(dim)], axis=1)[:length]
    t = np.arange(length)
    rise = np.minimum(1.0, (t + 1) / 5)
    end = min(0.5 * length, 32.0)
    fade = np.clip((end - t) / max(1.0, 0.4 * end), 0.0, 1.0)
    noise = scale * smooth * (rise * fade)[:, None]
    noise[:, list(grippers)] = 0.0
    return noise
