"""SHA-256 of files that several callers ask for."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path


def file_sha256(path: Path, before: bytes = b"") -> str:
    """Of ``before`` and a file as it is now: read once a process as long as its time and size stay."""
    state = path.stat()
    return _digest(path, state.st_mtime_ns, state.st_size, before)


@functools.lru_cache(maxsize=1 << 16)
def _digest(path: Path, _modified: int, _size: int, before: bytes) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(before)).hexdigest()
