"""One picture of several cameras: where each stands, how it is resized, and what is missing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import UserError
from physisforcing.core.lerobot import HEAD, LeRobotDataset, LeRobotWriter, robot_features
from physisforcing.core.types import Observation
from physisforcing.policy.act import ExecutionConfig, WorldActionPolicy
from physisforcing.policy.requests import PlanAnswer, PlanRequest, PolicySpec
from physisforcing.worldmodel.data import canvas
from physisforcing.worldmodel.data.buckets import Bucket
from physisforcing.worldmodel.data.canvas import compose
from physisforcing.worldmodel.data.canvas_device import compose_on
from physisforcing.worldmodel.data.latent_maker import window_frames
from physisforcing.worldmodel.data.latent_settings import WindowSettings
from physisforcing.worldmodel.data.latent_shards import StoreInfo, check_same
from physisforcing.worldmodel.data.latent_sources import CanvasEpisodes, SizedEpisodes, open_source
from physisforcing.worldmodel.data.windows import kept_steps, read_episodes, resize_area


def flat(height: int, width: int, value: int) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def test_cameras_stand_where_the_published_canvases_have_them() -> None:
    made = compose(
        "robotwin", {"head": flat(240, 320, 10), "left_wrist": flat(240, 320, 20), "right_wrist": flat(240, 320, 30)}
    )
    assert made.shape == (384, 320, 3) and made.dtype == np.uint8
    assert np.unique(made[:256]).tolist() == [10]
    assert np.unique(made[256:, :160]).tolist() == [20] and np.unique(made[256:, 160:]).tolist() == [30]
    made = compose("libero", {"wrist_image": flat(256, 256, 2), "image": flat(128, 128, 1)})
    assert made.shape == (224, 448, 3)
    assert np.unique(made[:, :224]).tolist() == [1] and np.unique(made[:, 224:]).tolist() == [2]


def test_names_of_other_datasets_mean_the_same_cameras() -> None:
    pictures = [np.random.default_rng(k).integers(0, 256, (480, 640, 3), dtype=np.uint8) for k in range(3)]
    ours = compose("robotwin", dict(zip(("head", "left_wrist", "right_wrist"), pictures, strict=True)))
    theirs = compose("robotwin", dict(zip(("cam_high", "cam_left_wrist", "cam_right_wrist"), pictures, strict=True)))
    assert np.array_equal(ours, theirs)


def test_resizing_is_the_antialiased_triangle_filter() -> None:
    """Of a picture twice as tall and wide: Pillow's bilinear filter is a triangle two source pixels to each side."""
    picture = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    made = compose(
        "libero",
        {"image": np.kron(picture[:224, :224], np.ones((1, 1, 1), np.uint8)), "wrist_image": flat(224, 224, 0)},
    )
    assert np.array_equal(made[:, :224], picture[:224, :224]), "the right size already: untouched"

    def weights(count: int, size: int) -> np.ndarray:
        scale = count / size
        at = (np.arange(size) + 0.5) * scale
        table = np.clip(1 - np.abs((np.arange(count) + 0.5 - at[:, None]) / scale), 0, None)
        return table / table.sum(1, keepdims=True)

    for side in (336, 448):
        some = picture[:side, :side]
        small = compose("libero", {"image": some, "wrist_image": flat(224, 224, 0)})[:, :224].astype(float)
        wanted = np.einsum("rh,cw,hwk->rck", weights(side, 224), weights(side, 224), some.astype(float), optimize=True)
        assert np.abs(small - wanted).max() <= 1.0
        if side == 448:
            assert np.abs(small - resize_area(some)).max() > 20, "also of exactly twice the size no mean of four pixels"


def record(folder: Path, cameras: tuple[str, ...], size: tuple[int, int], length: int) -> LeRobotDataset:
    """A dataset of one episode as it lies on disk, its pictures in compressed videos."""
    draw = np.random.default_rng(1)
    writer = LeRobotWriter(folder, robot_features(["a", "b"], cameras=cameras, height=size[0], width=size[1]))
    state_TA = np.zeros((length, 2), np.float32)
    columns = dict.fromkeys(("observation.state", "observation.state_measured", "action"), state_TA)
    frames = {f"observation.images.{name}": draw.integers(0, 256, (length, *size, 3), np.uint8) for name in cameras}
    writer.add_episode(
        columns={**columns, "next.success": np.ones(length, bool)}, frames=frames, instruction="press", task_name="t", seed=0,
        success=True,
    )  # fmt: skip
    writer.finalize()
    return LeRobotDataset(folder)


