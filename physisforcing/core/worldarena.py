"""WorldArena's folder layout of demonstrations: ``<task>/aloha-agilex_clean_50/aloha-agilex_clean_50/{actions,states,video,instructions}``.

``actions/episodeN.npy`` is RoboTwin's vector of drive targets at frame t, the same as our ``observation.state``; our ``action`` of row t
is its row t + 1. ``states/episodeN.npy`` does not say what its columns are (``planner/worldarena_states.py``): where our exporter wrote
them, the file beside the tasks does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .digests import file_sha256
from .episodes import EpisodeSource
from .errors import DatasetError, UserError
from .hdf5_robotwin import joint_names
from .lerobot_format import HEAD, INDEX_FEATURES, EpisodeInfo, video_feature
from .video import probe_mp4, read_mp4

CONFIG = "aloha-agilex_clean_50"
#: Written by our exporter beside the tasks: what the columns are, where each episode came from, what was generated.
SIDECAR, SIDECAR_SCHEMA = "physisforcing_export.json", "physisforcing.worldarena_export/1"
METADATA = "robotwin_metadata.json"
#: Folders of an episode's sentence and, in the benchmark's sets, two others for the same picture.
PROMPTS = ("instructions", "instructions_1", "instructions_2")
#: Numbers of the episodes that are trained on, and of those held out.
TRAIN_NUMBERS, TEST_NUMBERS = range(40), range(40, 50)
FIX = "copy the file again from its source, or leave the episode out"


def demo_folder(root: Path, task: str) -> Path:
    """Where the folders of a task's episodes are."""
    return root / task / CONFIG / CONFIG


def demo_folders(root: Path) -> dict[str, Path]:
    """Task -> folder, of the tasks below ``root`` that have videos and actions."""
    found = {path.name: demo_folder(root, path.name) for path in sorted(root.glob("*")) if path.is_dir()}
    return {task: place for task, place in found.items() if (place / "video").is_dir() and (place / "actions").is_dir()}


def episode_numbers(folder: Path) -> list[int]:
    """Numbers N of ``video/episodeN.mp4``, in the order of numbers (a sorted list of names has 10 before 2)."""
    found = (re.fullmatch(r"episode(\d+)", path.stem) for path in (folder / "video").glob("episode*.mp4"))
    return sorted(int(match[1]) for match in found if match)


# ------------------------------------------------------------------------------------------------- names of their windows


def cache_name(number: int, start: int) -> str:
    """Name of a cached window in ``predata_vidar/``, by the episode's own NUMBER."""
    return f"episode{number}_chunk{start:06d}_vidar.pth"


def metadata_rows(root: Path) -> list[dict[str, Any]]:
    """``robotwin_metadata.json`` of a folder: absolute paths in the order of sorted names, as their script writes it."""
    rows = []
    for folder in demo_folders(root.resolve()).values():
        for path in sorted((folder / "video").glob("episode*.mp4")):
            rows.append({"video_path": str(path), "n_frames": probe_mp4(path).frames})
    return rows


def list_numbers(metadata: Sequence[Mapping[str, Any]], task: str, below: int | None = None) -> list[int]:
    """Episode NUMBER at each LIST INDEX of ``task`` in a metadata file.

    Their released data engine names its files by the list index, their cached windows by the number, and the list is sorted by name:
    index 2 is episode 10. ``below``: only episodes with smaller numbers are listed there (theirs: 25).
    """
    numbers = []
    for row in metadata:
        path = Path(str(row["video_path"]))
        match = re.fullmatch(r"episode(\d+)", path.stem)
        if match and len(path.parts) >= 5 and path.parts[-5] == task and (below is None or int(match[1]) < below):
            numbers.append(int(match[1]))
    return numbers


# ----------------------------------------------------------------------------------------------------------------- reader


