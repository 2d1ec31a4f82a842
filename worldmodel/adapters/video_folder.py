"""Videos that were generated beforehand as a ``WorldModel``: each answer is looked up by (task, episode seed, number of the plan).

``manifest.json`` in the folder: ``{"format": "physis-videos-1", "name", "fps", "frames", "height", "width", "camera", "resize", "videos":
[{"task", "seed", "replan", "files": ["a.mp4", ...], "instruction"}, ...]}``. File i of an entry answers candidate i. Nothing is guessed: an
id that is not there, a second entry for one id, a file outside the folder and a video of another length are errors.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.digests import file_sha256
from physisforcing.core.errors import MissingCapabilityError, UserError
from physisforcing.core.files import replace_text
from physisforcing.core.requests import check_request
from physisforcing.core.results import config_hash
from physisforcing.core.types import Rollout, RolloutRequest, ViewLayout, WorldModelSpec
from physisforcing.core.video import read_mp4, write_mp4

from .fitting import POLICIES, take_back

FORMAT = "physis-videos-1"
VideoId = tuple[str, int, int]


@dataclass(slots=True, kw_only=True)
class VideoEntry:
    """The videos of one id, one a candidate. ``instruction``: if given, a request must say the same."""

    task: str
    seed: int
    replan: int
    files: list[str]
    instruction: str | None = None

    @property
    def id(self) -> VideoId:
        return self.task, self.seed, self.replan


@dataclass(slots=True, kw_only=True)
class VideoManifest:
    """``height`` x ``width``: the world model's view. ``resize``: how videos of another size come to it (stretch or letterbox); null: they
    must have it. ``fps`` is the truth, whatever the files' headers say. ``context_tolerance``: grey levels on average by which the first
    frame of a video may differ from the picture that it answers to."""

    name: str
    fps: float
    frames: int
    height: int
    width: int
    camera: str = "head"
    resize: str | None = None
    context_tolerance: float = 30.0
    format: str = FORMAT
    videos: list[VideoEntry] = field(default_factory=list)


class VideoFolderWorldModel:
    """Serves the videos of a folder (see the module's docstring). The seed of a request changes nothing; its ids say everything."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.entries = _by_id(self.manifest, self.folder)
        m = self.manifest
        files = {name: file_sha256(self.folder / name) for entry in m.videos for name in entry.files}
        self._spec = WorldModelSpec(
            name=m.name,
            views=ViewLayout(names=(m.camera,), height=m.height, width=m.width),
            context_frames=1,
            horizons=(m.frames,),
            frame_dt=1.0 / m.fps,
            conditions=frozenset(),
            returns=frozenset({"frames"}),
            fingerprint=config_hash({"manifest": asdict(m), "files": files}),
        )

    @property
    def spec(self) -> WorldModelSpec:
        return self._spec

    def rollout(self, request: RolloutRequest) -> Rollout:
        """See core's ``WorldModel``. Raises ``UserError`` naming the id that has no video, or another instruction or first picture."""
        check_request(request, self._spec)
        begun = time.perf_counter()
        if request.ids is None:
            fix = "plan with a planner that passes ids, as physis eval plan does"
            raise UserError("ids", got=None, wanted="(task, seed, plan) of each context", fix=fix)
        if request.plan_steps is not None and any(request.plan_steps):
            got, wanted = f"a rollout that starts {max(request.plan_steps)} control steps into a plan", "whole plans"
            fix = "planner.rollout_chunks=1: a folder holds one video of each plan, and nothing that goes on from it"
            raise MissingCapabilityError("plan_steps", got=got, wanted=wanted, fix=fix)
        samples, videos, worst = request.seeds_BS.shape[1], [], 0.0
        for row, (name, instruction) in enumerate(zip(request.ids, request.instructions, strict=True)):
            entry = self._entry(name, instruction, samples)
            for file in entry.files[:samples]:
                video = self._video(file, entry.id)
                gap = float(np.abs(video[0].astype(np.int16) - request.context_BVTHWC[row, 0, 0]).mean())
                self._check_start(gap, file, entry.id)
                worst, videos = max(worst, gap), [*videos, video]
        frames = np.stack(videos).reshape(*request.seeds_BS.shape, 1, *videos[0].shape)
        return Rollout(
            times_T=np.arange(request.horizon) * self._spec.frame_dt,
            frames_BSVTHWC=frames,
            cost={"seconds": time.perf_counter() - begun, "first_frame_difference": worst},
        )

    def examples(self) -> list[RolloutRequest]:
        """Requests that can be answered, for the contract suite: the first frames of up to four videos."""
        return [
            RolloutRequest(
                context_BVTHWC=self._video(entry.files[0], entry.id)[None, None, :1],
                instructions=[entry.instruction or ""],
                seeds_BS=np.zeros((1, 1), np.int64),
                horizon=self.manifest.frames,
                ids=[entry.id],
            )
            for entry in self.manifest.videos[:4]
        ]

    def _entry(self, name: VideoId, instruction: str, samples: int) -> VideoEntry:
        task, seed, replan = name
        entry = self.entries.get((str(task), int(seed), int(replan)))
        if entry is None:
            got = f"task {task}, seed {seed}, plan {replan}"
            known = sorted(plan for t, s, plan in self.entries if (t, s) == (task, seed))
            held = f"plans {known} of this episode" if known else f"{len(self.entries)} videos, none of this episode"
            fix = f"generate its video and add it to {self.folder / 'manifest.json'}"
            raise UserError("ids", got=got, wanted=f"an id in the manifest, which holds {held}", fix=fix)
        if entry.instruction is not None and instruction != entry.instruction:
            fix = "ask with the instruction that the video was made for"
            raise UserError(f"instructions {entry.id}", got=instruction, wanted=repr(entry.instruction), fix=fix)
        if samples > len(entry.files):
            wanted = f"at most {len(entry.files)}, the videos of {entry.id}"
            raise MissingCapabilityError(
                "candidates", got=samples, wanted=wanted, fix="one file a candidate in 'files'"
            )
        return entry

    def _video(self, file: str, name: VideoId) -> NDArray[np.uint8]:
        video, m = read_mp4(self.folder / file), self.manifest
        if len(video) != m.frames:
            got, wanted = f"{len(video)} frames in {file}", f"{m.frames}, as the manifest says"
            raise UserError(f"video {name}", got=got, wanted=wanted, fix="generate it again, or correct the manifest")
        if video.shape[1:3] == (m.height, m.width):
            return video
        if m.resize is None:
            got, wanted = f"{video.shape[1]}x{video.shape[2]} in {file}", f"{m.height}x{m.width}"
            raise UserError(f"video {name}", got=got, wanted=wanted, fix='"resize": "stretch" or "letterbox"')
        return take_back(video, m.height, m.width, m.resize)

    def _check_start(self, gap: float, file: str, name: VideoId) -> None:
        if gap > self.manifest.context_tolerance:
            got = f"{file}, whose first frame differs by {gap:.1f} grey levels on average from the context"
            fix = "the video of this very picture, or a greater context_tolerance in the manifest"
            raise UserError(f"video {name}", got=got, wanted=f"at most {self.manifest.context_tolerance:g}", fix=fix)


def read_manifest(folder: Path) -> VideoManifest:
    """The manifest of a folder. Raises ``UserError`` for a file that is missing, no JSON, of another format or with unknown fields."""
    from physisforcing.core.config import build

    file = folder / "manifest.json"
    if not file.is_file():
        fix = "see physisforcing.worldmodel.adapters.video_folder"
        raise UserError("videos", got=str(folder), wanted="a folder with manifest.json", fix=fix)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("manifest.json", got=str(file), wanted="JSON", fix=str(error)) from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError("manifest.json", got=f"format {found!r}", wanted=FORMAT, fix="write it as the docs say")
    made = build(VideoManifest, values)
    if not (math.isfinite(made.fps) and made.fps > 0) or made.frames < 2 or min(made.height, made.width) < 1:
        got = f"fps {made.fps}, {made.frames} frames of {made.height}x{made.width}"
        raise UserError("manifest.json", got=got, wanted="a rate, 2 frames or more, a size", fix="correct them")
    if made.resize is not None and made.resize not in POLICIES:
        raise UserError("resize", got=made.resize, wanted=f"{', '.join(POLICIES)} or null", fix="resize=null")
    return made


def _by_id(manifest: VideoManifest, folder: Path) -> dict[VideoId, VideoEntry]:
    """Entries by id, after a look at every file name. Raises ``UserError`` for the first that is wrong."""
    found: dict[VideoId, VideoEntry] = {}
    root = folder.resolve()
    for entry in manifest.videos:
        if entry.id in found:
            raise UserError("videos", got=f"two entries of {entry.id}", wanted="one", fix="remove one, or use 'files'")
        if not entry.files:
            raise UserError(f"video {entry.id}", got="no files", wanted="at least one", fix='"files": ["a.mp4"]')
        for name in entry.files:
            path = (folder / name).resolve()
            if not path.is_relative_to(root):
                raise UserError(f"video {entry.id}", got=name, wanted="a file in the folder", fix="copy it there")
            if not path.is_file():
                fix = "generate it, or leave its entry out"
                raise UserError(f"video {entry.id}", got=f"no file {name}", wanted="a video", fix=fix)
        found[entry.id] = entry
    if not found:
        raise UserError("videos", got="none", wanted="at least one", fix="add entries to manifest.json")
    return found


class VideoFolderWriter:
    """Makes such a folder: ``add`` writes a video, ``close`` the manifest. A folder without manifest is not finished."""

    def __init__(self, folder: Path | str, manifest: VideoManifest) -> None:
        self.folder, self.manifest = Path(folder), manifest

    def add(
        self, name: VideoId, videos_STHWC: NDArray[np.uint8], instruction: str | None = None, source: str = ""
    ) -> None:
        """The candidates of one id; ``source`` (model and fingerprint) goes into the files' metadata."""
        task, seed, replan = name
        files = []
        for sample, video in enumerate(videos_STHWC):
            assert len(video) == self.manifest.frames, f"{len(video)} frames"
            file = f"{task}/{seed}_{replan}_{sample}.mp4"
            comment = f"generated by {source or self.manifest.name}; {task}, seed {seed}, plan {replan}"
            write_mp4(self.folder / file, video, self.manifest.fps, {"comment": comment})
            files.append(file)
        entry = VideoEntry(task=task, seed=seed, replan=replan, files=files, instruction=instruction)
        self.manifest.videos.append(entry)

    def close(self) -> None:
        """Write the manifest."""
        values: dict[str, Any] = asdict(self.manifest)
        replace_text(self.folder / "manifest.json", json.dumps(values, indent=1) + "\n")
