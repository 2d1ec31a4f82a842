"""What a latent store is cut out of: datasets of any known layout, or filtered clips, seen at the size of a bucket."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.episodes import EpisodeSource
from physisforcing.core.errors import UserError, unknown_name
from physisforcing.core.lerobot_format import HEAD, EpisodeInfo
from physisforcing.core.readers import open_dataset

from .canvas import canvas_cameras, canvas_digest, canvas_layout, compose
from .clips.decode import Span, cover, sample
from .clips.manifest import NAME, ClipManifest

#: Before the names of cameras in datasets.
CAMERA = "observation.images."


class ClipEpisodes(EpisodeSource):
    """The kept clips of ``physis data prepare OUT IN to=clips``: each is an episode of ``fps`` frames a second, its caption the instruction.

    There are pictures alone: no states, no actions, no ground truth.
    """

    layout = "clips"

    def __init__(self, root: str | Path, fps: float) -> None:
        self.manifest, self.root, self.fps = ClipManifest(root), Path(root), fps
        self.info: dict[str, Any] = {}
        self.features: dict[str, dict[str, Any]] = {HEAD: {"dtype": "video", "shape": [0, 0, 3], "names": None}}
        self.tasks = sorted({clip.caption for clip in self.manifest.clips})
        self.episodes = [
            EpisodeInfo(
                index=index, length=self._frames_of(index), instruction=clip.caption, task_name=clip.task, seed=-1,
                success=None, scene_hash="", policy="", embodiment="", assets_version="", runtime="",
                content_sha256=clip.id, key=clip.id, row={},
            )
            for index, clip in enumerate(self.manifest.clips)
        ]  # fmt: skip

    def _frames_of(self, index: int) -> int:
        """Frames at ``fps`` that lie within a clip."""
        clip = self.manifest.clips[index]
        return max(1, int((clip.seconds - 0.5 / clip.fps) * self.fps + 1e-6) + 1) if clip.fps else 1

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        """None: clips have no states and no actions."""
        self.episode(index)
        return {}

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        """See ``EpisodeSource``: the stored frames nearest to ``i / fps`` seconds."""
        self._check_key(key)
        wanted = self._wanted(index, indices)
        steps, places = np.unique(wanted, return_inverse=True)
        clip = self.manifest.clips[index]
        span = Span(path=self.manifest.video(index), start=clip.start, seconds=clip.seconds)
        return sample(span, (steps / self.fps).tolist())[places]

    def content_hash(self, index: int) -> str:
        """Of the piece of video and the rate at which it is seen; a caption that is corrected leaves its targets as they are."""
        return hashlib.sha256(f"{self.manifest.clips[index].id} {self.fps!r}".encode()).hexdigest()


class RememberedFrames(EpisodeSource):
    """A source whose pictures are not decoded again once they were shown: for a few windows, since all of them stay in memory."""

    def __init__(self, source: EpisodeSource) -> None:
        self.source, self.root, self.info, self.fps = source, source.root, source.info, source.fps
        self.tasks, self.episodes, self.layout, self.features = (
            source.tasks, source.episodes, source.layout, source.features,
        )  # fmt: skip
        self._shown: dict[tuple[int, str, int], NDArray[np.uint8]] = {}

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        return self.source.columns(index)

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        """See ``EpisodeSource``."""
        wanted = self._wanted(index, indices)
        if missing := sorted({step for step in wanted if (index, key, step) not in self._shown}):
            made = self.source.frames(index, missing, key)
            self._shown |= {(index, key, step): picture for step, picture in zip(missing, made, strict=True)}
        return np.stack([self._shown[index, key, step] for step in wanted])

    def ground_truth_path(self, index: int) -> Path | None:
        return self.source.ground_truth_path(index)

    def content_hash(self, index: int) -> str:
        return self.source.content_hash(index)


class SizedEpisodes(EpisodeSource):
    """One camera of a source, its pictures scaled to cover ``size`` (H, W) and cut at the centre."""

    def __init__(self, source: EpisodeSource, size: tuple[int, int], camera: str) -> None:
        self.source, self.size, self.camera = source, size, camera
        self.root, self.info, self.fps = source.root, source.info, source.fps
        self.tasks, self.episodes, self.layout = source.tasks, source.episodes, source.layout
        self.features = {HEAD: {"dtype": "video", "shape": [*size, 3], "names": None}}

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        return self.source.columns(index)

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        """See ``EpisodeSource``."""
        self._check_key(key)
        return np.stack([cover(picture, self.size) for picture in self.source.frames(index, indices, self.camera)])

    def content_hash(self, index: int) -> str:
        """Of what the source holds, the camera and the size."""
        seen = f"{self.source.content_hash(index)} {self.camera} {self.size[0]}x{self.size[1]}"
        return hashlib.sha256(seen.encode()).hexdigest()


class CanvasEpisodes(EpisodeSource):
    """Several cameras of a source as one picture (``canvas.compose``), under the head camera's key. It has no ground truth: the simulator's
    points are those of one camera's picture."""

    def __init__(self, source: EpisodeSource, canvas: str, prefix: str = "") -> None:
        keys = {key.removeprefix(CAMERA): key for key in source.video_keys}
        layout = canvas_layout(canvas, prefix)
        self.source, self.canvas = source, canvas
        cameras = canvas_cameras(canvas, keys, prefix)
        self._keys = {name: keys[name] for name in cameras.values()}
        self._seen = f"canvas {canvas_digest(canvas)} of {json.dumps(cameras)}"
        self.root, self.info, self.fps = source.root, source.info, source.fps
        self.tasks, self.episodes, self.layout = source.tasks, source.episodes, source.layout
        self.features = {HEAD: {"dtype": "video", "shape": [layout.height, layout.width, 3], "names": None}}

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        return self.source.columns(index)

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        """See ``EpisodeSource``; only the frames asked for are decoded."""
        self._check_key(key)
        shown = {name: self.source.frames(index, indices, stored) for name, stored in self._keys.items()}
        count = len(next(iter(shown.values())))
        return np.stack([compose(self.canvas, {name: rows[k] for name, rows in shown.items()}) for k in range(count)])

    def content_hash(self, index: int) -> str:
        """Of what the source holds, what the canvas makes of pictures, and which camera is which."""
        return hashlib.sha256(f"{self.source.content_hash(index)} {self._seen}".encode()).hexdigest()


