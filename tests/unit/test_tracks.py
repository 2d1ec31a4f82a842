"""Exact tracks: re-projection at the first frame, points that stay on their body, occlusion, on a ray-cast scene of boxes."""

from __future__ import annotations

import time

import numpy as np
import pytest

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.ground_truth import GroundTruth, encode_maps, load, save
from physisforcing.worldmodel.teachers.ground_truth import point_tracks, query_grid, rotation_matrices

SIZE = (240, 320)
FOCAL = 300.0
#: body id -> half sizes in metres; id 1 is the table (no stored pose), 2 a turning box, 3 a box that sweeps in front of it
BOXES = {1: (0.5, 0.5, 0.02), 2: (0.05, 0.05, 0.05), 3: (0.06, 0.02, 0.08)}
CAMERA_HEIGHT = 1.0


def _quaternion(axis: np.ndarray, angle: float) -> np.ndarray:
    axis = axis / np.linalg.norm(axis)
    return np.concatenate([[np.cos(angle / 2)], np.sin(angle / 2) * axis])


def _poses(frames: int) -> np.ndarray:
    poses = np.zeros((frames, 2, 7))
    for t in range(frames):
        turn = _quaternion(np.array([0.2, 0.1, 1.0]), 0.03 * t)
        poses[t, 0] = [-0.1 + 0.004 * t, 0.02, 0.07 + 0.002 * t, *turn]
        poses[t, 1] = [0.35 - 0.016 * t, 0.0, 0.3, *_quaternion(np.array([0.0, 0.0, 1.0]), -0.02 * t)]
    return poses


def _camera() -> np.ndarray:
    """Looks down on the table from 1 m, tilted by 0.3 rad; the rows are the camera's right, down and forward."""
    rotation = np.array([[1, 0, 0], [0, -np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), -np.cos(0.3)]])
    extrinsic = np.eye(4)
    extrinsic[:3, :3] = rotation
    extrinsic[:3, 3] = -rotation @ np.array([0.0, -0.3, CAMERA_HEIGHT])
    return extrinsic


