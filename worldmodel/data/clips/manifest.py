"""``clips.jsonl``: one line a clip, kept or dropped, and ``ClipManifest``, with which a trainer reads those that were kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import DatasetError, UserError
from physisforcing.core.files import replace_text

from .decode import Span, sample

NAME = "clips.jsonl"


@dataclass(slots=True, kw_only=True, frozen=True)
class ClipRecord:
    """One line of ``clips.jsonl``.

    ``id``: digest of the video file's content and of the piece of it, so copies of a file have one id wherever they lie. ``path``:
    the video, relative to the folder of the manifest. ``start``: seconds; ``frames``, ``fps``, ``height``, ``width``: of the piece
    as it is stored. ``task``: a name, "" where none is known. ``scores``: what the filters measured. ``kept``; ``reason``: why it
    was dropped, "" when kept; ``detail``: the reason's particulars, such as the id of the clip that this one repeats.
    """

    id: str
    path: str
    start: float
    frames: int
    fps: float
    height: int
    width: int
    caption: str
    task: str
    scores: dict[str, float] = field(default_factory=dict)
    kept: bool = True
    reason: str = ""
    detail: str = ""

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps else 0.0


class ClipManifest:
    """The kept clips of a ``clips.jsonl``, in its order. ``manifest[i]`` is a ``ClipRecord``; ``everything`` has the dropped ones too.

    ``path``: the file or the folder that holds it. ``DatasetError`` names a file that is missing and a line that is no clip.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path) / NAME if Path(path).is_dir() else Path(path)
        self.everything = read_records(self.path)
        self.clips = [record for record in self.everything if record.kept]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> ClipRecord:
        return self.clips[index]

    def fingerprint(self) -> str:
        """SHA-256 over content and captions of the kept clips, their order included."""
        lines = (json.dumps([record.id, record.caption], ensure_ascii=False) for record in self.clips)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def video(self, index: int) -> Path:
        return (self.path.parent / self.clips[index].path).resolve()

    def holds(self, index: int, *, fps: float, num_frames: int, start: float = 0.0) -> bool:
        """Whether a window of ``num_frames`` at ``fps`` from ``start`` s on lies within the clip."""
        return start + (num_frames - 1) / fps <= self.clips[index].seconds - 0.5 / self.clips[index].fps

    def frames(
        self, index: int, *, fps: float, size: tuple[int, int], num_frames: int, start: float = 0.0
    ) -> NDArray[np.uint8]:
        """A training window: RGB uint8 [T,H,W,3] with T = ``num_frames`` = 4k + 1 (the stride of the video autoencoders).

        Frame i is the stored frame nearest to ``start`` + i / ``fps`` seconds; pictures are scaled to cover ``size`` (H, W) and cut
        at the centre. Equal arguments give equal numbers. ``UserError`` for another number of frames and for a window that ends
        after the clip; ``DatasetError`` for a video that is gone or damaged.
        """
        if num_frames < 1 or num_frames % 4 != 1:
            near = max(1, 4 * round((num_frames - 1) / 4) + 1)
            raise UserError("num_frames", got=num_frames, wanted="4k + 1", fix=f"write num_frames={near}")
        if not fps > 0:
            raise UserError("fps", got=fps, wanted="frames a second, above 0", fix="write fps=16")
        record = self.clips[index]
        if start < 0 or not self.holds(index, fps=fps, num_frames=num_frames, start=start):
            raise UserError(
                f"clip {index} ({record.path})",
                got=f"{num_frames} frames at {fps:g}/s from {start:g} s on",
                wanted=f"a window within its {record.seconds:.2f} s",
                fix="ask holds() first, or take fewer frames",
            )
        times = [start + i / fps for i in range(num_frames)]
        return sample(Span(path=self.video(index), start=record.start, seconds=record.seconds), times, size)


def read_records(path: Path) -> list[ClipRecord]:
    """All lines of a ``clips.jsonl``."""
    if not path.is_file():
        fix = "run physis data prepare, or correct the path"
        raise DatasetError(str(path), got="no such file", wanted=f"a {NAME}", fix=fix)
    known, records = {item.name for item in fields(ClipRecord)}, []
    # Not splitlines: the file of a video may have U+2028 and its like in its name.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            records.append(ClipRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DatasetError(
                f"{path} line {number}",
                got=line[:80],
                wanted=f"an object with {', '.join(sorted(known))}",
                fix="write the file again with physis data prepare",
            ) from error
    return records


def write_records(path: Path, records: Iterable[ClipRecord]) -> None:
    """Write the lines; a reader sees the old file or the whole new one."""
    lines = [json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) for record in records]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def relative(path: Path, folder: Path) -> str:
    """``path`` as it is written into a manifest in ``folder``."""
    # Not Path.resolve, which raises for a link to itself.
    return Path(os.path.relpath(os.path.realpath(path), os.path.realpath(folder))).as_posix()


def summary_of(records: Sequence[ClipRecord]) -> dict[str, Any]:
    """Counts by outcome: ``clips``, ``kept``, ``dropped`` by reason (in alphabetical order), and seconds kept."""
    reasons = sorted({record.reason for record in records if not record.kept})
    return {
        "clips": len(records),
        "kept": sum(record.kept for record in records),
        "dropped": {reason: sum(record.reason == reason for record in records) for reason in reasons},
        "seconds_kept": round(sum(record.seconds for record in records if record.kept), 3),
    }
