"""Recall and precision of ``physis data prepare``'s filters on planted clips.

    python benchmarks/data_prepare.py --data DATASET [DATASET ...] --work FOLDER [--seeds 0 1] [--out docs/results/data_prepare.json]
    python benchmarks/data_prepare.py --data runs/nano/train --work FOLDER --seeds 0 1 3 4 7 8 9 --name eight_tasks --out eight_tasks.json

The datasets are recorded robot episodes with a task each. Of them 200 clips a seed are written as videos with a table: clean ones, static
ones, copies of clean ones, ones with the caption of another task, and ones that are cut together from two episodes. Even seeds
draw from even episodes, odd ones from odd. Then the command runs on the table, and what it dropped is compared with what was planted.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing.core.stats import wilson
from physisforcing.core.video import write_mp4

#: Planted clips of each kind; the rest of 200 is clean.
COUNTS = {"static": 30, "duplicate": 30, "misaligned": 30, "cut": 20, "clean": 90}
#: How a copy differs from its original; each copy has one or two of these and is encoded again.
COPIES = ("encoded", "smaller", "cropped", "enlarged", "later", "earlier", "brighter", "darker", "flat")


@dataclass(slots=True, kw_only=True)
class Take:
    """A recording to plant from. ``frames``: gives RGB uint8 [T,H,W,3]."""

    frames: Callable[[], NDArray[np.uint8]]
    fps: float
    caption: str
    task: str


@dataclass(slots=True, kw_only=True)
class Planted:
    """A written clip. ``kind``: a key of ``COUNTS``; ``original``: name of the clip that it repeats; ``how``: what was done."""

    name: str
    kind: str
    caption: str
    task: str
    original: str = ""
    how: str = ""


def plant(takes: Sequence[Take], folder: Path, counts: dict[str, int], generator: np.random.Generator) -> list[Planted]:
    """Write the clips and ``manifest.csv`` (columns as in public examples of RoVid-X's), and say what is what.

    ``takes`` are used up one after the other in a drawn order: one a clip, two a cut, none for a copy.
    """
    order = iter(generator.permutation(len(takes)))
    planted: list[Planted] = []
    names = iter(f"clip{k:03d}.mp4" for k in generator.permutation(sum(counts.values())))

    def write(kind: str, take: Take, frames: NDArray[np.uint8], crf: int, **more: str) -> Planted:
        made = Planted(name=next(names), kind=kind, caption=take.caption, task=take.task, **more)
        height, width = (side - side % 2 for side in frames.shape[1:3])
        write_mp4(folder / made.name, frames[:, :height, :width], take.fps, crf=crf)
        planted.append(made)
        return made

    clean = []
    for _ in range(counts["clean"]):
        take = takes[next(order)]
        clean.append((take, write("clean", take, take.frames(), 20)))
    for _ in range(counts["static"]):
        take = takes[next(order)]
        how = str(generator.choice(["noise", "lamp", "frozen", "sway"]))
        write("static", take, still(take.frames(), how, generator), 23, how=how)
    for _ in range(counts["misaligned"]):
        take = takes[next(order)]
        others = [other for other in takes if other.task != take.task]
        made = write("misaligned", take, take.frames(), 20, how=take.task)
        made.caption = others[int(generator.integers(len(others)))].caption
    for _ in range(counts["cut"]):
        take, other = takes[next(order)], takes[next(order)]
        write("cut", take, spliced(take.frames(), other.frames(), generator), 20, how=other.task)
    for k in generator.permutation(len(clean))[: counts["duplicate"]]:
        take, original = clean[k]
        frames, how = copied(take.frames(), take.fps, generator)
        write("duplicate", take, frames, int(generator.integers(24, 33)), original=original.name, how=how)
    with (folder / "manifest.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["caption_short_list", "video_path", "task"])
        # Everything is told but the truth: the task's name would give a wrong caption away.
        table.writerows([json.dumps([one.caption]), one.name, ""] for one in sorted(planted, key=lambda p: p.name))
    (folder / "planted.json").write_text(json.dumps([_plain(one) for one in planted], indent=1))
    return planted


def still(frames_THWC: NDArray[np.uint8], how: str, generator: np.random.Generator) -> NDArray[np.uint8]:
    """One picture of a take for all of its time: as it is, under a camera's noise, under a lamp that changes, or from a camera
    that trembles by a third of a pixel."""
    import cv2

    picture = frames_THWC[int(generator.integers(len(frames_THWC)))].astype(np.float32)
    out = np.repeat(picture[None], len(frames_THWC), axis=0)
    if how == "noise":
        out += generator.normal(0, generator.uniform(2, 5), out.shape)
    if how == "sway":
        size = picture.shape[1], picture.shape[0]
        moves = [np.array([[1, 0, x], [0, 1, y]]) for x, y in generator.normal(0, 0.3, (len(out), 2))]
        out = np.stack([cv2.warpAffine(picture, m, size, borderMode=cv2.BORDER_REPLICATE) for m in moves])
    if how == "lamp":
        phase = np.linspace(0, generator.uniform(2, 6) * np.pi, len(out))
        out *= 1 + generator.uniform(0.03, 0.1) * np.sin(phase)[:, None, None, None]
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def spliced(
    one_THWC: NDArray[np.uint8], two_THWC: NDArray[np.uint8], generator: np.random.Generator
) -> NDArray[np.uint8]:
    """The first part of one take and the last of another, at the size of the first."""
    import cv2

    share = generator.uniform(0.3, 0.7)
    size = one_THWC.shape[2], one_THWC.shape[1]
    rest = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in two_THWC[int(share * len(two_THWC)) :]]
    return np.concatenate([one_THWC[: int(share * len(one_THWC))], np.stack(rest)])


def copied(frames_THWC: NDArray[np.uint8], fps: float, generator: np.random.Generator) -> tuple[NDArray[np.uint8], str]:
    """A near copy of a take, and what was done to it."""
    chosen = [str(how) for how in generator.choice(COPIES, size=int(generator.integers(1, 3)), replace=False)]
    out = frames_THWC
    for how in chosen:
        out = _changed(out, how, fps, generator)
    return out, "+".join(chosen)


def _changed(frames: NDArray[np.uint8], how: str, fps: float, generator: np.random.Generator) -> NDArray[np.uint8]:
    import cv2

    height, width = frames.shape[1:3]
    if how in ("cropped", "enlarged"):
        share = generator.uniform(0.86, 0.96)
        rows, columns = int(height * share) // 2 * 2, int(width * share) // 2 * 2
        top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
        frames = frames[:, top : top + rows, left : left + columns]
        if how == "enlarged":
            frames = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_CUBIC) for f in frames])
    elif how == "smaller":
        small = (int(width * 0.7) // 2 * 2, int(height * 0.7) // 2 * 2)
        frames = np.stack([cv2.resize(f, small, interpolation=cv2.INTER_AREA) for f in frames])
    elif how in ("later", "earlier"):
        gone = max(1, min(round(generator.uniform(0.2, 1.0) * fps), len(frames) // 4))
        frames = frames[gone:] if how == "later" else frames[:-gone]
    elif how in ("brighter", "darker", "flat"):
        gain, lift = {"brighter": (1.15, 8), "darker": (0.8, 0), "flat": (0.75, 40)}[how]
        frames = np.clip(np.rint(frames.astype(np.float32) * gain + lift), 0, 255).astype(np.uint8)
    return frames


def _plain(one: Planted) -> dict[str, str]:
    return {name: getattr(one, name) for name in Planted.__slots__}


@dataclass(slots=True, kw_only=True)
class Counts:
    """Of one kind of plant: planted, found, dropped for that reason, and of those rightly."""

    planted: int = 0
    found: int = 0
    dropped: int = 0
    right: int = 0

    @property
    def recall(self) -> float:
        return self.found / self.planted if self.planted else float("nan")

    @property
    def precision(self) -> float:
        return self.right / self.dropped if self.dropped else float("nan")


def score(planted: Sequence[Planted], records: Sequence[Any]) -> tuple[dict[str, Counts], dict[str, Any]]:
    """``Counts`` of every kind and of ``all``, and particulars.

    A planted clip is found when it is dropped for its own reason; of a copy and its original either may go, since they are one
    recording. ``all``: dropped clips for whatever reason against planted ones. ``strict``: the same, but an original that went in place
    of its copy is wrong, and its copy is missed. ``records``: ``ClipRecord`` of every clip.
    """
    record = {Path(one.path).name: one for one in records}
    by_id = {one.id: Path(one.path).name for one in records}
    reason = {name: one.reason for name, one in record.items()}
    pair = {one.name: one.original for one in planted if one.original}
    back = {original: copy for copy, original in pair.items()}
    truth = {one.name: one.kind for one in planted}
    counts = {kind: Counts() for kind in (*(k for k in COUNTS if k != "clean"), "all", "strict")}
    swapped = 0

    def in_place_of_its_copy(name: str) -> bool:
        partner = back.get(name, "")
        twin = by_id.get(record[name].detail.removeprefix("repeats "), "")
        return reason[name] == "duplicate" and partner == twin and not reason[partner]

    for one in planted:
        if one.kind == "clean":
            continue
        swap = one.kind == "duplicate" and in_place_of_its_copy(one.original)
        swapped += swap
        counts[one.kind].planted += 1
        counts["all"].planted += 1
        counts["strict"].planted += 1
        counts["strict"].found += bool(reason[one.name])
        counts[one.kind].found += reason[one.name] == one.kind or swap
        counts["all"].found += bool(reason[one.name]) or swap
    for name, why in reason.items():
        if why:
            right = truth[name] != "clean" or in_place_of_its_copy(name)
            counts["all"].dropped += 1
            counts["strict"].dropped += 1
            counts["strict"].right += truth[name] != "clean"
            counts["all"].right += right
            kind = counts[why] if why in counts else None
            if kind is not None:
                kind.dropped += 1
                kind.right += truth[name] == why or in_place_of_its_copy(name)
    wrong = {name: [truth[name], why] for name, why in reason.items() if (truth[name] == "clean") == bool(why)}
    return counts, {"originals_dropped_for_their_copy": swapped, "wrong": wrong}


def takes_of(folders: Sequence[str], part: int) -> list[Take]:
    """Every second episode of the datasets, from number ``part`` on."""
    from physisforcing.core.lerobot import LeRobotDataset

    takes = []
    for folder in folders:
        data = LeRobotDataset(folder)
        for episode in data.episodes[part::2]:
            frames = partial(data.frames, episode.index)
            takes.append(Take(frames=frames, fps=data.fps, caption=episode.instruction, task=episode.task_name))
    return takes


def main() -> int:
    from physisforcing.planner.measurements import machine_provenance, measurement, placeless, write_measurements
    from physisforcing.worldmodel.data.clips.command import prepare_clips
    from physisforcing.worldmodel.data.clips.manifest import ClipManifest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the videos and what the command writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--name", default="recordings", help="of these recordings in the claims")
    parser.add_argument("--out")
    options = parser.parse_args()
    command = placeless(shlex.join(["python", "benchmarks/data_prepare.py", *sys.argv[1:]]))
    lines = []
    for seed in options.seeds:
        folder = options.work / f"seed{seed}"
        if not (folder / "planted.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            plant(takes_of(options.data, seed % 2), folder, COUNTS, np.random.default_rng(seed))
        planted = [Planted(**one) for one in json.loads((folder / "planted.json").read_text())]
        anew, begun = not (folder / "prepared").exists(), time.perf_counter()
        prepare_clips(folder / "prepared", folder / "manifest.csv", progress=True)
        seconds = time.perf_counter() - begun
        counts, more = score(planted, ClipManifest(folder / "prepared").everything)
        claim = f"{options.name}/seed_{seed}"
        lines += show(claim, seed, counts, more, measurement, command, machine_provenance())
        if anew:
            lines.append(timed(folder, claim, seed, seconds / len(planted), command, machine_provenance()))
    if options.out:
        write_measurements(options.out, lines)
    return 0


def timed(folder: Path, claim: str, seed: int, seconds: float, command: str, provenance: Any) -> dict[str, Any]:
    """How long the command took for a clip, measuring, comparing and writing; with the sizes of its clips."""
    from physisforcing.core.video import probe_mp4
    from physisforcing.planner.measurements import measurement

    found = [probe_mp4(path) for path in sorted(folder.glob("clip*.mp4"))]
    against = {
        "clips": len(found),
        "mean_pictures": round(sum(one.frames for one in found) / len(found), 1),
        "largest": "{}x{}".format(*max((one.height, one.width) for one in found)),
    }
    print(f"  {seconds:.3f} s a clip, {against}")
    return measurement(
        f"data/prepare/{claim}/seconds_a_clip", round(seconds, 4), unit="s", n=len(found), seeds=[seed], against=against, command=command,
        provenance=provenance,
    )  # fmt: skip


def show(
    claim: str,
    seed: int,
    counts: dict[str, Counts],
    more: dict[str, Any],
    measurement: Any,
    command: str,
    provenance: Any,
) -> list[dict[str, Any]]:
    """Print the table of a seed and return its measurements."""
    lines = []
    print(f"{claim}, seed {seed}: originals dropped for their copy {more['originals_dropped_for_their_copy']}")
    for kind, count in counts.items():
        for name, part, whole in (("recall", count.found, count.planted), ("precision", count.right, count.dropped)):
            low, high = wilson(part, whole)
            print(f"  {kind:<11}{name:<10}{part:>4}/{whole:<4} [{low:.3f}, {high:.3f}]")
            if whole:
                lines.append(
                    measurement(
                        f"data/prepare/{claim}/{kind}/{name}",
                        round(part / whole, 4),
                        unit="share",
                        n=whole,
                        low=round(low, 4),
                        high=round(high, 4),
                        seeds=[seed],
                        against={"clips": sum(COUNTS.values()), "clean": COUNTS["clean"]},
                        command=command,
                        provenance=provenance,
                    )
                )
    for name, (kind, why) in sorted(more["wrong"].items()):
        print(f"  {name}: {kind}, {'kept' if not why else f'dropped as {why}'}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
