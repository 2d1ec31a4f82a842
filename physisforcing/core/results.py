"""Episode results: one JSON object a line, only ever appended, so that a killed evaluation continues where it stopped.

A line is keyed by (manifest, episode, fingerprint, config). Its status is ``success``, ``failure`` or ``error``; an
episode that crashed is an error, never a success or a failure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DatasetError

STATUSES = ("success", "failure", "error")


@dataclass(slots=True, kw_only=True, frozen=True)
class ResultKey:
    """What makes an episode result unique.

    ``manifest``: name or hash of the frozen episode list, ``episode``: its entry (``click_bell/100003``), ``fingerprint``:
    weights and settings of the policy, ``config``: ``config_hash`` of everything else that may change the outcome.
    """

    manifest: str
    episode: str
    fingerprint: str
    config: str


def config_hash(config: Mapping[str, Any] | Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the canonical JSON of a mapping or dataclass."""
    plain: Any = config
    value = asdict(plain) if is_dataclass(plain) and not isinstance(plain, type) else dict(plain)
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; ``ValueError`` for NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)


class ResultsFile:
    """A JSONL file of episode results.

    ``torn``: numbers (from 1) of lines that are not JSON, which a killed writer leaves; they are kept, not counted, and
    reported by ``report_torn``. Several processes may append to one file: a line is one write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.torn: list[int] = []
        self._rows: dict[ResultKey, dict[str, Any]] = {}
        self._open_line = False
        self.reload()

    def reload(self) -> None:
        """Read the file again; the last line of a key wins."""
        self.torn, self._rows, self._open_line = [], {}, False
        if not self.path.exists():
            return
        text = self.path.read_bytes()
        self._open_line = bool(text) and not text.endswith(b"\n")
        for number, line in enumerate(text.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                self.torn.append(number)
                continue
            self._rows[self._key(row, number)] = row

    def _key(self, row: Any, number: int) -> ResultKey:
        names = ("manifest", "episode", "fingerprint", "config")
        if not isinstance(row, dict) or row.get("status") not in STATUSES or any(n not in row for n in names):
            raise DatasetError(
                f"{self.path} line {number}",
                got=str(row)[:120],
                wanted=f"an object with {', '.join(names)} and a status of {', '.join(STATUSES)}",
                fix="this is not a results file of this package; choose another path",
            )
        return ResultKey(**{name: str(row[name]) for name in names})

    def report_torn(self) -> str | None:
        """A sentence on torn lines for logs and reports, or None."""
        if not self.torn:
            return None
        lines = ", ".join(map(str, self.torn))
        return f"{self.path}: line {lines} torn by an interrupted writer, not counted; its episode runs again"

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: ResultKey) -> dict[str, Any] | None:
        return self._rows.get(key)

    def done(self, key: ResultKey, *, retry_errors: bool = False) -> bool:
        """Whether this episode has a result. With ``retry_errors`` an error does not count as one."""
        row = self._rows.get(key)
        return row is not None and not (retry_errors and row["status"] == "error")

    def append(self, key: ResultKey, status: str, **fields: Any) -> dict[str, Any]:
        """Write one line and make it durable. ``fields``: anything JSON holds; numpy values become plain ones."""
        if status not in STATUSES:
            raise ValueError(f"status is one of {STATUSES}, got {status!r}")
        if fields.keys() & {"manifest", "episode", "fingerprint", "config", "status"}:
            raise ValueError("fields repeat a part of the key")
        line = json.dumps({**asdict(key), "status": status, **fields}, allow_nan=False, default=_plain)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A torn last line is closed first, or this one would be lost with it.
        data = ("\n" if self._open_line else "") + line + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, data.encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        self._open_line = False
        self._rows[key] = json.loads(line)
        return self._rows[key]


def count(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Episodes by status, and ``n`` = success + failure, the denominator of a rate."""
    totals = dict.fromkeys(STATUSES, 0)
    for row in rows:
        totals[row["status"]] += 1
    return totals | {"n": totals["success"] + totals["failure"]}


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} does not go into a results file")
