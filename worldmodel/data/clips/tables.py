"""Tables of clips with a row each: JSON lines, JSON, CSV, TSV or parquet, whatever their columns are called.

RoVid-X is published as videos with a table; a public example has the columns ``caption_short_list``, ``video_path``, ``frames`` and
``task``. Other collections call the same things by other names: ``NAMES`` lists those that are known, and ``columns`` tells any other.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from physisforcing.core.errors import DatasetError, UserError, unknown_name

from .decode import Span

#: Endings of files that are read as tables.
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: What we call a column -> what it may be called; the first that a table has is taken, upper and lower case alike.
NAMES: dict[str, tuple[str, ...]] = {
    "video": (
        *("video_path", "video", "clip_path", "path", "file_path", "file_name", "filename", "file"),
        "videos",
        "mp4",
    ),
    "caption": (
        *("caption", "text", "prompt", "instruction", "description", "caption_short", "short_caption"),
        *("caption_short_list", "captions", "caption_long", "long_caption", "language_instruction"),
    ),
    "task": ("task", "task_name", "category", "action", "skill"),
    "start": ("start", "start_time", "start_sec", "start_s", "begin"),
    "end": ("end", "end_time", "end_sec", "end_s", "stop"),
    "start_frame": ("start_frame", "frame_start", "begin_frame"),
    "end_frame": ("end_frame", "frame_end", "stop_frame"),
    "frames": ("frames", "num_frames", "n_frames"),
    "fps": ("fps", "frame_rate", "framerate"),
}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows. ``DatasetError`` names the line that cannot be read."""
    if not path.is_file():
        raise DatasetError(str(path), got="no such file", wanted="a table of clips", fix="correct the path")
    ending = path.suffix.lower()
    if ending == ".parquet":
        return _parquet(path)
    if ending not in TABLES:
        raise DatasetError(str(path), got=ending, wanted=f"one of {', '.join(TABLES)}", fix="convert the table")
    text = read_text(path)
    if ending in (".csv", ".tsv"):
        return _separated(path, text, "\t" if ending == ".tsv" else ",")
    if ending == ".json":
        return _objects([_parsed(path, 1, text)], path)
    # Not splitlines: what JSON may hold unescaped, such as U+2028, ends a line for it.
    lines = enumerate(text.split("\n"), start=1)
    return _objects([_parsed(path, number, line) for number, line in lines if line.strip()], path, lines=True)


def read_text(path: Path) -> str:
    """A file of UTF-8; ``DatasetError`` for other bytes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got, fix = f"byte {error.object[error.start]:#04x} at {error.start}", "iconv -f latin1 -t utf-8 FILE > NEW"
        raise DatasetError(str(path), got=got, wanted="UTF-8", fix=fix) from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        got = str(error).splitlines()[0]
        raise DatasetError(str(path), got=got, wanted="a parquet file", fix="copy the table again") from error
    return rows


def _separated(path: Path, text: str, delimiter: str) -> list[dict[str, Any]]:
    """Rows of a CSV or TSV. ``DatasetError`` for a name that stands twice and for more cells than names: a comma without quotes."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = []
    try:
        names = list(reader.fieldnames or ())
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DatasetError(f"{path} columns", got=f"{twice} twice", wanted="each once", fix="rename one of them")
        for row in reader:
            if None in row:
                got = f"{len(names) + len(row[None])} cells"
                fix = "put text that holds the separator in double quotes"
                raise DatasetError(f"{path} line {reader.line_num}", got=got, wanted=f"{len(names)}", fix=fix)
            rows.append(row)
    except csv.Error as error:
        fix = "close the quotes of this line or of one before it"
        raise DatasetError(f"{path} line {reader.line_num}", got=str(error), wanted="cells", fix=fix) from error
    return rows