class WorldArenaDataset(EpisodeSource):
    """An opened folder in this layout. Episodes are in the order of task and number; ``DatasetError`` names a file that is missing or
    does not fit. ``info["states"]``: layout of the states' columns where the folder says it, else empty.
    """

    layout = "WorldArena"

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._told = read_sidecar(self.root)
        self._places = list(self._find())
        if not self._places:
            wanted = f"<task>/{CONFIG}/{CONFIG}/video/episode0.mp4 with actions beside it"
            raise DatasetError(str(root), got="no episodes", wanted=wanted, fix="correct the path")
        self._joints = [self._numbers(index, "actions", 14) for index in range(len(self._places))]
        videos = [probe_mp4(self._path(index, "video")) for index in range(len(self._places))]
        self._check(videos)
        self.fps = float(self._told.get("fps") or videos[0].fps)
        names = list(joint_names(6, 6))
        self.features: dict[str, dict[str, Any]] = {
            HEAD: video_feature(videos[0].height, videos[0].width, self.fps),
            "observation.state": {"dtype": "float32", "shape": [14], "names": names},
            "action": {"dtype": "float32", "shape": [14], "names": names},
        } | INDEX_FEATURES
        sentences = [self._sentence(index) for index in range(len(self._places))]
        self.tasks = list(dict.fromkeys(sentences))
        self._starts = np.cumsum([0, *(len(joints) for joints in self._joints)])
        comments = [video.metadata.get("comment", "") for video in videos]
        self.episodes = [self._info(i, *about) for i, about in enumerate(zip(sentences, comments, strict=True))]
        states = self._told.get("states", {})
        self.info = {"fps": self.fps, "features": self.features, "robot_type": "aloha-agilex", "states": states}

    def _find(self) -> Iterator[tuple[str, int]]:
        for task, folder in demo_folders(self.root).items():
            for number in episode_numbers(folder):
                yield task, number

    def _path(self, index: int, kind: str) -> Path:
        task, number = self._places[index]
        ending = {"video": "mp4", "actions": "npy", "states": "npy", "data": "hdf5"}.get(kind, "json")
        return demo_folder(self.root, task) / kind / f"episode{number}.{ending}"

    def _numbers(self, index: int, kind: str, width: int | None) -> NDArray[np.float32]:
        path = self._path(index, kind)
        if not path.is_file():
            raise DatasetError(str(path), got="no such file", wanted=f"the {kind} of the episode", fix=FIX)
        try:
            # Mapped: a header that announces more numbers than the file holds is refused, and nothing is allocated for it.
            rows = np.load(path, allow_pickle=False, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            raise DatasetError(str(path), got=str(error)[:120], wanted="numbers in an npy file", fix=FIX) from error
        fits = rows.ndim == 2 and len(rows) and (width is None or rows.shape[1] == width) and rows.dtype.kind == "f"
        if not fits or not np.isfinite(rows).all():
            got = f"{rows.dtype} {list(rows.shape)}" if not fits else "NaN or infinity"
            raise DatasetError(str(path), got=got, wanted=f"finite numbers [T,{width or 'any'}]", fix=FIX)
        return np.array(rows, np.float32)

    def _check(self, videos: Sequence[Any]) -> None:
        first = videos[0]
        for index, video in enumerate(videos):
            path, count = self._path(index, "video"), len(self._joints[index])
            if video.frames != count:
                wanted = f"{count}, one for each row of actions"
                raise DatasetError(str(path), got=f"{video.frames} pictures", wanted=wanted, fix=FIX)
            for name in ("height", "width", "fps"):
                mine, theirs = getattr(video, name), getattr(first, name)
                if mine != theirs:
                    fix = "keep videos of one size and rate in a folder"
                    raise DatasetError(f"{path} {name}", got=mine, wanted=f"{theirs} as the first video", fix=fix)

    def _sentence(self, index: int) -> str:
        return read_sentence(self._path(index, PROMPTS[0]))

    def _info(self, index: int, sentence: str, comment: str) -> EpisodeInfo:
        task, number = self._places[index]
        told = self.source(index)
        return EpisodeInfo(
            index=index,
            length=len(self._joints[index]),
            instruction=sentence,
            task_name=task,
            seed=int(told.get("seed", -1)),
            success=told.get("success"),
            scene_hash=str(told.get("scene_hash", "")),
            policy=str(told.get("label", "")),
            embodiment="aloha-agilex",
            assets_version="",
            runtime="",
            content_sha256="",
            key="",
            row={"number": number, "generated": bool(told.get("generated", False)), "comment": comment},
        )

    def source(self, index: int) -> dict[str, Any]:
        """Where the episode came from, as our exporter wrote it; empty in other folders."""
        task, number = self._places[index]
        rows = self._told.get("episodes", [])
        return next((row for row in rows if row["task"] == task and row["number"] == number), {})

    def prompts(self, index: int) -> list[str]:
        """The episode's sentence and the other ones that the folder has for it."""
        return [read_sentence(path) for kind in PROMPTS if (path := self._path(index, kind)).is_file()]

    def states(self, index: int) -> NDArray[np.float32]:
        """``states/episodeN.npy`` [T,16] or [T,14], one row a frame."""
        rows = self._numbers(index, "states", None)
        if len(rows) != len(self._joints[index]):
            path, wanted = self._path(index, "states"), f"{len(self._joints[index])}, one for each row of actions"
            raise DatasetError(str(path), got=f"{len(rows)} rows", wanted=wanted, fix=FIX)
        return rows

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        episode, joints = self.episode(index), self._joints[index]
        count = np.arange(episode.length)
        return {
            "observation.state": joints,
            "action": np.concatenate([joints[1:], joints[-1:]]),
            "timestamp": (count / self.fps).astype(np.float32),
            "frame_index": count,
            "episode_index": np.full(episode.length, index),
            "index": self._starts[index] + count,
            "task_index": np.full(episode.length, self.tasks.index(episode.instruction)),
        }

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        self._check_key(key)
        return read_mp4(self._path(index, "video"), self._wanted(index, indices))

    def content_hash(self, index: int) -> str:
        digest = hashlib.sha256(self.episode(index).instruction.encode())
        for kind in ("actions", "video"):
            digest.update(file_sha256(self._path(index, kind)).encode())
        return digest.hexdigest()


def read_sentence(path: Path) -> str:
    """The sentence of an instructions file. ``DatasetError`` where there is none."""
    wanted, fix = '{"instruction": "a sentence"}', FIX
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(str(path), got=str(error)[:120], wanted=wanted, fix=fix) from error
    sentence = content.get("instruction") if isinstance(content, dict) else None
    if not isinstance(sentence, str) or not sentence.strip():
        raise DatasetError(str(path), got=str(content)[:120], wanted=wanted, fix=fix)
    return sentence


def read_sidecar(root: Path) -> dict[str, Any]:
    """What our exporter wrote about a folder; empty where it did not write it."""
    path = root / SIDECAR
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(str(path), got=str(error), wanted=SIDECAR_SCHEMA, fix=FIX) from error
    if not isinstance(content, dict) or content.get("schema") != SIDECAR_SCHEMA:
        got = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise UserError(str(path), got=got, wanted=SIDECAR_SCHEMA, fix="export again with this version")
    return content