class Asked:
    """Keeps the canvases that it is asked to plan for."""

    def __init__(self, name: str) -> None:
        layout = canvas.CANVASES[name]
        self.spec = PolicySpec(
            name="asked", canvas=name, size=(layout.height, layout.width), lags=(0,), state_dim=2, action_dim=2, chunk=4,
            control_hz=50 / 3, fingerprint="asked",
        )  # fmt: skip
        self.canvases: list[np.ndarray] = []

    def plan(self, request: PlanRequest) -> PlanAnswer:
        self.canvases.append(request.canvas_BHWC[0])
        return PlanAnswer(actions_BPA=np.zeros((1, 4, 2), np.float32), seconds={})


def acted(name: str, dataset: LeRobotDataset, steps: list[int]) -> np.ndarray:
    """What a policy that acts is asked about, where the cameras show these recorded frames."""
    asked, state = Asked(name), np.zeros(2, np.float32)
    policy = WorldActionPolicy(asked, ExecutionConfig(execute=1))
    cameras = {key.removeprefix("observation.images."): dataset.frames(0, steps, key) for key in dataset.video_keys}
    for place in range(len(steps)):
        images = {camera: rows[place] for camera, rows in cameras.items()}
        seen = Observation(images=images, state_A=state, measured_A=state, instruction="press", step=0)
        policy.reset(task="t", seed=0, instruction="press")
        policy.act(seen)
    return np.stack(asked.canvases)


@pytest.mark.parametrize("size", [(240, 320), (120, 160)])
def test_a_small_policy_acts_on_the_pictures_that_its_training_reads(size: tuple[int, int], tmp_path: Path) -> None:
    dataset = record(tmp_path / "data", ("head",), size, 7)
    (episode,) = read_episodes([tmp_path / "data"], success_only=True)
    steps = kept_steps(7).tolist()
    assert episode.frames.shape == (len(steps), 120, 160, 3) and len(np.unique(episode.frames)) > 100
    assert np.array_equal(acted("head", dataset, steps), episode.frames)


@pytest.mark.parametrize(
    ("name", "cameras", "size"),
    [
        ("libero", ("image", "wrist_image"), (256, 256)),
        ("libero", ("agentview", "robot0_eye_in_hand"), (128, 128)),
        ("robotwin", ("head", "left_wrist", "right_wrist"), (240, 320)),
        ("robotwin", ("cam_high", "cam_left_wrist", "cam_right_wrist"), (96, 128)),
    ],
)
def test_a_large_policy_acts_on_the_pictures_that_its_training_reads(
    name: str, cameras: tuple[str, ...], size: tuple[int, int], tmp_path: Path
) -> None:
    """The window as a store and a live bank read it out of the dataset."""
    dataset, layout = record(tmp_path / "data", cameras, size, 11), canvas.CANVASES[name]
    bucket = Bucket(5, layout.height, layout.width)
    source = SizedEpisodes(open_source(tmp_path / "data", 0.0, name), bucket.size, HEAD)
    trained = window_frames(source, 0, bucket, 2, 2)
    assert trained.shape == (5, layout.height, layout.width, 3) and len(np.unique(trained)) > 100
    assert np.array_equal(acted(name, dataset, [2, 4, 6, 8, 10]), trained)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"canvas.*left_wrist"):
        compose("robotwin", {"head": flat(240, 320, 0)})
    with pytest.raises(UserError, match=r"images\.head.*float"):
        compose("head", {"head": np.zeros((4, 4, 3))})
    with pytest.raises(UserError, match="canvas"):
        compose("three", {})


class Cameras(EpisodeSource):
    """One episode of three cameras in memory; every decoded frame is counted."""

    root, info, fps, tasks, layout = Path("memory"), {}, 50.0, ["stack"], "memory"

    def __init__(self, *names: str) -> None:
        generator = np.random.default_rng(0)
        self.video = {
            f"observation.images.{name}": generator.integers(0, 256, (40, 24, 32, 3), np.uint8) for name in names
        }
        self.features = {key: {"dtype": "video", "shape": [24, 32, 3], "names": None} for key in self.video}
        self.episodes = [None]  # type: ignore[list-item]
        self.decoded = 0

    def episode(self, index: int) -> Any:
        return SimpleNamespace(length=40, index=index)

    def columns(self, index: int) -> dict[str, Any]:
        return {}

    def frames(self, index: int, indices: Any = None, key: str = "") -> np.ndarray:
        wanted = self._wanted(index, indices)
        self.decoded += len(wanted)
        return self.video[key][wanted]

    def content_hash(self, index: int) -> str:
        return "abc"


