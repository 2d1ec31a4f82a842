"""``physis data pack`` and ``physis data unpack``: datasets as one small file, and back.

An archive keeps pictures (H.264, bit for bit), actions, joints, poses and contacts of every frame; depth and body ids are
left out. Joints are kept to 1e-5 rad (measured ones to 2e-5), poses to 0.4 mm, contact impulses to 2.5 %.

The file is a ZIP: ``archive.json`` says what is in it, ``<part>/<stream>.bin`` hold numbers, ``<part>/<camera>.h264``
pictures, ``templates/`` one small MP4 for each encoder setting.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import lerobot_format as fmt
from .archive_numbers import (
    MEASURED,
    Streams,
    compress,
    decode_columns,
    decode_truth,
    decompress,
    encode_columns,
    encode_truth,
)
from .archive_video import Packets, make_template, read_packets, write_packets
from .errors import DatasetError, UserError
from .ground_truth import GroundTruth
from .ground_truth import load as load_truth
from .ground_truth import save as save_truth
from .lerobot import GROUND_TRUTH_PATH, LeRobotDataset, LeRobotWriter
from .merge import episode_stats

SCHEMA = "physisforcing.archive/1"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
FIX = "copy the archive again from its source"
_MAX_ENTRY = 1 << 31
#: Episodes that are worth the start of a process which encodes them (it takes about as long as 50).
_EPISODES_PER_PROCESS = 100


def pack(path: str | Path, roots: Mapping[str, str | Path], *, workers: int | None = None) -> dict[str, Any]:
    """Write datasets (part name -> folder) to one archive, which appears complete or not at all. Returns a summary.

    ``workers`` processes encode (0: this one; None: up to 16, as cores and episodes allow); the archive does not depend on it.
    """
    path = Path(path)
    entries: dict[str, bytes] = {}
    parts: dict[str, Any] = {}
    for name in sorted(roots):
        if not NAME.fullmatch(name):
            raise UserError("part", got=name, wanted="letters, digits, . _ + -", fix="rename the dataset's folder")
    if not roots:
        raise UserError("datasets", got="none", wanted="at least one", fix="physis data pack <FILE> <DATASET>")
    datasets = {name: LeRobotDataset(roots[name]) for name in sorted(roots)}
    if workers is None:
        workers = min(16, os.cpu_count() or 1, sum(map(len, datasets.values())) // _EPISODES_PER_PROCESS)
    with _encoder(workers) as encode, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # LZMA lets other threads run; each holds some 100 MB. The streams of one part are compressed while the next is encoded.
        waiting: list[tuple[str, Future[tuple[bytes, Any]], dict[str, Any]]] = []
        for name, dataset in datasets.items():
            parts[name], streams = _pack_part(name, dataset, entries, encode)
            for number, (stream, values) in enumerate(sorted(streams.items())):
                about = {"entry": f"{number:02d}.bin", "episodes": [index for index, _ in values]}
                parts[name]["streams"][stream] = about
                future = pool.submit(compress, [array for _, array in values])
                waiting.append((f"{name}/{about['entry']}", future, about))
        for entry, future, about in waiting:
            entries[entry], about["shapes"] = future.result()
    entries["archive.json"] = json.dumps(
        {"schema": SCHEMA, "parts": parts}, sort_keys=True, separators=(",", ":")
    ).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with zipfile.ZipFile(partial, "w") as file:
        for name in sorted(entries):
            # A fixed date: equal contents give equal files.
            kind = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(name), entries[name], compress_type=kind, compresslevel=9)
    os.replace(partial, path)
    episodes = {name: len(part["episodes"]) for name, part in parts.items()}
    frames = {name: sum(row["length"] for row in part["episodes"]) for name, part in parts.items()}
    sizes = {"pictures": sum(len(data) for name, data in entries.items() if name.endswith(".h264"))}
    sizes["numbers"] = sum(len(data) for name, data in entries.items() if name.endswith(".bin"))
    return {
        "archive": str(path),
        "bytes": path.stat().st_size,
        "content_sha256": _content(entries),
        "parts": episodes,
        "frames": frames,
        "bytes_of": sizes,
    }


def _content(entries: Mapping[str, bytes]) -> str:
    """Of what the archive holds, whatever the ZIP around it looks like."""
    digest = hashlib.sha256()
    for name in sorted(entries):
        digest.update(f"{name}|{len(entries[name])}|".encode())
        digest.update(entries[name])
    return digest.hexdigest()


@dataclass(slots=True)
class _Encoded:
    """One episode's numbers by stream, its packets by camera, and what the archive says about its ground truth once
    (``about``) and for each episode (``extra``)."""

    found: dict[str, Any]
    packets: dict[str, Packets]
    about: dict[str, Any] | None
    extra: dict[str, Any] | None


Encode = Callable[[LeRobotDataset], Iterable[_Encoded]]


@contextlib.contextmanager
def _encoder(workers: int) -> Iterator[Encode]:
    """A function that encodes all episodes of a dataset in order, with so many processes."""
    if workers < 2:
        yield lambda dataset: (_encode(dataset, episode.index) for episode in dataset.episodes)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:

        def encode(dataset: LeRobotDataset) -> Iterable[_Encoded]:
            indices = [episode.index for episode in dataset.episodes]
            try:
                yield from pool.map(functools.partial(_encode_at, str(dataset.root)), indices, chunksize=8)
            except BrokenProcessPool as error:
                got = f"one of {workers} processes ended by itself, often for lack of memory"
                fix = "use fewer, or 0 for none; in a script of your own, guard it with __name__ == '__main__'"
                raise UserError("workers", got=got, wanted="processes that encode to the end", fix=fix) from error

        yield encode


@functools.lru_cache(maxsize=1)
def _opened(root: str) -> LeRobotDataset:
    """A process of ``_encoder`` opens a dataset once."""
    return LeRobotDataset(root)


def _encode_at(root: str, index: int) -> _Encoded:
    return _encode(_opened(root), index)


def _encode(dataset: LeRobotDataset, index: int) -> _Encoded:
    features = _stored_features(dataset)
    columns = {k: v for k, v in dataset.columns(index).items() if k in features}
    found: dict[str, Any] = encode_columns(columns)
    about = extra = None
    truth_path = dataset.ground_truth_path(index)
    if truth_path is not None:
        joints = decode_columns(found, features)[MEASURED].astype(np.float64)
        more, about = encode_truth(load_truth(truth_path), joints)
        found |= more
        extra = about.pop("extra")
    packets = {key: read_packets(dataset.video_path(index, key)) for key in dataset.video_keys}
    return _Encoded(found | {f"packets/{key}": p.table_N4 for key, p in packets.items()}, packets, about, extra)


def _stored_features(dataset: LeRobotDataset) -> dict[str, Any]:
    return {key: value for key, value in dataset.features.items() if key not in fmt.INDEX_FEATURES}


def _pack_part(
    name: str, dataset: LeRobotDataset, entries: dict[str, bytes], encode: Encode
) -> tuple[dict[str, Any], dict[str, list[tuple[int, Any]]]]:
    """What the archive says about a part, and its numbers: stream -> (episode, array) pairs. Pictures go to ``entries``."""
    for episode in dataset.episodes:
        if not episode.key or any(word in episode.key for word in "/\\"):
            fix = f"convert it first: physis data prepare <OUT> {dataset.root}"
            raise DatasetError(str(dataset.root), got="episodes without keys", wanted="a dataset written here", fix=fix)
    stats, rows, abouts = episode_stats(dataset), [], []
    streams: dict[str, list[tuple[int, Any]]] = {}
    pictures: dict[str, list[bytes]] = {key: [] for key in dataset.video_keys}
    for episode, encoded in zip(dataset.episodes, encode(dataset), strict=True):
        row = {field: getattr(episode, field) for field in fmt.EPISODE_COLUMNS if field != "content_sha256"}
        row |= {"length": episode.length, "instruction": episode.instruction}
        row["pictures"] = {key: _rounded(stats[episode.index][key]) for key in dataset.video_keys}
        if encoded.about is not None:
            row["extra"] = encoded.extra
            if encoded.about not in abouts:
                abouts.append(encoded.about)
            row["truth"] = abouts.index(encoded.about)
        row["settings"] = {}
        for key, packets in encoded.packets.items():
            template = f"templates/{packets.setting}.mp4"
            if template not in entries:
                entries[template] = make_template(packets, dataset.video_path(episode.index, key))
            row["settings"][key] = packets.setting
            pictures[key].append(packets.data)
        for stream, values in encoded.found.items():
            streams.setdefault(stream, []).append((episode.index, values))
        rows.append(row)
    for key, data_parts in pictures.items():
        entries[f"{name}/{key}.h264"] = b"".join(data_parts)
    about = {
        "fps": dataset.fps,
        "robot_type": dataset.info.get("robot_type") or "",
        "features": _stored_features(dataset),
        "episodes": rows,
        "truths": abouts,
        "streams": {},
    }
    return about, streams


def _rounded(stats: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.round(np.asarray(value, np.float64), 5).tolist() if name != "count" else value
        for name, value in stats.items()
    }


def unpack(path: str | Path, output: str | Path) -> dict[str, Any]:
    """Write each part of the archive as a LeRobot v3 dataset below ``output`` and return their fingerprints.

    ``DatasetError`` for a file that is no archive or damaged, ``UserError`` when a part's folder exists.
    """
    path, output = Path(path), Path(output)
    if not path.is_file():
        raise DatasetError(str(path), got="no such file", wanted="an archive", fix="physis data pack makes one")
    try:
        with zipfile.ZipFile(path) as file:
            # Sizes come first, so that a crafted entry cannot eat the memory; reading compares checksums.
            big = [info.filename for info in file.infolist() if info.file_size > _MAX_ENTRY]
            if big:
                raise ValueError(f"{big[0]} is larger than {_MAX_ENTRY} bytes")
            entries = {info.filename: file.read(info) for info in file.infolist()}
        about = json.loads(entries["archive.json"])
        if about["schema"] != SCHEMA:
            raise ValueError(f"schema {about['schema']!r}")
        names = {name for part in about["parts"].values() for name in part["features"]} | set(about["parts"])
        names |= {row["key"] for part in about["parts"].values() for row in part["episodes"]}
        strange = sorted(name for name in names if not NAME.fullmatch(name))
        if strange:
            raise ValueError(f"the name {strange[0]!r}")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"{type(error).__name__}: {error}"
        raise DatasetError(str(path), got=got, wanted=f"an archive ({SCHEMA})", fix=FIX) from error
    report: dict[str, Any] = {"content_sha256": _content(entries), "parts": {}}
    for name in about["parts"]:
        if (output / name).exists():
            fix = "choose another output folder"
            raise UserError("output", got=str(output / name), wanted="a folder that does not exist yet", fix=fix)
    for name, part in about["parts"].items():
        try:
            dataset = _unpack_part(name, part, entries, output)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            got = f"part {name}: {type(error).__name__}: {error}"
            raise DatasetError(str(path), got=got, wanted=f"an archive ({SCHEMA})", fix=FIX) from error
        report["parts"][name] = {
            "root": str(dataset.root),
            "episodes": len(dataset),
            "frames": dataset.num_frames,
            "fingerprint": dataset.fingerprint(),
        }
    return report


def _unpack_part(name: str, part: dict[str, Any], entries: Mapping[str, bytes], output: Path) -> LeRobotDataset:
    streams: list[Streams] = [{} for _ in part["episodes"]]
    for stream, about in part["streams"].items():
        where = f"{name}/{about['entry']}"
        arrays = decompress(entries[where], about["shapes"], where)
        for index, values in zip(about["episodes"], arrays, strict=True):
            streams[index][stream] = values
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f".{name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    places = dict.fromkeys(fmt.video_keys(part["features"]), 0)
    try:
        writer = LeRobotWriter(partial, part["features"], part["fps"], robot_type=part["robot_type"])
        with tempfile.TemporaryDirectory(dir=output, prefix=f".{name}.") as folder:
            for row, found in zip(part["episodes"], streams, strict=True):
                _unpack_episode(writer, name, part, row, found, entries, places, Path(folder))
        writer.finalize()
        os.rename(partial, output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return LeRobotDataset(output / name)


def _unpack_episode(
    writer: LeRobotWriter,
    name: str,
    part: dict[str, Any],
    row: dict[str, Any],
    found: Streams,
    entries: Mapping[str, bytes],
    places: dict[str, int],
    folder: Path,
) -> None:
    columns = decode_columns(found, part["features"])
    files: dict[str, tuple[str, Path]] = {}
    about = {field: str(row[field]) for field in ("task_name", "seed", "scene_hash", "policy")} | row.get("extra", {})
    metadata = {"comment": "recorded, not generated by a model; unpacked from an archive", **about}
    for key in places:
        table = found[f"packets/{key}"]
        size = int(table[:, 0].sum())
        data = entries[f"{name}/{key}.h264"][places[key] : places[key] + size]
        places[key] += size
        setting = row["settings"][key]
        packets = Packets(data=data, table_N4=table, setting=setting)
        target = folder / f"{key}.mp4"
        write_packets(target, packets, entries[f"templates/{setting}.mp4"], metadata)
        files[f"videos/{key}"] = (target.name, target)
    if "truth" in row:
        truth: GroundTruth = decode_truth(
            found, part["truths"][row["truth"]] | {"extra": row["extra"]}, columns[MEASURED].astype(np.float64)
        )
        save_truth(folder / "attachment-0", truth)
        files[GROUND_TRUTH_PATH] = ("attachment-0", folder / "attachment-0")
    stats = {key: fmt.column_stats(values) for key, values in columns.items()} | row["pictures"]
    staged = {field: row.get(field, default) for field, default in fmt.EPISODE_COLUMNS.items()}
    staged |= {"length": row["length"], "tasks": [row["instruction"]], "stats": stats, "content_sha256": ""}
    writer.add_copy(staged, columns, files)


def main(argv: list[str]) -> int:
    """``physis data pack FILE DATASET...`` and ``physis data unpack FILE OUT``."""
    verb, rest = argv[0], argv[1:]
    example = "nano.zip runs/nano/train runs/nano/noise" if verb == "pack" else "nano.zip runs/unpacked"
    parser = argparse.ArgumentParser(
        prog=f"physis data {verb}",
        description=(__doc__ or "").split("\n\n")[1],
        epilog=f"example: physis data {verb} {example}",
    )
    parser.add_argument("archive", help="the archive, by habit named .zip")
    if verb == "pack":
        parser.add_argument("datasets", nargs="+", help="dataset folders; their names become the parts' names")
    else:
        parser.add_argument("output", help="folder below which the parts are written")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(rest)
    if verb == "pack":
        roots = {Path(root).resolve().name: root for root in options.datasets}
        if len(roots) != len(options.datasets):
            got = [Path(root).name for root in options.datasets]
            raise UserError("datasets", got=got, wanted="folders with different names", fix="rename one of them")
        report = pack(options.archive, roots)
    else:
        report = unpack(options.archive, options.output)
    print(json.dumps(report, indent=2) if options.json else _text(report))
    return 0


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name}: {part}" for name, part in report["parts"].items()]
    if "bytes" in report:
        lines.insert(0, f"{report['archive']}: {report['bytes'] / 1e6:.2f} MB")
    return "\n".join([*lines, f"content {report['content_sha256']}"])
