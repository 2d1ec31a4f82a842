"""LeRobot v3 datasets without LeRobot: pyarrow and PyAV only.

Reads datasets written here (one mp4 and one parquet an episode) and by LeRobot itself (many episodes in one file).
Opening a dataset checks that every file it names is there and, where its size was recorded, complete: a truncated video is
refused before anything is trained on it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lerobot_format as fmt
from .digests import file_sha256
from .episodes import EpisodeSource
from .errors import DatasetError
from .lerobot_format import GROUND_TRUTH_PATH, HEAD, EpisodeInfo, robot_features
from .lerobot_writer import LeRobotWriter
from .video import count_frames, probe_mp4, read_mp4

__all__ = ["GROUND_TRUTH_PATH", "HEAD", "EpisodeInfo", "LeRobotDataset", "LeRobotWriter", "robot_features"]


class LeRobotDataset(EpisodeSource):
    """An opened LeRobot v3 dataset.

    ``cache_episodes``: how many decoded episodes to keep in memory (0: decode only the frames asked for, each time).
    ``DatasetError`` names the file and the fix when something is missing, truncated or contradictory.
    """

    layout = "LeRobot v3"

    def __init__(self, root: str | Path, *, cache_episodes: int = 0) -> None:
        self.root = Path(root)
        self.info = self._load_info()
        self.features = self.info["features"]
        self._refuse_embedded_images()
        self.fps = float(self.info["fps"])
        self.tasks = self._load_tasks()
        self.episodes = self._load_episodes()
        self._cache_episodes = cache_episodes
        self._frames: OrderedDict[tuple[int, str], NDArray[np.uint8]] = OrderedDict()
        self._columns: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._check_files()

    def _load_info(self) -> dict[str, Any]:
        path = self.root / fmt.INFO_PATH
        if not path.is_file():
            staged = (self.root / "staging").is_dir()
            fix = "run the same collect command again to finish it" if staged else "collect one or correct the path"
            got = "an unfinished collection" if staged else "no such file"
            raise DatasetError(str(path), got=got, wanted="a LeRobot v3 dataset", fix=fix)
        info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = str(info.get("codebase_version"))
        if not version.startswith("v3."):
            fix = f"convert it: physis data prepare <OUT> {self.root}"
            raise DatasetError(str(path), got=version, wanted="codebase_version v3.x", fix=fix)
        return info

    def _load_tasks(self) -> list[str]:
        return fmt.read_tasks(self.root / fmt.TASKS_PATH)

    def _load_episodes(self) -> list[EpisodeInfo]:
        folder = self.root / "meta" / "episodes"
        paths = sorted(folder.glob("*/*.parquet"))
        if not paths:
            fix = "copy meta/episodes again from its source"
            raise DatasetError(
                str(folder), got="no parquet file", wanted="meta/episodes/chunk-000/file-000.parquet", fix=fix
            )
        rows = []
        for path in paths:
            table = fmt.read_table(path)
            rows += table.select([c for c in table.column_names if not c.startswith("stats/")]).to_pylist()
        rows.sort(key=lambda row: row["episode_index"])
        total = self.info.get("total_episodes", len(rows))
        if [row["episode_index"] for row in rows] != list(range(total)):
            raise DatasetError(
                str(folder),
                got=f"{len(rows)} episodes",
                wanted=f"episodes 0..{total - 1} that {fmt.INFO_PATH} announces",
                fix="run the same collect command again to finish it, or copy meta/ again",
            )
        return [self._episode(row) for row in rows]

    @staticmethod
    def _episode(row: dict[str, Any]) -> EpisodeInfo:
        extra = {name: row.get(name, default) for name, default in fmt.EPISODE_COLUMNS.items()}
        tasks = row.get("tasks") or [""]
        return EpisodeInfo(index=row["episode_index"], length=row["length"], instruction=tasks[0], row=row, **extra)

    def data_path(self, index: int) -> Path:
        row = self.episode(index).row
        where = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"], "episode_index": index}
        return fmt.inside(self.root, self.info.get("data_path", fmt.DATA_PATH).format(**where))

    def video_path(self, index: int, key: str = HEAD) -> Path:
        row = self.episode(index).row
        self._check_key(key)
        where = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        template = self.info.get("video_path", fmt.VIDEO_PATH)
        return fmt.inside(self.root, template.format(video_key=key, episode_index=index, **where))

    def ground_truth_path(self, index: int) -> Path | None:
        """The episode's simulator truth, or None where it was not recorded."""
        path = self.root / GROUND_TRUTH_PATH.format(**fmt.place(self.episode(index).index))
        return path if path.is_file() else None

    def content_hash(self, index: int) -> str:
        """SHA-256 of what the episode holds, equal in any dataset that holds it: part of the keys of caches."""
        recorded = self.episode(index).content_sha256
        if recorded:
            return recorded
        files = [self.video_path(index, key) for key in self.video_keys]
        digest = hashlib.sha256(f"{index}".encode())
        for path in [self.data_path(index), *files]:
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()

    def columns(self, index: int) -> dict[str, NDArray[Any]]:
        """All columns but the videos of one episode: [T,A] or [T]. Treat them as read-only: they are cached."""
        if index in self._columns:
            self._columns.move_to_end(index)
            return self._columns[index]
        path = self.data_path(index)
        table = fmt.read_table(path, filters=[("episode_index", "=", index)])
        length = self.episode(index).length
        if table.num_rows != length:
            fix = "copy the file again from its source, or collect the episode again"
            raise DatasetError(
                str(path), got=f"{table.num_rows} rows", wanted=f"{length} rows of episode {index}", fix=fix
            )
        columns = {name: _to_numpy(table[name]) for name in table.column_names}
        for values in columns.values():
            values.flags.writeable = False
        self._columns[index] = columns
        while len(self._columns) > 256:
            self._columns.popitem(last=False)
        return columns

    def frames(self, index: int, indices: Sequence[int] | None = None, key: str = HEAD) -> NDArray[np.uint8]:
        """RGB uint8 [T,H,W,3] of one episode: all frames, or those at ``indices`` (any order, repeats allowed)."""
        episode = self.episode(index)
        path = self.video_path(index, key)
        wanted = self._wanted(index, indices)
        offset = round(episode.row[f"videos/{key}/from_timestamp"] * self.fps)
        if self._cache_episodes <= 0:
            return read_mp4(path, [offset + i for i in wanted])
        if (index, key) not in self._frames:
            self._frames[index, key] = read_mp4(path, range(offset, offset + episode.length))
            while len(self._frames) > self._cache_episodes:
                self._frames.popitem(last=False)
        self._frames.move_to_end((index, key))
        return self._frames[index, key][wanted]

    def _check_files(self) -> None:
        checked: set[Path] = set()
        fix = "copy the file again from its source, or delete the dataset and collect it again"
        for episode in self.episodes:
            files = {self.data_path(episode.index): episode.row.get("data/bytes")}
            for key in self.video_keys:
                files[self.video_path(episode.index, key)] = episode.row.get(f"videos/{key}/bytes")
            for path, size in files.items():
                if path in checked:
                    continue
                checked.add(path)
                if not path.is_file():
                    wanted = f"the file of episode {episode.index}"
                    raise DatasetError(str(path), got="no such file", wanted=wanted, fix=fix)
                if size is not None and path.stat().st_size != size:
                    got, wanted = f"{path.stat().st_size} bytes", f"the {size} bytes of episode {episode.index}"
                    raise DatasetError(str(path), got=got, wanted=f"{wanted} (truncated or replaced)", fix=fix)

    def verify(self) -> dict[str, int]:
        """Read every row and decode every frame. Returns counts; ``DatasetError`` names the first file that is wrong."""
        counts = {"episodes": len(self), "frames": 0, "videos": 0}
        decoded: dict[Path, int] = {}
        for episode in self.episodes:
            columns = self.columns(episode.index)
            counts["frames"] += len(columns["frame_index"])
            for key in self.video_keys:
                path = self.video_path(episode.index, key)
                if path not in decoded:
                    decoded[path] = count_frames(path)
                    counts["videos"] += 1
                start = round(episode.row[f"videos/{key}/from_timestamp"] * self.fps)
                alone = episode.row.get(f"videos/{key}/bytes") is not None
                enough = decoded[path] == episode.length if alone else decoded[path] >= start + episode.length
                if not enough:
                    raise DatasetError(
                        str(path),
                        got=f"{decoded[path]} frames (header: {probe_mp4(path).frames})",
                        wanted=f"{start + episode.length} frames for episode {episode.index}",
                        fix="copy the video again from its source, or collect the episode again",
                    )
        return counts


def _to_numpy(column: Any) -> NDArray[Any]:
    import pyarrow as pa

    array = column.combine_chunks()
    kind = array.type
    if pa.types.is_fixed_size_list(kind):
        return np.array(array.flatten().to_numpy(zero_copy_only=False)).reshape(len(array), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return np.array(array.to_pylist())
    return np.array(array.to_numpy(zero_copy_only=False))
