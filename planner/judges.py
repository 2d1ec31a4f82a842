"""Who says whether a video shows the task done: one protocol, and the judges that need no network.

A verdict is ``success``, ``failure`` or ``error``. A judge that could not be asked, or whose answer was no verdict, gives ``error``: it
is counted and shown, never taken for a failure and never left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.errors import UserError
from physisforcing.core.results import canonical_json

STATUSES = ("success", "failure", "error")


@dataclass(slots=True, kw_only=True)
class JudgeRequest:
    """What is judged.

    ``rollout_THWC``: pictures of the video, in order, uint8; ``reference_THWC``: of a recording in which the task is done, or None.
    ``truth``: what a simulator knows (for ``ScriptedJudge``); it is never sent anywhere and is no part of the digest.
    """

    id: str
    instruction: str
    rollout_THWC: NDArray[np.uint8]
    reference_THWC: NDArray[np.uint8] | None = None
    truth: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of sentence and pixels: equal questions have equal digests, wherever and whenever they are asked."""
        return hashlib.sha256(canonical_json([self.instruction, self.pictures()]).encode()).hexdigest()

    def pictures(self) -> dict[str, list[str]]:
        """SHA-256 of every picture with its size."""
        parts = {"reference": self.reference_THWC, "rollout": self.rollout_THWC}
        return {name: [picture_digest(p) for p in part] for name, part in parts.items() if part is not None}


@dataclass(slots=True, kw_only=True)
class Verdict:
    """``key``: hash of judge and question. ``source``: ``asked``, ``replayed``, ``cached`` or ``scripted``. ``reason``: the judge's, or
    what went wrong."""

    status: str
    reason: str
    judge: str
    key: str
    source: str
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.status in STATUSES


class Judge(Protocol):
    """Judges videos one by one."""

    @property
    def fingerprint(self) -> str:
        """Model, question and settings; verdicts of two fingerprints are not mixed."""
        ...

    def judge(self, request: JudgeRequest) -> Verdict:
        """Never raises for a judge that fails or answers something else: that is an ``error`` verdict."""
        ...


def picture_digest(picture_HWC: NDArray[np.uint8]) -> str:
    head = f"{picture_HWC.dtype.str}{list(picture_HWC.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(picture_HWC).tobytes()).hexdigest()


def request_key(fingerprint: str, request: JudgeRequest) -> str:
    """The key of a verdict."""
    return hashlib.sha256(f"{fingerprint}|{request.digest}".encode()).hexdigest()


def uniform_frames(frames_THWC: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """``count`` pictures evenly over a video, its first and last one among them; all of a shorter video."""
    assert len(frames_THWC) and count >= 1
    if len(frames_THWC) <= count:
        return frames_THWC
    # A single picture is the last one: it shows how the task ended.
    places = np.linspace(0, len(frames_THWC) - 1, count).round().astype(int) if count > 1 else np.array([-1])
    return frames_THWC[places]


# ----------------------------------------------------------------------------------------------------------------- verdicts


class ScriptedJudge:
    """Answers by a rule, for tests and for models that know the truth. The rule gives True, False, or None where it cannot say."""

    def __init__(self, rule: Callable[[JudgeRequest], bool | None], name: str = "scripted") -> None:
        self._rule, self.fingerprint = rule, name

    def judge(self, request: JudgeRequest) -> Verdict:
        try:
            said = self._rule(request)
        except Exception as error:  # a rule is anyone's code; what it raises must not end an evaluation of hours
            said, reason = None, f"the rule raised {type(error).__name__}: {error}"
        else:
            reason = "the rule cannot say" if said is None else "by rule"
        status = "error" if said is None else "success" if said else "failure"
        key = request_key(self.fingerprint, request)
        return Verdict(status=status, reason=reason, judge=self.fingerprint, key=key, source="scripted")


def truth_rule(name: str = "success") -> Callable[[JudgeRequest], bool | None]:
    """The rule that reads ``truth[name]``; None where it is not there."""

    def rule(request: JudgeRequest) -> bool | None:
        found = request.truth.get(name)
        return None if found is None else bool(found)

    return rule


class CachedJudge:
    """Keeps verdicts in a file of JSON lines and does not ask twice. Errors are not kept: they are asked again."""

    def __init__(self, judge: Judge, path: str | Path) -> None:
        self._judge, self._file = judge, JsonLines(path)
        self._known = {row["key"]: row for row in self._file.rows() if row.get("status") in ("success", "failure")}

    @property
    def fingerprint(self) -> str:
        return self._judge.fingerprint

    def judge(self, request: JudgeRequest) -> Verdict:
        key = request_key(self.fingerprint, request)
        if (row := self._known.get(key)) is not None:
            return Verdict(status=row["status"], reason=row["reason"], judge=self.fingerprint, key=key, source="cached")
        verdict = self._judge.judge(request)
        if verdict.status != "error":
            self._known[key] = asdict(verdict)
            self._file.append({"id": request.id, **asdict(verdict)})
        return verdict


class JsonLines:
    """A file of JSON objects, one a line, only ever appended; a line that a killed writer tore is left out and counted in ``torn``."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.torn = Path(path), 0

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines. ``UserError`` for a file that holds something else."""
        self.torn, found = 0, []
        if not self.path.is_file():
            return []
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                self.torn += 1
                continue
            if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                wanted, fix = "a verdict with its key", "give the file that a judge wrote"
                raise UserError(f"{self.path} line {number}", got=str(row)[:80], wanted=wanted, fix=fix)
            found.append(row)
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """One durable write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torn = self._ends_torn()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, (("\n" if torn else "") + json.dumps(dict(row), allow_nan=False) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)

    def _ends_torn(self) -> bool:
        if not self.path.is_file() or not self.path.stat().st_size:
            return False
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