def _ray_cast(poses_K7: np.ndarray, extrinsic: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth in metres (float64, inf where nothing) and ids by slab tests against each box."""
    x, y = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    ray = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsics).T
    direction = ray @ extrinsic[:3, :3]
    origin = -extrinsic[:3, :3].T @ extrinsic[:3, 3]
    depth, ids = np.full(SIZE, np.inf), np.zeros(SIZE, np.uint16)
    placed = {1: np.array([0, 0, -0.02, 1, 0, 0, 0.0]), 2: poses_K7[0], 3: poses_K7[1]}
    for body, pose in placed.items():
        rotation = rotation_matrices(pose[3:])
        local_origin, local = rotation.T @ (origin - pose[:3]), direction @ rotation
        with np.errstate(divide="ignore"):
            entry, leave = (-np.array(BOXES[body]) - local_origin) / local, (BOXES[body] - local_origin) / local
        near, far = np.minimum(entry, leave).max(-1), np.maximum(entry, leave).min(-1)
        hit = (near <= far) & (near > 0) & (near < depth)
        depth[hit], ids[hit] = near[hit], body
    return depth, ids


def make_truth(frames: int = 33, every: int = 8) -> GroundTruth:
    poses, extrinsic = _poses(frames).astype(np.float32), _camera()
    intrinsics = np.array([[FOCAL, 0, 159.5], [0, FOCAL, 119.5], [0, 0, 1]])
    stored = np.arange(0, frames, every, dtype=np.int32)
    shots = [_ray_cast(poses[t].astype(np.float64), extrinsic, intrinsics) for t in stored]
    depth_png, depth_offsets = encode_maps(
        [np.where(np.isfinite(d), np.rint(d * 1000), 0).astype(np.uint16) for d, _ in shots]
    )
    ids_png, ids_offsets = encode_maps([ids for _, ids in shots])
    return GroundTruth(
        body_ids_K=np.array([2, 3], np.uint16),
        body_poses_TK7=poses,
        body_names={1: "table", 2: "cube", 3: "bar"},
        view_names=("head",),
        size=SIZE,
        intrinsics_V33=intrinsics[None],
        world_to_camera_TV44=np.tile(extrinsic, (frames, 1, 1, 1)),
        contact_frame_M=np.array([3, 7], np.int32),
        contact_pair_M2=np.array([[1, 2], [2, 3]], np.uint16),
        contact_impulse_M=np.array([0.1, 0.2], np.float32),
        stored_frames_D=stored,
        depth_png=depth_png,
        depth_offsets=depth_offsets,
        ids_png=ids_png,
        ids_offsets=ids_offsets,
    )


@pytest.fixture(scope="module")
def truth() -> GroundTruth:
    return make_truth()


@pytest.fixture(scope="module")
def full() -> GroundTruth:
    return make_truth(every=1)


WINDOW = list(range(0, 33, 2))


@pytest.mark.parametrize("size", [(240, 320), (120, 160), (480, 640)])
def test_reprojection_of_the_first_frame(truth: GroundTruth, size: tuple[int, int]) -> None:
    frames = [8, 8, 10, 16]  # the repeated frame goes through pose and projection
    tracks = point_tracks(truth, frames, (25, 25), size)
    expected = query_grid((25, 25), size)
    known = tracks.depth_N > 0
    assert 0.8 < known.mean() < 1  # the corners show nothing
    assert np.abs(tracks.points_TN2[0] - expected).max() < 0.01
    assert np.abs(tracks.points_TN2[1] - expected)[known].max() < 0.01
    assert tracks.visible_TN[0, known].all()
    assert not tracks.visible_TN[:, ~known].any()
    assert (tracks.body_N[~known] == -1).all()


def test_scale_only_changes_pixels(truth: GroundTruth) -> None:
    large, small = (point_tracks(truth, WINDOW, (25, 25), s) for s in ((240, 320), (120, 160)))
    np.testing.assert_allclose((large.points_TN2 + 0.5) / 2 - 0.5, small.points_TN2, atol=1e-3)
    np.testing.assert_array_equal(large.visible_TN, small.visible_TN)


def test_visible_points_stay_on_their_body(full: GroundTruth) -> None:
    tracks = point_tracks(full, WINDOW)
    assert (tracks.body_N == 2).sum() >= 8
    on_body = total = 0
    for t, frame in enumerate(WINDOW):
        ids = full.body_id_map(frame)
        pixel = np.rint(tracks.points_TN2[t]).astype(int)
        seen = tracks.visible_TN[t]
        here = ids[pixel[seen, 1], pixel[seen, 0]] == tracks.body_N[seen]
        on_body, total = on_body + here.sum(), total + seen.sum()
    # A point within a pixel of a silhouette may round onto the neighbour.
    assert on_body / total > 0.99


def test_tracks_follow_the_rigid_motion(full: GroundTruth) -> None:
    """Independent path: the world point of the true (not rounded) depth moves with the body and is projected by hand."""
    tracks = point_tracks(full, WINDOW)
    poses, extrinsic, intrinsics = _poses(33), _camera(), full.intrinsics_V33[0]
    depth, _ = _ray_cast(full.body_poses_TK7[0].astype(np.float64), extrinsic, intrinsics)
    for point in np.flatnonzero(tracks.body_N >= 2)[::3]:
        x, y = tracks.points_TN2[0, point]
        camera = np.linalg.inv(intrinsics) @ np.array([x, y, 1.0]) * depth[round(float(y)), round(float(x))]
        world = np.linalg.inv(extrinsic) @ np.append(camera, 1.0)
        slot = tracks.body_N[point] - 2
        for t, frame in enumerate(WINDOW):
            old, new = np.eye(4), np.eye(4)
            old[:3, :3], old[:3, 3] = rotation_matrices(poses[0, slot, 3:]), poses[0, slot, :3]
            new[:3, :3], new[:3, 3] = rotation_matrices(poses[frame, slot, 3:]), poses[frame, slot, :3]
            image = intrinsics @ (extrinsic @ new @ np.linalg.inv(old) @ world)[:3]
            np.testing.assert_allclose(tracks.points_TN2[t, point], image[:2] / image[2], atol=0.3)  # depth is in mm


def test_occlusion_by_the_bar_is_seen(full: GroundTruth, truth: GroundTruth) -> None:
    exact = point_tracks(full, WINDOW)
    cube = exact.body_N == 2
    covered = ~exact.visible_TN[:, cube]
    assert covered.any(), "the bar passes before the cube"
    # Independent visibility: the float depth of the point against the float depth map around its pixel.
    agree = _slow_visibility(exact) == exact.visible_TN
    assert agree.mean() > 0.985
    stored = point_tracks(truth, WINDOW)
    at_stored = [WINDOW.index(f) for f in range(0, 33, 8)]
    np.testing.assert_array_equal(stored.visible_TN[at_stored], exact.visible_TN[at_stored])
    assert (stored.visible_TN == exact.visible_TN).mean() > 0.95


def _slow_visibility(tracks) -> np.ndarray:
    """One point and frame at a time, against the analytic scene instead of the stored maps."""
    extrinsic, poses = _camera(), _poses(33)
    intrinsics = np.array([[FOCAL, 0, 159.5], [0, FOCAL, 119.5], [0, 0, 1]])
    out = np.zeros_like(tracks.visible_TN)
    for t, frame in enumerate(WINDOW):
        _, ids = _ray_cast(poses[frame], extrinsic, intrinsics)
        for n in range(out.shape[1]):
            x, y = tracks.points_TN2[t, n]
            if tracks.body_N[n] < 0 or not (-0.5 <= x < SIZE[1] - 0.5 and -0.5 <= y < SIZE[0] - 0.5):
                continue
            around = ids[max(round(y) - 1, 0) : round(y) + 2, max(round(x) - 1, 0) : round(x) + 2]
            out[t, n] = (around == tracks.body_N[n]).any()
    return out


def test_fast_enough(truth: GroundTruth) -> None:
    maps: dict = {}
    point_tracks(truth, WINDOW, maps=maps)
    spent = []
    for _ in range(7):
        begin = time.perf_counter()
        point_tracks(truth, WINDOW, maps=maps)
        spent.append(time.perf_counter() - begin)
    assert min(spent) < 0.02, f"{min(spent) * 1e3:.1f} ms for 625 points x 17 frames"  # ~4 ms alone; shared machines


def test_a_window_must_start_on_a_stored_frame(truth: GroundTruth) -> None:
    with pytest.raises(UserError, match="stored depth"):
        point_tracks(truth, [2, 4, 6])
    with pytest.raises(UserError, match="clamp"):
        point_tracks(truth, [0, 40])


def test_file_round_trip_is_exact_and_deterministic(truth: GroundTruth, tmp_path) -> None:
    save(tmp_path / "a.safetensors", truth)
    save(tmp_path / "b.safetensors", truth)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load(tmp_path / "a.safetensors")
    for name in ("body_poses_TK7", "depth_png", "ids_offsets", "world_to_camera_TV44", "contact_pair_M2"):
        np.testing.assert_array_equal(getattr(again, name), getattr(truth, name))
    assert (again.body_names, again.view_names, again.size) == (truth.body_names, truth.view_names, truth.size)
    np.testing.assert_array_equal(again.depth(8), truth.depth(8))
    assert not list(tmp_path.glob(".*"))


def test_lossless_maps() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 1 << 16, SIZE, dtype=np.uint16) for _ in range(2)]
    blob, offsets = encode_maps(pictures)
    truth = make_truth(frames=9)
    truth.depth_png, truth.depth_offsets = blob, offsets
    np.testing.assert_array_equal(truth.depth(0), pictures[0])
    np.testing.assert_array_equal(truth.depth(8), pictures[1])


def test_damaged_files_are_refused(truth: GroundTruth, tmp_path) -> None:
    path = tmp_path / "episode.safetensors"
    with pytest.raises(DatasetError, match=r"missing\.safetensors"):
        load(tmp_path / "missing.safetensors")
    save(path, truth)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"episode\.safetensors"):
        load(path)
    path.write_bytes(b"not a file of ours")
    with pytest.raises(DatasetError):
        load(path)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("stored_frames_D", lambda v: v + 30),
        ("depth_offsets", lambda v: v + 1),
        ("ids_offsets", lambda v: v[::-1].copy()),
        ("body_ids_K", lambda v: np.zeros_like(v)),
        ("body_poses_TK7", lambda v: v * np.nan),
        ("contact_pair_M2", lambda v: v[:1]),
    ],
)
def test_inconsistent_contents_are_refused(tmp_path, field: str, change) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "episode.safetensors"
    save(path, make_truth(frames=9))
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    arrays[field] = np.ascontiguousarray(change(arrays[field]))
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(DatasetError, match=field):
        load(path)


def test_a_map_of_another_size_is_refused(truth: GroundTruth) -> None:
    other = make_truth(frames=9)
    other.depth_png, other.depth_offsets = encode_maps([np.zeros((10, 10), np.uint16)] * 2)
    with pytest.raises(DatasetError, match="16-bit PNG"):
        other.depth(0)
