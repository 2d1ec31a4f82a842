"""The simulator as tracker: exact point tracks from stored poses, depth and body ids.

A query pixel of the window's first frame is back-projected with its stored depth, fixed to the rigid body whose id
the pixel carries, moved with that body's later poses and projected again. Float64 inside. A body without stored poses
(table, wall) stands still in the world.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.ground_truth import METRES_PER_COUNT, GroundTruth
from physisforcing.core.types import PointTracks

#: Part of every cache key: raise it when tracks change.
VERSION = 1
#: Default query grid (rows, columns): the paper's 625 points.
GRID = (25, 25)
#: A point is hidden when it lies this much (metres) behind what the depth map shows of its own body around its pixel.
TOLERANCE = 0.004

MapCache = dict[int, tuple[NDArray[np.uint16], NDArray[np.uint16]]]


def query_grid(grid: tuple[int, int], size: tuple[int, int]) -> NDArray[np.float64]:
    """Centres of a regular ``grid`` (rows, columns) of equal areas over a picture of ``size`` (H, W): [N,2] (x, y), row order."""
    y = (np.arange(grid[0]) + 0.5) * size[0] / grid[0] - 0.5
    x = (np.arange(grid[1]) + 0.5) * size[1] / grid[1] - 0.5
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)


def point_tracks(
    gt: GroundTruth,
    frames: Sequence[int],
    grid: tuple[int, int] = GRID,
    size: tuple[int, int] | None = None,
    *,
    view: int = 0,
    maps: MapCache | None = None,
    queries_N2: NDArray[np.floating] | None = None,
) -> PointTracks:
    """Tracks of a regular query grid over a window of an episode, or of ``queries_N2``, pixels (x, y) of the first frame.

    ``frames``: frame numbers, the first one stored with depth, repeats allowed (windows past the end of an episode).
    ``size``: (H, W) of the picture whose pixels the answer is in, default the stored size; only the scale may differ.

    A point is visible in a frame with stored depth when it lies in front of the camera, inside the picture, and not
    behind the surface that the depth map shows: within 4 mm of the depths of its own body in the 3x3 pixels around
    it. In a frame between stored ones it must be inside the picture and visible in the nearest stored frame; the
    collection option ``ground_truth=full`` stores every frame and makes this exact too. Queries on nothing (depth 0)
    are never visible.

    ``maps``: a dictionary that keeps decoded maps between calls for windows of the same episode and view.

    Raises ``UserError`` when the first frame has no stored depth or a frame is outside the episode.
    """
    size = size or gt.size
    wanted = np.asarray(frames, dtype=np.int64)
    if wanted.ndim != 1 or len(wanted) == 0 or wanted.min() < 0 or wanted.max() >= gt.num_frames:
        raise UserError(
            "frames",
            got=list(frames)[:4],
            wanted=f"frames 0 to {gt.num_frames - 1}",
            fix="clamp the window to the episode",
        )
    scale = np.array([size[1] / gt.size[1], size[0] / gt.size[0]])
    chosen = query_grid(grid, size) if queries_N2 is None else np.asarray(queries_N2, dtype=np.float64)
    query = (chosen + 0.5) / scale - 0.5
    points = _AttachedPoints(gt, view, {} if maps is None else maps, int(wanted[0]), query)
    reference = np.array([gt.nearest_stored(int(frame)) for frame in wanted])
    moments, inverse = np.unique(np.concatenate([wanted, reference]), return_inverse=True)
    pixels, depth = points.project(moments)
    inside = _inside(pixels, depth, gt.size)
    for place, moment in enumerate(moments):
        if gt.has_maps(int(moment)):
            inside[place] &= points.unhidden(int(moment), pixels[place], depth[place], inside[place])
    count = len(wanted)
    visible = inside[inverse[:count]] & inside[inverse[count:]] & points.known
    track = pixels[inverse[:count]]
    track[0] = query
    return PointTracks(
        points_TN2=((track + 0.5) * scale - 0.5).astype(np.float32),
        visible_TN=visible,
        size=(int(size[0]), int(size[1])),
        body_N=np.where(points.known, points.body, -1).astype(np.int32),
        depth_N=(points.depth * points.known).astype(np.float32),
    )


class _AttachedPoints:
    """N points, each fixed to a rigid body of an episode (``slot`` -1: fixed in the world)."""

    def __init__(self, gt: GroundTruth, view: int, maps: MapCache, frame: int, query: NDArray[np.float64]) -> None:
        self.gt, self.view, self.cache = gt, view, maps
        column, row = np.clip(np.rint(query).astype(np.int64), 0, [gt.size[1] - 1, gt.size[0] - 1]).T
        depth_map, id_map = self.maps(frame)
        self.body = id_map[row, column].astype(np.int64)
        self.depth = depth_map[row, column] * METRES_PER_COUNT
        self.known = self.depth > 0
        ray = np.concatenate([query, np.ones((len(query), 1))], 1) @ np.linalg.inv(gt.intrinsics_V33[view]).T
        # A query on nothing is put far away, so that all arithmetic stays finite; it is never visible.
        camera = ray * np.where(self.known, self.depth, 1e3)[:, None]
        extrinsic = gt.world_to_camera_TV44[frame, view]
        world = (camera - extrinsic[:3, 3]) @ np.linalg.inv(extrinsic[:3, :3]).T
        place = np.full(1 << 16, -1)
        place[gt.body_ids_K] = np.arange(len(gt.body_ids_K))
        self.slot = np.where(self.known, place[self.body], -1)
        rotation, position = self._poses(np.array([frame]))
        self.local = np.einsum("nji,nj->ni", rotation[0], world - position[0])

    def maps(self, frame: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        if frame not in self.cache:
            self.cache[frame] = self.gt.depth(frame, self.view), self.gt.body_id_map(frame, self.view)
        return self.cache[frame]

    def _poses(self, moments: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Rotation [T,N,3,3] and position [T,N,3] of every point's body."""
        used, inverse = np.unique(self.slot, return_inverse=True)
        poses = np.tile(np.array([0.0, 0, 0, 1, 0, 0, 0]), (len(moments), len(used), 1))
        moving = used >= 0
        poses[:, moving] = self.gt.body_poses_TK7[np.ix_(moments, used[moving])]
        return rotation_matrices(poses[..., 3:])[:, inverse], poses[:, inverse, :3]

    def project(self, moments: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Pixels [T,N,2] and depths [T,N] at these frames."""
        rotation, position = self._poses(moments)
        world = np.einsum("tnij,nj->tni", rotation, self.local) + position
        extrinsic = self.gt.world_to_camera_TV44[moments, self.view]
        camera = world @ extrinsic[:, :3, :3].transpose(0, 2, 1) + extrinsic[:, None, :3, 3]
        image = camera @ self.gt.intrinsics_V33[self.view].T
        depth = camera[..., 2]
        return image[..., :2] / np.where(depth > 1e-6, depth, 1e-6)[..., None], depth

    def unhidden(self, frame: int, pixels: NDArray, depth: NDArray, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether the depth map of a stored frame shows each point itself and not something before it: bool [N]."""
        height, width = self.gt.size
        depth_map, id_map = (picture.ravel() for picture in self.maps(frame))
        column, row = np.rint(np.where(inside[:, None], pixels, 0)).astype(np.int64).T
        nearest, farthest = np.full(len(depth), np.inf), np.full(len(depth), -np.inf)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                index = np.clip(row + dy, 0, height - 1) * width + np.clip(column + dx, 0, width - 1)
                seen = depth_map[index] * METRES_PER_COUNT
                own = (id_map[index] == self.body) & (seen > 0)
                nearest = np.where(own, np.minimum(nearest, seen), nearest)
                farthest = np.where(own, np.maximum(farthest, seen), farthest)
        return (depth >= nearest - TOLERANCE) & (depth <= farthest + TOLERANCE)


def rotation_matrices(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quaternions wxyz [...,4], of any length but zero -> rotation matrices [...,3,3]."""
    w, x, y, z = np.moveaxis(quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _inside(pixels: NDArray, depth: NDArray, size: tuple[int, int]) -> NDArray[np.bool_]:
    limit = np.array([size[1], size[0]]) - 0.5
    return (depth > 1e-6) & (pixels >= -0.5).all(-1) & (pixels < limit).all(-1)
