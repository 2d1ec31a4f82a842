"""A policy as LeRobot's loops drive one: an observation of B environments every control step in, one row of targets each out.

Nothing of LeRobot is imported here. Observations are its batches: ``observation.images.NAME`` float [B,3,H,W] in [0,1] or uint8,
``observation.state`` float [B,A] as the recordings have it, ``task`` the sentences.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physisforcing.core.errors import UserError
from physisforcing.core.history import lagged
from physisforcing.worldmodel.data.canvas import ALIASES, canvas_layout, compose

from ..act import ExecutionConfig, check_rate
from ..requests import ChunkSource, PlanRequest, PolicySpec
from ..sampling import plan_seed

STATE, TASK, IMAGES = "observation.state", "task", "observation.images."
SEE = "docs/bring_your_policy.md"


def camera_features(canvas: str, cameras: Mapping[str, str]) -> dict[str, tuple[int, int, int]]:
    """LeRobot's names of the pictures that a canvas is made of -> (3, height, width) that they have on it. ``cameras``: camera of the canvas
    -> what the robot or environment calls it, where that differs. ``UserError`` for one that the canvas does not have, and for one picture as two."""
    layout = canvas_layout(canvas, "policy.")
    for camera in cameras:
        if camera not in layout.names:
            wanted = f"cameras of canvas {canvas}: {', '.join(layout.names)}"
            raise UserError(
                "policy.cameras", got=camera, wanted=wanted, fix=f"--policy.cameras='{{{layout.names[0]}: NAME}}'"
            )
    called = {camera: cameras.get(camera, camera) for camera in layout.names}
    for name in called.values():
        if len(sharing := [camera for camera in called if called[camera] == name]) > 1:
            got, fix = f"{name} as {' and as '.join(sharing)}", "name another picture for one of them"
            raise UserError("policy.cameras", got=got, wanted="each picture once", fix=fix)
    tiles = layout.tiles or ((0, 0, layout.height, layout.width),)
    return {
        f"{IMAGES}{called[camera]}": (3, tile[2], tile[3]) for camera, tile in zip(layout.names, tiles, strict=True)
    }


def check_loop_rate(spec: PolicySpec, fps: float | None) -> None:
    """``UserError`` unless ``fps`` says at which rate the loop takes rows and it is that of the policy; 0: the loop has none, since each target is
    driven to in its own time (RoboTwin's ``take_action``). LeRobot does not tell a policy."""
    if fps is None or fps < 0:
        wanted = "the loop's rate: --fps of lerobot-rollout, --env.fps of lerobot-eval; 0 where each target is driven to in its own time"
        raise UserError(
            "policy.fps", got=fps, wanted=wanted, fix=f"--policy.fps={spec.control_hz:.6g}, if the loop has it"
        )
    if fps:
        check_rate(
            spec,
            1.0 / fps,
            fix=f"run the loop at {spec.control_hz:.6g} a second, or a policy trained on recordings of that rate",
        )


def check_features(spec: PolicySpec, actions: Sequence[int] | None, states: Sequence[int] | None) -> None:
    """``UserError`` for shapes of ``action`` and ``observation.state`` that are not the policy's; None: not known before the first observation."""
    for name, shape, width in (("action", actions, spec.action_dim), (STATE, states, spec.state_dim)):
        if shape is not None and tuple(shape) != (width,):
            fix = "the robot or environment that it was trained on"
            raise UserError(name, got=tuple(shape), wanted=f"({width},), as policy {spec.name} has", fix=fix)


def inference_only(what: str) -> UserError:
    """What LeRobot's training gets."""
    fix = "physis train policy, which reads LeRobot datasets (docs/policy.md)"
    return UserError("policy.type=physis", got=what, wanted="inference: lerobot-eval or lerobot-rollout", fix=fix)


class LockstepLoop:
    """Chunks of ``source`` row by row, for B environments that step together (lerobot-eval's, or one robot).

    The n-th episode since the loop was made, of all environments, has the noise of the episode seed ``seed`` + n: that of lerobot-eval's
    scene where ``seed`` is its ``--seed``, whatever its batch size, in its first task; scenes of a second one begin at ``--seed`` again, episodes are
    counted on, with those that only fill a batch up. ``cameras``: as ``camera_features``. ``UserError`` where two threads drive one loop.
    """

    def __init__(
        self, source: ChunkSource, config: ExecutionConfig, *, seed: int, cameras: Mapping[str, str] | None = None
    ) -> None:
        self.source, self.config, self.seed, self.cameras = source, config, seed, dict(cameras or {})
        config.check(source.spec.chunk)
        if config.execution != "receding":
            raise UserError("policy.execution", got=config.execution, wanted="receding", fix=f"see {SEE}")
        camera_features(source.spec.canvas, self.cameras)
        self._episode, self._size, self._thread = 0, 0, 0
        self._begin()

    def reset(self) -> None:
        """Episodes begin. Those before count where anything was asked of them."""
        self._episode += self._size
        self._begin()

    def _begin(self) -> None:
        self._size, self._plans = 0, 0
        self._states: deque[NDArray[np.float32]] = deque(maxlen=1 + max(self.source.spec.lags))
        self._rows: deque[NDArray[np.float32]] = deque()

    def select(self, batch: Mapping[str, Any]) -> Tensor:
        """Targets of this control step, float32 [B,A] on the CPU; called once every control step. ``UserError`` for an observation that is none
        of the policy's, and for another B than the episode began with."""
        self._observe(batch)
        if not self._rows:
            chunk_BPA = self._plan(batch)
            self._rows.extend(chunk_BPA[:, row] for row in range(self.config.execute))
        return torch.from_numpy(np.array(self._rows.popleft()))

    def chunk(self, batch: Mapping[str, Any]) -> Tensor:
        """A whole plan from this observation, float32 [B,P,A], for callers that execute rows themselves. ``UserError`` for a policy that reads
        states of earlier control steps, which such a caller does not show."""
        if max(self.source.spec.lags):
            got = f"one observation, while the policy reads states {max(self.source.spec.lags)} control steps back"
            wanted = "a policy of the present state alone"
            raise UserError("predict_action_chunk", got=got, wanted=wanted, fix="call select_action every control step")
        self._observe(batch)
        return torch.from_numpy(self._plan(batch))

    def _observe(self, batch: Mapping[str, Any]) -> None:
        state_BA = _array(batch, STATE).astype(np.float32)
        if state_BA.ndim != 2:
            raise UserError(STATE, got=list(state_BA.shape), wanted="[B,A]", fix="use LeRobot's own processors")
        check_features(self.source.spec, None, state_BA.shape[1:])
        if self._size not in (0, len(state_BA)):
            fix = "reset() when episodes begin"
            raise UserError(STATE, got=f"{len(state_BA)} environments", wanted=f"{self._size}, as before", fix=fix)
        if self._size and self._thread != threading.get_ident():
            fix = "--env.max_parallel_tasks=1, a policy for each task, or a server (policy.server)"
            raise UserError("env.max_parallel_tasks", got="tasks of two threads", wanted="one task at a time", fix=fix)
        self._size, self._thread = len(state_BA), threading.get_ident()
        self._states.append(state_BA)

    def _plan(self, batch: Mapping[str, Any]) -> NDArray[np.float32]:
        spec, size = self.source.spec, self._size
        named = self._named(batch)
        pictures = {camera: as_pictures(_array(batch, key), key, size) for camera, key in named.items()}
        canvases = [compose(spec.canvas, {name: rows[row] for name, rows in pictures.items()}) for row in range(size)]
        states_RBA = np.stack(self._states)
        first = self.seed + self._episode
        request = PlanRequest(
            canvas_BHWC=np.stack(canvases),
            instructions=_sentences(batch.get(TASK), size),
            state_BKA=np.stack([lagged(states_RBA[:, row], spec.lags) for row in range(size)]),
            seeds_B=np.array([plan_seed(first + row, self._plans, self.config.seed) for row in range(size)], np.int64),
        )
        self._plans += 1
        return self.source.plan(request).actions_BPA

    def _named(self, batch: Mapping[str, Any]) -> dict[str, str]:
        """Camera of the canvas -> its key in the batch. ``UserError`` for one that is not there."""
        known = {key.removeprefix(IMAGES): key for key in batch if key.startswith(IMAGES)}
        own = self.cameras
        free = [name for name in known if name not in own.values()]
        found = dict[str, str]()
        for camera in canvas_layout(self.source.spec.canvas).names:
            names = (own[camera],) if camera in own else ALIASES.get(camera, (camera,))
            there = [name for name in names if name in (known if camera in own else free)]
            if not there:
                kept = ", ".join(f"{one}: {name}" for one, name in ({**own, camera: "NAME"}).items())
                fix = f"--policy.cameras='{{{kept}}}' with one of these names"
                got = f"cameras {', '.join(sorted(known)) or 'none'}"
                raise UserError("policy.cameras", got=got, wanted=f"{' or '.join(names)} as {camera}", fix=fix)
            found[camera] = known[there[0]]
        return found


def as_pictures(values_BCHW: NDArray[Any], key: str, size: int) -> NDArray[np.uint8]:
    """uint8 [B,H,W,3] of LeRobot's pictures, bit for bit those that the camera made. ``UserError`` for anything else than [B,3,H,W] in [0,1]
    or bytes."""
    shape, kind = values_BCHW.shape, values_BCHW.dtype
    fine = len(shape) == 4 and shape[:2] == (size, 3) and (kind == np.uint8 or np.issubdtype(kind, np.floating))
    if fine and kind != np.uint8:
        fine = bool(np.isfinite(values_BCHW).all()) and float(values_BCHW.min()) >= 0 and float(values_BCHW.max()) <= 1
        values_BCHW = np.rint(np.asarray(values_BCHW, np.float32) * 255).astype(np.uint8) if fine else values_BCHW
    if not fine:
        got = f"{kind} {list(shape)}" + ("" if len(shape) != 4 or shape[1] != 3 else " with other numbers")
        wanted = f"[{size},3,H,W] in [0,1], or uint8, without normalisation"
        raise UserError(key, got=got, wanted=wanted, fix="leave out processors that normalise pictures")
    return np.ascontiguousarray(values_BCHW.transpose(0, 2, 3, 1))


def _array(batch: Mapping[str, Any], key: str) -> NDArray[Any]:
    if key not in batch:
        raise UserError(key, got=f"an observation of {', '.join(sorted(batch))}", wanted=key, fix=f"see {SEE}")
    value = batch[key]
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _sentences(task: Any, size: int) -> list[str]:
    sentences = [task] * size if isinstance(task, str) else list(task or ())
    if len(sentences) != size or not all(isinstance(text, str) and text for text in sentences):
        fix = "--task of lerobot-rollout, or an environment that has a task_description"
        raise UserError(TASK, got=task, wanted=f"a sentence for each of {size} environments", fix=fix)
    return sentences


# ------------------------------------------------------------------------------------------------------------ opening


def folder_spec(folder: str) -> PolicySpec:
    """Of the policy in ``folder``, without reading its weights, so that the fingerprint is empty. ``UserError`` as ``read_settings``, and for an
    empty name."""
    from ..checkpoint import policy_name, read_settings

    if not folder:
        fix = "--policy.folder=runs/policy/export"
        raise UserError("policy.folder", got="", wanted="the folder of a policy", fix=fix)
    path = Path(folder)
    own, info, extra = read_settings(path)
    lags = (extra["conditioner"] or {}).get("lags", ())
    return PolicySpec.of(own, info, lags, name=policy_name(path), fingerprint="")


def open_chunks(folder: str, server: str, planning: Mapping[str, Any]) -> ChunkSource:
    """The plans of the policy in ``folder``, computed here with ``planning`` (``PlanningConfig``'s fields), or by ``physis serve policy`` at
    ``server`` (HOST:PORT, its token in PHYSIS_TOKEN), which must make the same plans. ``UserError`` where it does not."""
    from ..planning import PlanningConfig, load_chunk_model, plans_fingerprint

    config = PlanningConfig(**planning)
    if not server:
        return load_chunk_model(folder, config)
    from ..checkpoint import policy_fingerprint, read_settings
    from ..remote import SocketChunks

    own, _, _ = read_settings(Path(folder))
    wanted = plans_fingerprint(own.mode, config.sampling(), policy_fingerprint(folder))
    source = SocketChunks(server, token=os.environ.get("PHYSIS_TOKEN", ""))
    if (found := source.spec.fingerprint) != wanted:
        source.close()
        fix = "serve the policy of policy.folder, with the same steps and mode"
        raise UserError("policy.server", got=f"plans {found} at {server}", wanted=f"plans {wanted}", fix=fix)
    return source