def rows_to_sources(rows: list[dict[str, Any]], table: Path, home: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Fields of a ``ClipSource`` of each row; relative paths start from ``home``.

    ``start`` and ``end`` are seconds. ``start_frame``, ``end_frame`` (exclusive) and ``frames`` count frames at ``fps``, or at the
    rate of the file where there is no such column; ``frames`` alone says how long the file is and asks for all of it. ``UserError``
    for a table without videos and for a number that is none, with its row.
    """
    names = _mapping(rows, columns, table)
    found = []
    for number, row in enumerate(rows, start=1):
        value = {ours: row.get(theirs) for ours, theirs in names.items()}
        where = f"row {number}"
        if not isinstance(value["video"], str) or not value["video"].strip() or "\0" in value["video"]:
            got = "no video" if value["video"] in (None, "") else value["video"]
            raise DatasetError(f"{table} {where}", got=got, wanted=f"a path in {names['video']}", fix="fill it in")
        path = home / value["video"]
        start, seconds = _piece(value, path, f"{table} {where}")
        span = Span(path=path, start=start, seconds=seconds)
        task = _text(value.get("task"))
        found.append({"span": span, "caption": _text(value.get("caption")), "task": task, "where": where})
    return found


def _mapping(rows: list[dict[str, Any]], columns: list[str], table: Path) -> dict[str, str]:
    """Our name of a column -> the table's."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    lower = {name.lower(): name for name in reversed(present)}
    names = {}
    for ours, candidates in NAMES.items():
        theirs = next((lower[c] for c in candidates if c in lower), None)
        if theirs is not None:
            names[ours] = theirs
    for entry in columns:
        ours, _, theirs = entry.partition(":")
        if ours not in NAMES:
            raise unknown_name("columns", ours, NAMES, see="columns=[ours:theirs], docs/data.md")
        if theirs not in present:
            raise unknown_name("columns", theirs, present, see=str(table))
        names[ours] = theirs
    if rows and "video" not in names:
        known = ", ".join(NAMES["video"])
        fix = "write columns=[video:NAME], and columns=[video:NAME,caption:NAME] if captions have another name too"
        raise UserError(f"{table} columns", got=present, wanted=f"a path of a video ({known})", fix=fix)
    return names


def _piece(value: dict[str, Any], path: Path, where: str) -> tuple[float, float | None]:
    """Seconds at which the piece starts, and how long it is (None: to the end)."""
    number = {
        name: _number(value.get(name), f"{where}: {name}") for name in NAMES if name not in ("video", "caption", "task")
    }
    start, end = number["start"], number["end"]
    first, last = number["start_frame"], number["end_frame"]
    if first is not None and last is None and number["frames"] is not None:
        last = first + number["frames"]
    if first is not None or last is not None:
        rate = number["fps"] or _rate(path)
        start = first / rate if start is None and first is not None else start
        end = last / rate if end is None and last is not None else end
    elif start is not None and end is None and number["frames"] is not None:
        end = start + number["frames"] / (number["fps"] or _rate(path))
    begin = start or 0.0
    if begin < 0 or (end is not None and end <= begin):
        raise UserError(where, got=f"{begin:g} to {end} s", wanted="a piece of positive length", fix="correct the row")
    return begin, None if end is None else end - begin


def _rate(path: Path) -> float:
    from .decode import SpanReader

    try:
        with SpanReader(Span(path=path)) as reader:
            return reader.header.fps
    except DatasetError:
        return 1.0  # the video is named as unreadable when it is measured; its piece does not matter


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, float) and math.isnan(value):
        return None  # how parquet and pandas write an empty cell
    if not math.isfinite(number):
        raise UserError(where, got=value, wanted="a number", fix="correct the row")
    return number


def _text(value: Any) -> str:
    """One line of text; of a list of captions, also one written as a string, the first."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for reader in (json.loads, ast.literal_eval):
            try:
                listed = reader(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):  # no list, or one of absurd depth
                continue
            value = listed if isinstance(listed, list) else value
            break
    if isinstance(value, (list, tuple)):
        value = next((one for one in value if one), "")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return " ".join(str(value).split())


def _parsed(path: Path, number: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "correct the line, or copy the table again"
        raise DatasetError(f"{path} line {number}", got=str(error), wanted="JSON", fix=fix) from error


def _objects(values: list[Any], path: Path, *, lines: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSON file: a list of objects, also below a key, or an object per line."""
    if not lines and isinstance(values[0], dict):
        lists = [v for v in values[0].values() if isinstance(v, list)]
        values = lists[0] if len(lists) == 1 else values
    elif not lines and isinstance(values[0], list):
        values = values[0]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            where = f"{path} {'line' if lines else 'entry'} {number}"
            raise DatasetError(where, got=str(value)[:80], wanted="an object", fix="correct the table")
    return values
