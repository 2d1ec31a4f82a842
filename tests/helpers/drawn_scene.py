"""A drawn scene whose true motion is known by construction: a body that is pushed, a finger, their pictures and what was executed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np

from physisforcing.core.executed import ExecutedChunk
from physisforcing.core.types import DT

SIZE, FOCAL, STEPS = (240, 320), 300.0, 32
TABLE, OBJECT, FINGER = 1, 35, 27
#: Metres from the camera, and half a side in pixels.
DEPTH = {OBJECT: 0.9, FINGER: 0.8}
HALF = {OBJECT: 24, FINGER: 24}
#: Pixel (x, y) and turn in degrees of a body after k control steps.
Motion = Callable[[float], tuple[float, float, float]]


def ramp(k: float, start: float, speed: float) -> float:
    return max(k - start, 0.0) * speed


def pushed(k: float) -> tuple[float, float, float]:
    """From step 8 on to the right and slightly down, turning."""
    return 150.0 + ramp(k, 8, 1.5), 120.0 + ramp(k, 8, 0.4), ramp(k, 8, 0.8)


def finger(k: float) -> tuple[float, float, float]:
    return 60.0 + 1.2 * k, 50.0, 0.0


@cache
def texture(seed: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(30, 226, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def draw(motions: dict[int, Motion], k: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Picture, body ids and depth: the nearest body is drawn last."""
    picture, ids = texture(0, *SIZE).copy(), np.full(SIZE, TABLE, np.uint16)
    depth = np.ones(SIZE, np.float32)
    for body in sorted(motions, key=lambda b: -DEPTH[b]):
        x, y, degrees = motions[body](k)
        half = HALF[body]
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        middle = half - 0.5
        matrix = np.array([[c, -s, x - c * middle + s * middle], [s, c, y - s * middle - c * middle]])
        skin = texture(body, 2 * half, 2 * half)
        cover = cv2.warpAffine(np.ones(skin.shape[:2], np.float32), matrix, SIZE[::-1], flags=cv2.INTER_LINEAR)[
            ..., None
        ]
        moved = cv2.warpAffine(skin, matrix, SIZE[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        picture = np.rint(picture * (1 - cover) + moved * cover).astype(np.uint8)
        inside = cover[..., 0] > 0.5
        ids[inside], depth[inside] = body, DEPTH[body]
    return picture, ids, depth


def video(motions: dict[int, Motion], times: np.ndarray) -> np.ndarray:
    """Pictures at half size, as a world model gives them."""
    frames = [draw(motions, t / DT)[0] for t in times]
    return np.stack([cv2.resize(f, (160, 120), interpolation=cv2.INTER_AREA) for f in frames])


def pose(body: int, motion: Motion, k: float) -> list[float]:
    x, y, degrees = motion(k)
    z, half = DEPTH[body], math.radians(degrees) / 2
    return [(x - 159.5) / FOCAL * z, (y - 119.5) / FOCAL * z, z, math.cos(half), 0, 0, math.sin(half)]


def execute(motions: dict[int, Motion], *, contact: int | None = None, steps: int = STEPS) -> ExecutedChunk:
    _, ids, depth = draw(motions, 0)
    still = [0.0, 0, 1, 1, 0, 0, 0]
    poses = [[still, *(pose(b, motions[b], k) for b in (FINGER, OBJECT))] for k in range(steps + 1)]
    rows = [] if contact is None else list(range(contact, steps + 1))
    return ExecutedChunk(
        poses_TK7=np.array(poses, np.float32),
        body_ids_K=np.array([TABLE, FINGER, OBJECT], np.uint16),
        body_names={TABLE: "table", FINGER: "fr_link8", OBJECT: "050_bell"},
        contact_step_M=np.array(rows, np.int32),
        contact_pair_M2=np.array([[FINGER, OBJECT]] * len(rows), np.uint16).reshape(-1, 2),
        contact_impulse_M=np.ones(len(rows), np.float32),
        intrinsics_33=np.array([[FOCAL, 0, 159.5], [0, FOCAL, 119.5], [0, 0, 1]]),
        world_to_camera_44=np.eye(4),
        depth_HW=depth,
        body_HW=ids,
        success_T=np.zeros(steps + 1, bool),
        start_step=0,
    )


TIMES = np.arange(9) * 0.24


TRUE = {OBJECT: pushed, FINGER: finger}


@cache
def truth() -> tuple[ExecutedChunk, np.ndarray]:
    return execute(TRUE, contact=6), video(TRUE, TIMES)
