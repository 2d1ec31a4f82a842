"""Where clips come from: a manifest file, a folder of videos with captions, or a LeRobot dataset."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physisforcing.core.errors import DatasetError, UserError, unknown_name
from physisforcing.core.lerobot import HEAD, LeRobotDataset
from physisforcing.core.readers import open_dataset

from .decode import CONTAINERS, Span
from .tables import TABLES, read_table, read_text, rows_to_sources


@dataclass(slots=True, kw_only=True, frozen=True)
class ClipSource:
    """A clip before anything was measured. ``where``: what a person calls it (line, file name, episode)."""

    span: Span
    caption: str
    task: str
    where: str


def list_clips(
    root: str | Path,
    *,
    columns: list[str] | None = None,
    videos: str | None = None,
    captions: str | None = None,
    camera: str | None = None,
) -> tuple[str, list[ClipSource]]:
    """-> (name of the layout, clips in the order of the input). Nothing is decoded.

    ``root``: a table (``tables.TABLES``), a LeRobot v2.1 or v3 dataset, or a folder of videos. ``columns``: ``ours:theirs`` of a
    table; ``videos``: folder that its paths start from (that of the table); ``captions``: a table of captions of a folder;
    ``camera``: of a dataset (head, or its only one). ``UserError`` for a setting that does not belong to the layout, and when there
    is no clip at all.
    """
    root = Path(root)
    if root.is_file():
        layout, allowed = "manifest", {"columns", "videos"}
    elif (root / "meta" / "info.json").is_file():
        layout, allowed = "LeRobot", {"camera"}
    else:
        layout, allowed = "folder", {"captions", "columns"}
    given: dict[str, Any] = {"columns": columns, "videos": videos, "captions": captions, "camera": camera}
    for name, value in given.items():
        if value and name not in allowed:
            raise UserError(name, got=value, wanted=f"no such setting for a {layout}", fix=f"leave {name} out")
    if layout == "manifest":
        home = Path(videos) if videos else root.parent
        found = rows_to_sources(read_table(root), root, home, columns or [])
    elif layout == "LeRobot":
        layout, found = _episodes(root, camera)
    else:
        found = _folder(root, captions, columns or [])
    if not found:
        kinds = f"a table ({', '.join(TABLES)}), a LeRobot dataset or a folder with videos ({', '.join(CONTAINERS)})"
        raise DatasetError(
            str(root), got="no clip", wanted=kinds, fix="correct the path; docs/data.md shows the layouts"
        )
    sources = [ClipSource(**one) for one in found]
    for source in sources:
        _check_text(source)
    return layout, sources


def _check_text(source: ClipSource) -> None:
    """``DatasetError`` for text that no UTF-8 file can hold: half a character from a cut string, a file's name in another encoding."""
    for name, text in (("path", str(source.span.path)), ("caption", source.caption), ("task", source.task)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = text.encode(errors="backslashreplace").decode()
            fix = "rename the file" if name == "path" else "correct the text"
            raise DatasetError(f"{name} of {source.where!a}", got=got, wanted="Unicode text", fix=fix) from error


def _episodes(root: Path, camera: str | None) -> tuple[str, list[dict[str, Any]]]:
    data = open_dataset(root)
    assert isinstance(data, LeRobotDataset)
    names = {key.removeprefix("observation.images."): key for key in data.video_keys}
    if camera is None:
        chosen = HEAD if HEAD in data.video_keys else next(iter(data.video_keys), None)
        if chosen is None or (chosen != HEAD and len(data.video_keys) > 1):
            wanted = "a camera" if data.video_keys else "a dataset with videos"
            fix = f"write camera= and one of {', '.join(names)}" if names else "choose another dataset"
            raise UserError("camera", got=sorted(names), wanted=wanted, fix=fix)
    elif camera.removeprefix("observation.images.") in names:
        chosen = names[camera.removeprefix("observation.images.")]
    else:
        raise unknown_name("camera", camera, names, see=str(root))
    found = []
    for episode in data.episodes:
        start = float(episode.row.get(f"videos/{chosen}/from_timestamp") or 0.0)
        span = Span(path=data.video_path(episode.index, chosen), start=start, seconds=episode.length / data.fps)
        row = {"span": span, "caption": episode.instruction, "task": episode.task_name}
        found.append(row | {"where": f"episode {episode.index}"})
    return data.layout, found


def _folder(root: Path, captions: str | None, columns: list[str]) -> list[dict[str, Any]]:
    """Every video below ``root``, with the text beside it (``clip.txt``) or the caption of a table."""
    if not root.is_dir():
        raise DatasetError(str(root), got="no such file or folder", wanted="clips", fix="correct the path")
    videos = sorted(p for p in root.rglob("*") if p.suffix.lower() in CONTAINERS and p.is_file())
    tables = [root / f"{name}{ending}" for name in ("captions", "metadata") for ending in TABLES]
    if captions is not None:
        tables = [Path(captions) if Path(captions).is_file() else root / captions]
    for table in tables:
        if captions is not None or table.is_file():
            found = rows_to_sources(read_table(table), table, root, columns)
            named = {os.path.realpath(one["span"].path) for one in found}
            # Not passed over in silence: without a row they have no caption, and are counted as such.
            rest = [path for path in videos if os.path.realpath(path) not in named]
            wheres = [f"{path.relative_to(root).as_posix()}, in no row of {table.name}" for path in rest]
            more = [
                {"span": Span(path=p), "caption": "", "task": "", "where": w} for p, w in zip(rest, wheres, strict=True)
            ]
            return found + more
    found = []
    for path in videos:
        beside = path.with_suffix(".txt")
        caption = " ".join(read_text(beside).split()) if beside.is_file() else ""
        # Clips in one folder below the root are those of one task, as image folders have one class each.
        task = path.parent.name if path.parent != root else ""
        where = path.relative_to(root).as_posix()
        found.append({"span": Span(path=path), "caption": caption, "task": task, "where": where})
    return found