def test_a_dataset_with_three_cameras_is_seen_as_one_picture_and_decodes_what_is_asked_for() -> None:
    source = Cameras("cam_high", "cam_left_wrist", "cam_right_wrist")
    seen = CanvasEpisodes(source, "robotwin")
    steps = list(range(0, 33, 4))
    made = seen.frames(0, steps)
    assert made.shape == (9, 384, 320, 3) and source.decoded == 3 * 9
    for place, step in enumerate(steps):
        pictures = {key.removeprefix("observation.images."): rows[step] for key, rows in source.video.items()}
        assert np.array_equal(made[place], compose("robotwin", pictures))
    assert seen.ground_truth_path(0) is None
    assert seen.content_hash(0) != CanvasEpisodes(Cameras("image", "wrist_image"), "libero").content_hash(0)
    with pytest.raises(UserError, match=r"canvas.*right_wrist"):
        CanvasEpisodes(Cameras("head", "left_wrist"), "robotwin")


@pytest.mark.parametrize("changed", ["layout", "version", "camera"])
def test_what_changes_the_pixels_of_a_canvas_changes_what_its_episodes_are(monkeypatch, changed: str) -> None:
    source = Cameras("image", "agentview", "wrist_image")
    before = CanvasEpisodes(source, "libero").content_hash(0)
    monkeypatch.setitem(canvas.ALIASES, "head", (*canvas.ALIASES["head"], "another"))
    assert CanvasEpisodes(source, "libero").content_hash(0) == before, "nothing that it shows"
    if changed == "layout":
        tiles = ((0, 224, 224, 224), (0, 0, 224, 224))
        monkeypatch.setitem(canvas.CANVASES, "libero", dataclasses.replace(canvas.CANVASES["libero"], tiles=tiles))
    elif changed == "version":
        monkeypatch.setattr(canvas, "VERSION", canvas.VERSION + 1)
    else:
        monkeypatch.setitem(canvas.ALIASES, "image", ("agentview", "image"))
    assert CanvasEpisodes(source, "libero").content_hash(0) != before


def test_a_store_of_another_version_of_a_canvas_is_not_mixed_with_new_ones() -> None:
    options = {"kind": "wan", "latents": "a", "text": "b", "channels": 8, "stride": (4, 16, 16), "conditioned": False}
    new, old = (StoreInfo(**options, fps=12.5, canvas="libero", canvas_digest=one) for one in ("0123", ""))
    assert check_same({Path("new"): new, Path("another"): new}) == new
    with pytest.raises(UserError, match=r"canvas_digest of old: got '', wanted '0123'.*again"):
        check_same({Path("new"): new, Path("old"): old})


def test_settings_of_a_canvas_are_checked() -> None:
    WindowSettings(canvas="libero").check_windows()
    with pytest.raises(UserError, match="canvas"):
        WindowSettings(canvas="three").check_windows()
    with pytest.raises(UserError, match="camera"):
        WindowSettings(canvas="libero", camera="image").check_windows()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("robotwin", [(240, 320)] * 3),
        ("robotwin", [(480, 640), (100, 333), (128, 160)]),
        ("libero", [(256, 256), (97, 41)]),
        ("robotwin", [(320, 240), (640, 480), (1280, 720)]),
    ],
)
def test_a_canvas_made_by_whole_numbers_has_pillows_bytes(name: str, sizes: list[tuple[int, int]]) -> None:
    """What a GPU computes, here on the CPU: smooth pictures, noise, black and white stripes, and both extremes."""
    draw = np.random.default_rng(0)
    for kind in range(4):
        pictures = {}
        for camera, (height, width) in zip(canvas.CANVASES[name].names, sizes, strict=True):
            noise = draw.integers(0, 256, (height, width, 3))
            rows, columns = np.mgrid[:height, :width]
            ramp = np.stack([rows + columns, 2 * rows, columns], 2) % 256
            stripes = np.repeat(255 * ((rows + columns) % 2)[..., None], 3, 2)
            pictures[camera] = np.stack([noise, ramp, stripes, np.full_like(noise, 255)])[kind].astype(np.uint8)
        made = compose_on(torch.device("cpu"), name, pictures)
        assert made.dtype == np.uint8 and np.array_equal(made, compose(name, pictures))


def test_a_canvas_of_one_camera_is_made_as_ever_and_mistakes_are_found() -> None:
    head = {"head": np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)}
    assert np.array_equal(compose_on(torch.device("cpu"), "head", head), compose("head", head))
    with pytest.raises(UserError, match="canvas"):
        compose_on(torch.device("cpu"), "robotwin", head)
