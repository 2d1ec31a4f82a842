"""What a Track 1 submission is held against, and what was found, for people and for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from physisforcing.core.errors import UserError

from .track1_archive import ArchiveLimits

README = "model_readme.md"
LAYOUTS = ("wa2", "v1")
#: Folders of a v1 submission: the prompt itself, and two others for the same picture.
V1_SUFFIXES = ("_test", "_test_1", "_test_2")
#: Letters of a finding's list of names.
MOST_TOLD = 200


@dataclass(slots=True, kw_only=True)
class Track1Rules:
    """What a submission is held against. ``frames``: a number, ``gt``, ``any``, or empty for the layout's own rule."""

    layout: str = ""
    summary: Path | None = None
    frames: str = ""
    fps: float = 24.0
    width: int = 640
    height: int = 480
    decode: bool = False
    limits: ArchiveLimits = field(default_factory=ArchiveLimits)

    def check(self) -> None:
        """``UserError`` for a value that means nothing."""
        if self.layout not in ("", *LAYOUTS):
            raise UserError("--layout", got=self.layout, wanted=" or ".join(LAYOUTS), fix="leave it out")
        if self.frames not in ("", "gt", "any") and not (self.frames.isdecimal() and int(self.frames) > 0):
            raise UserError("--frames", got=self.frames, wanted="a number, gt or any", fix="--frames 121")
        if self.frames == "gt" and self.summary is None:
            raise UserError("--frames", got="gt", wanted="a summary that names the real videos", fix="--summary FILE")


@dataclass(slots=True, kw_only=True, frozen=True)
class Finding:
    """``level``: ``error`` (the submission fails) or ``warning`` (a recommendation is not followed)."""

    level: str
    code: str
    where: str
    words: str


@dataclass(slots=True, kw_only=True)
class Track1Report:
    """What was found. ``videos`` counts those that were looked at; ``model``: the fields of the front matter."""

    layout: str = ""
    videos: int = 0
    model: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return all(finding.level != "error" for finding in self.findings)

    def add(self, level: str, code: str, where: str, words: str) -> None:
        self.findings.append(Finding(level=level, code=code, where=where, words=words))


def as_json(report: Track1Report) -> str:
    """The report as one JSON document."""
    return json.dumps({"valid": report.valid, **asdict(report)}, indent=2)


def as_text(report: Track1Report) -> str:
    """The report for people; of one kind of finding, the first ten."""
    lines, told = [], dict[str, int]()
    for finding in report.findings:
        told[finding.code] = told.get(finding.code, 0) + 1
        if told[finding.code] <= 10:
            lines.append(f"{finding.level:8}{finding.code:22}{finding.where}: {finding.words}")
    lines += [f"        {code:22}and {count - 10} more" for code, count in told.items() if count > 10]
    verdict = "valid" if report.valid else "NOT valid"
    return "\n".join([*lines, f"{verdict}: layout {report.layout}, {report.videos} videos"])