def open_source(root: str | Path, fps: float, canvas: str = "", prefix: str = "") -> EpisodeSource:
    """A folder of filtered clips, seen at ``fps``, or a dataset of any known layout, which has its own rate; with a ``canvas`` its cameras are
    one picture. ``prefix``: before the names of settings in messages."""
    clips = (Path(root) / NAME).is_file()
    if clips and canvas:
        wanted, fix = "datasets with several cameras", f"leave {prefix}canvas out"
        raise UserError(f"{prefix}canvas", got=f"{canvas} of clips", wanted=wanted, fix=fix)
    if clips:
        return ClipEpisodes(root, fps)
    source = open_dataset(root)
    return CanvasEpisodes(source, canvas, prefix) if canvas else source


def camera_of(source: EpisodeSource, camera: str | None, prefix: str = "") -> str:
    """The key of a camera by its name; None is the head camera, or the only one. ``UserError`` where that leaves a choice, with ``prefix`` before
    the name of the setting."""
    names = {key.removeprefix(CAMERA): key for key in source.video_keys}
    if camera is not None:
        if camera.removeprefix(CAMERA) not in names:
            raise unknown_name(f"{prefix}camera", camera, names, see=str(source.root))
        return names[camera.removeprefix(CAMERA)]
    if HEAD in source.video_keys:
        return HEAD
    if len(names) != 1:
        got, fix = f"{len(names)} cameras in {source.root}", f"{prefix}camera= and one of {', '.join(sorted(names))}"
        raise UserError(f"{prefix}camera", got=got, wanted="one, or a name", fix=fix)
    return next(iter(names.values()))
