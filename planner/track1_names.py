"""What Track 1 calls things: episodes in file names and in ``summary.json``, and the front matter of ``model_readme.md``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError

#: Fields of the front matter: required, and allowed values where there are any.
FIELDS: dict[str, tuple[bool, tuple[str, ...]]] = {
    "model_name": (True, ()),
    "version": (True, ()),
    "organization": (True, ()),
    "release_year": (True, ()),
    "source_type": (True, ("open_source", "closed_source")),
    "control_type": (True, ("text_driven", "action_driven", "hybrid")),
    "license": (False, ()),
    "paper_url": (False, ()),
    "code_url": (False, ()),
}
#: Folders above a real video that name no task.
_NO_TASK = frozenset({"fixed_scene_task", "gt_video", "video", "videos", "first_frame"})
_NAME = re.compile(r"(?:(?P<task>[A-Za-z0-9][A-Za-z0-9_-]*?)_)?episode_?(?P<number>\d{1,9})")


@dataclass(slots=True, kw_only=True, frozen=True)
class Episode:
    """``task``: None where a name says the number alone. ``real``: the real video of the summary, or None."""

    task: str | None
    number: int
    real: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.task}_episode{self.number}" if self.task else f"episode_{self.number:06d}"

    def matches(self, given: Episode) -> bool:
        """Whether a submitted name means this episode; a task that one of them does not name is no difference."""
        return self.number == given.number and (None in (self.task, given.task) or self.task == given.task)

    def frames(self) -> int | None:
        """Frames of the real video. ``UserError`` where it is not there."""
        from physisforcing.core.errors import DatasetError
        from physisforcing.core.video import probe_mp4

        if self.real is None:
            return None
        if self.real.is_dir():
            return sum(1 for path in self.real.iterdir() if path.suffix.lower() in (".jpg", ".png"))
        try:
            return probe_mp4(self.real).frames
        except DatasetError as error:
            raise UserError("gt_path", got=str(self.real), wanted="a real video", fix="copy the test set") from error


class ReadmeError(ValueError):
    """The front matter is missing or wrong; the text says where."""


def episode_of(stem: str) -> Episode | None:
    """The episode that a file's name means, or None: ``click_bell_episode07``, ``click_bell_episode_07``, ``episode_000007``."""
    found = _NAME.fullmatch(stem)
    return None if found is None else Episode(task=found["task"], number=int(found["number"]))


def read_summary(path: Path) -> list[Episode]:
    """Episodes of a ``summary.json``: a list of ``{gt_path, image, prompt}``.

    The task is the fifth part of ``gt_path`` from its end, WorldArena's convention, where that is the name of a task. Relative
    paths are relative to the summary. ``UserError`` for anything else, and for an episode twice.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("--summary", got=f"{path}: {error}", wanted="a JSON list", fix="check the path") from error
    if not isinstance(rows, list) or not rows:
        raise UserError("--summary", got=f"{path}", wanted="a list that is not empty", fix="use the test set's file")
    episodes = [_row(row, i, path) for i, row in enumerate(rows)]
    names = [episode.name for episode in episodes]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise UserError("--summary", got=sorted(twice)[:5], wanted="each episode once", fix="take the doubles out")
    return episodes


def _row(row: Any, index: int, path: Path) -> Episode:
    where = f"{path.name}[{index}].gt_path"
    real = row.get("gt_path") if isinstance(row, dict) else None
    if not isinstance(real, str) or not real:
        raise UserError(
            where, got=real, wanted="the path of a real video", fix='{"gt_path": ..., "image": ..., "prompt": [...]}'
        )
    found = Path(real)
    number = re.search(r"(\d{1,9})$", found.stem)
    if number is None:
        raise UserError(where, got=real, wanted="a name that ends in the episode's number", fix="episode12.mp4")
    parts = found.parts
    task = parts[-5] if len(parts) >= 5 and parts[-5] not in (*_NO_TASK, "/", "..", ".") else None
    if any(part in _NO_TASK - {"video"} for part in parts[-4:-1]):  # a flat test set: no folder is a task
        task = None
    return Episode(task=task, number=int(number[1]), real=found if found.is_absolute() else path.parent / found)


def front_matter(text: bytes) -> dict[str, str]:
    """Fields of a ``model_readme.md``. ``ReadmeError`` names the field that is missing or wrong."""
    import yaml

    try:
        lines = text.decode("utf-8").removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError:
        raise ReadmeError("not UTF-8") from None
    if not lines or lines[0].strip() != "---":
        raise ReadmeError("does not begin with a YAML block: --- on the first line")
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        raise ReadmeError("the YAML block has no end: a second line ---")
    try:
        block = "\n".join(lines[1:end])
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block, yaml.SafeLoader)):
            raise ReadmeError("fields that refer to each other (*name) are not read")  # merged twice each, they double
        values = yaml.safe_load(block)
    except ReadmeError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ReadmeError(f"no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ReadmeError("the YAML block holds no fields")
    return {name: found for name in FIELDS if (found := _field(values, name)) is not None}


def _field(values: dict[Any, Any], name: str) -> str | None:
    required, allowed = FIELDS[name]
    value = values.get(name)
    if value is None or value == "":
        if required:
            raise ReadmeError(f"{name} is missing")
        return None
    huge = isinstance(value, int) and value.bit_length() > 64  # thousands of digits cannot be written out
    if isinstance(value, bool) or not isinstance(value, str | int | float) or huge or len(str(value)) > 500:
        raise ReadmeError(f"{name}: wanted a short text")
    if allowed and value not in allowed:
        raise ReadmeError(f"{name}: {value!r}, wanted {' or '.join(allowed)}")
    if name == "release_year" and not re.fullmatch(r"[12]\d{3}", str(value)):
        raise ReadmeError(f"release_year: {value!r}, wanted four digits")
    return str(value)
