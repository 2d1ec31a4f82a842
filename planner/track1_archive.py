"""Archives from anywhere, read member by member with bounds: nothing is written outside the file that the caller names."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError, OverflowError)


class BadArchiveError(Exception):
    """``code``: as in ``Finding``; ``where``: the member."""

    def __init__(self, code: str, where: str, words: str) -> None:
        super().__init__(words)
        self.code, self.where = code, where[:200]


@dataclass(slots=True, kw_only=True, frozen=True)
class ArchiveLimits:
    """``members``: files and folders; ``total_bytes``: unpacked; ``video_bytes``: of one video; ``header_bytes``: of a member's own
    description (a header may announce gigabytes). ``video_frames``, ``frame_pixels``, ``video_s``: of one video that is read to its end;
    ``reading_s``: for all videos together, after which the others are not looked into."""

    members: int = 20_000
    total_bytes: int = 32 * 2**30
    video_bytes: int = 256 * 2**20
    header_bytes: int = 2**20
    video_frames: int = 20_000
    frame_pixels: int = 4096 * 4096
    video_s: float = 60.0
    reading_s: float = 4 * 3600.0


@dataclass(slots=True, kw_only=True, frozen=True)
class Member:
    """A regular file of an archive."""

    path: PurePosixPath
    size: int
    info: tarfile.TarInfo


class _Bounded(io.RawIOBase):
    """A decompressed stream that gives no more than ``total`` bytes in all, nor ``once`` at a time."""

    def __init__(self, file: gzip.GzipFile, *, total: int, once: int) -> None:
        self._file, self._total, self._once = file, total, once

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self._once:
            raise BadArchiveError("unsafe_tar_size", "", f"a member is described by more than {self._once} bytes")
        data = self._file.read(size)
        if self._file.tell() > self._total:
            raise BadArchiveError("unsafe_tar_size", "", f"more than {self._total} bytes unpacked")
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset > self._total:
            raise BadArchiveError("unsafe_tar_size", "", f"more than {self._total} bytes unpacked")
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def members(path: Path, limits: ArchiveLimits) -> Iterator[tuple[tarfile.TarFile, Member]]:
    """Regular files in the order of the archive. ``BadArchiveError`` for whatever else is in it, or too much of it.

    Refused: absolute paths, ``..``, links, devices, pipes, sparse files, a path twice, names that are no text. The caller reads a
    member before the next one is asked for.
    """
    try:
        with gzip.open(path, "rb") as unpacked:
            assert isinstance(unpacked, gzip.GzipFile)
            stream: Any = _Bounded(unpacked, total=limits.total_bytes, once=limits.header_bytes)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                yield from _members(archive, limits)
            while unpacked.read(2**16):  # the sum at the end of the file
                if unpacked.tell() > limits.total_bytes:
                    raise BadArchiveError("unsafe_tar_size", "", f"more than {limits.total_bytes} bytes unpacked")
    except _DAMAGED as error:
        raise BadArchiveError("extract_failed", path.name, f"damaged or no gzip archive: {error}") from error


def _members(archive: tarfile.TarFile, limits: ArchiveLimits) -> Iterator[tuple[tarfile.TarFile, Member]]:
    seen: set[PurePosixPath] = set()
    total = count = 0
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else the list of headers grows with the archive
        count += 1
        total += max(0, info.size)
        if count > limits.members:
            raise BadArchiveError("unsafe_tar_size", "", f"more than {limits.members} members")
        path = _safe_path(info)
        if info.size < 0 or total > limits.total_bytes:
            raise BadArchiveError("unsafe_tar_size", info.name, f"more than {limits.total_bytes} bytes unpacked")
        if info.isdir():
            continue
        if path in seen:
            raise BadArchiveError("unsafe_tar_path", info.name, "the same path stands in the archive twice")
        seen.add(path)
        yield archive, Member(path=path, size=info.size, info=info)


def _safe_path(info: tarfile.TarInfo) -> PurePosixPath:
    name = info.name
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise BadArchiveError("unsafe_tar_path", name, "a link or a special file; wanted files and folders")
    path = PurePosixPath(name)
    wrong = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or len(name) > 1000
    if wrong or not name.isprintable() or (name[1:2] == ":" and name[:1].isalpha()):
        raise BadArchiveError("unsafe_tar_path", repr(name), "a path inside the archive, without '..'")
    return path


def save_member(archive: tarfile.TarFile, member: Member, to: Path, most: int) -> Path:
    """Write a member's bytes to the file ``to``, whatever the member is called. ``BadArchiveError`` past ``most`` bytes."""
    if member.size > most:
        words = f"{member.size} bytes, at most {most}"
        raise BadArchiveError("unsafe_tar_size", str(member.path), words)
    source = archive.extractfile(member.info)
    assert source is not None, "a regular file has content"
    left = member.size
    with to.open("wb") as file:
        while left:
            try:
                part = source.read(min(left, 2**18))
            except _DAMAGED as error:
                raise BadArchiveError("extract_failed", str(member.path), f"the archive is damaged: {error}") from error
            if not part:
                raise BadArchiveError("extract_failed", str(member.path), "the archive is cut off")
            file.write(part)
            left -= len(part)
    return to
