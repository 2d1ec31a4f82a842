"""`physis check track1`: a WorldArena Track 1 submission, looked through without unpacking it.

Two layouts. ``wa2`` (WorldArena 2.0): ``model_readme.md`` with YAML front matter and ``videos/``, at the top or in one folder.
``v1`` (WorldArena): a folder ``{Model}_eval`` with a README and ``{model}_test``, ``{model}_test_1``, ``{model}_test_2``. Names of the
failures that WorldArena 2.0 documents are used where they fit; others are ours.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from physisforcing.core.errors import DatasetError, UserError

from .track1_archive import ArchiveLimits, BadArchiveError, Member, members, save_member
from .track1_names import Episode, ReadmeError, episode_of, front_matter, read_summary
from .track1_report import MOST_TOLD, README, V1_SUFFIXES, Track1Report, Track1Rules, as_json, as_text

if TYPE_CHECKING:
    from physisforcing.core.video import VideoInfo

#: What readers of damaged files raise, besides ``DatasetError``.
_READERS = (ValueError, TypeError, ArithmeticError, LookupError, OSError, MemoryError, AttributeError)

HELP = """usage: physis check track1 ARCHIVE [options]

Check a WorldArena Track 1 submission (.tar.gz or .tgz) as far as it can be done without the organisers. Nothing is unpacked
except one video at a time, into a temporary folder.

  physis check track1 submission.tar.gz
  physis check track1 submission.tar.gz --summary summary.json --frames gt
  physis check track1 Example_eval.tar.gz --layout v1 --frames 121

options:
  --layout NAME      wa2 or v1 (default: what the archive looks like)
  --summary FILE     summary.json of the test set: every episode has to be there, and no other
  --frames N|gt|any  frames a video has to have: a number, as many as its gt_path in the summary, or any (default: 121 for v1,
                     any for wa2, where the length of the real trajectory is recommended)
  --fps N            24      --size WxH   640x480 (wa2: this or larger)
  --decode           decode every video to its end (about 0.3 s each; at most 20000 frames and 60 s of each)
  --json             the result as one JSON document

Exit code 0: valid (warnings are told), 1: not valid, 2: a mistake in the command."""


def check_archive(path: Path, rules: Track1Rules | None = None) -> Track1Report:
    """Look through a submission. Raises ``UserError`` for a file or a summary that is not there; everything else is a finding."""
    rules = rules or Track1Rules()
    rules.check()
    if not path.is_file():
        raise UserError("ARCHIVE", got=str(path), wanted="a .tar.gz or .tgz file", fix="check the path")
    report = Track1Report(layout=rules.layout)
    if not path.name.endswith((".tar.gz", ".tgz")):
        report.add("error", "missing_tar_gz", path.name, "the name ends in .tar.gz or .tgz")
    episodes = read_summary(rules.summary) if rules.summary is not None else None
    try:
        with tempfile.TemporaryDirectory(prefix="physis-track1-") as folder:
            _Walk(rules, report, episodes, Path(folder)).run(path)
    except BadArchiveError as error:
        report.add("error", error.code, error.where, str(error))
    return report


class _Walk:
    """One pass over an archive: layout and names are judged at its end, videos as they come."""

    def __init__(self, rules: Track1Rules, report: Track1Report, episodes: list[Episode] | None, folder: Path) -> None:
        self.rules, self.report, self.episodes, self.folder = rules, report, episodes, folder
        self.readmes: list[PurePosixPath] = []
        self.found: dict[PurePosixPath, list[PurePosixPath]] = {}
        self.reading_s = 0.0

    def run(self, path: Path) -> None:
        for archive, member in members(path, self.rules.limits):
            self._member(archive, member)
        self._judge_layout()

    def _member(self, archive: tarfile.TarFile, member: Member) -> None:
        path, name = member.path, member.path.name
        if name == README or (name.lower().startswith(("readme", "model_readme")) and name.lower().endswith(".md")):
            self.readmes.append(path)
            if name == README:
                self._read_front_matter(save_member(archive, member, self.folder / "readme", 64 * 2**10), str(path))
        elif path.suffix.lower() == ".mp4":
            self.found.setdefault(path.parent, []).append(path)
            video = save_member(archive, member, self.folder / "video.mp4", self.rules.limits.video_bytes)
            self._look_at(video, path)
        elif not name.startswith("."):
            self.report.add("warning", "unexpected_file", str(path), "neither a video nor the README")

    def _read_front_matter(self, file: Path, where: str) -> None:
        try:
            self.report.model = front_matter(file.read_bytes())
        except ReadmeError as error:
            self.report.add("error", "metadata_invalid", where, str(error))

    # ------------------------------------------------------------------ one video

    def _look_at(self, video: Path, path: PurePosixPath) -> None:
        report, rules, begun = self.report, self.rules, time.monotonic()
        report.videos += 1
        if self.reading_s > rules.limits.reading_s:
            report.add("error", "not_checked", str(path), f"the videos before it took {rules.limits.reading_s:g} s")
            return
        try:
            info, frames = _read(video, rules)
        except DatasetError as error:
            report.add("error", "video_unreadable", str(path), str(error.got))
            return
        except _READERS as error:  # a file from anywhere may break a reader in any way
            report.add("error", "video_unreadable", str(path), f"{type(error).__name__}: {error}"[:MOST_TOLD])
            return
        finally:
            self.reading_s += time.monotonic() - begun
        by_rule = "error" if self._layout_of(path) == "v1" else "warning"
        larger = self._layout_of(path) == "wa2" and info.width >= rules.width and info.height >= rules.height
        if (info.width, info.height) != (rules.width, rules.height) and not larger:
            words = f"{info.width}x{info.height}, wanted {rules.width}x{rules.height}"
            report.add(by_rule, "video_size", str(path), words)
        if abs(info.fps - rules.fps) > 0.01:
            report.add(by_rule, "video_fps", str(path), f"{info.fps:g} frames a second, wanted {rules.fps:g}")
        if info.frames and frames != info.frames:
            words = f"{frames} frames can be read of {info.frames} that its header promises"
            report.add("error", "video_unreadable", str(path), words)
        self._check_length(path, frames)

    def _check_length(self, path: PurePosixPath, frames: int) -> None:
        rule = self.rules.frames or ("121" if self._layout_of(path) == "v1" else "any")
        wanted: int | None = None
        if rule == "gt":
            episode = episode_of(path.stem)
            real = next((e for e in self.episodes or [] if episode is not None and e.matches(episode)), None)
            wanted = real.frames() if real is not None else None
        elif rule != "any":
            wanted = int(rule)
        if wanted is not None and frames != wanted:
            self.report.add("error", "video_length", str(path), f"{frames} frames, wanted {wanted}")
        elif frames < 2:
            self.report.add("error", "video_length", str(path), f"{frames} frames are no video")

    # ------------------------------------------------------------------ the whole

    def _layout_of(self, path: PurePosixPath) -> str:
        return self.rules.layout or ("v1" if path.parent.name.endswith(V1_SUFFIXES) else "wa2")

    def _judge_layout(self) -> None:
        report, folders = self.report, list(self.found)
        looks_v1 = any(folder.name.endswith(V1_SUFFIXES) for folder in folders)
        report.layout = self.rules.layout or ("v1" if looks_v1 else "wa2")
        if report.layout == "wa2":
            self._judge_wa2()
        else:
            self._judge_v1()

    def _judge_wa2(self) -> None:
        readmes = [path for path in self.readmes if path.name == README]
        if not readmes:
            self.report.add("error", "missing_model_readme", README, "there is none")
        if len(readmes) > 1:
            self.report.add("error", "metadata_invalid", README, f"{len(readmes)} of them, wanted one")
        root = readmes[0].parent if readmes else PurePosixPath()
        if len(root.parts) > 1:
            self.report.add("error", "missing_model_readme", str(root), "at most one folder stands above it")
        videos = root / "videos"
        for folder, files in self.found.items():
            if folder != videos:
                where = f"{folder} ({len(files)} videos)"
                self.report.add("error", "misplaced_videos", where, f"videos stand in {videos}/, without folders")
        if videos not in self.found:
            code = "empty_video_dir" if not self.found else "missing_videos"
            self.report.add("error", code, str(videos), "no .mp4 in it")
        self._judge_names(videos)

    def _judge_v1(self) -> None:
        roots = {folder.parent for folder in self.found}
        if len(roots) != 1 or len(next(iter(roots)).parts) != 1 or not next(iter(roots)).name.endswith("_eval"):
            where = ", ".join(sorted(map(str, roots)))[:MOST_TOLD] or "."
            self.report.add("error", "layout", where, "one folder {Model}_eval holds everything")
        if not self.readmes:
            self.report.add("error", "missing_model_readme", "README", "there is none")
        stems = {folder.name.rsplit("_test", 1)[0] for folder in self.found if folder.name.endswith(V1_SUFFIXES)}
        root = next(iter(roots), PurePosixPath())
        if len(stems) != 1:
            self.report.add("error", "layout", str(root), f"clip folders of one model, found {sorted(stems)}")
        for stem in sorted(stems):
            for suffix in V1_SUFFIXES:
                folder = next((f for f in self.found if f.name == stem + suffix), root / (stem + suffix))
                if folder not in self.found:
                    self.report.add("error", "missing_videos", str(folder), "the folder is not there, or empty")
                else:
                    self._judge_names(folder)
        for folder in self.found:
            if not folder.name.endswith(V1_SUFFIXES):
                self.report.add("error", "misplaced_videos", str(folder), "not one of the three clip folders")

    def _judge_names(self, folder: PurePosixPath) -> None:
        """Names of one folder: readable, each episode once, and those of the summary."""
        seen: dict[tuple[str | None, int], PurePosixPath] = {}
        given: list[Episode] = []
        for path in self.found.get(folder, []):
            episode = episode_of(path.stem)
            if episode is None:
                words = "wanted {task}_episode{NN}.mp4 or episode_{NNNNNN}.mp4"
                self.report.add("error", "video_name", str(path), words)
                continue
            key = (episode.task, episode.number)
            if key in seen:
                self.report.add("error", "duplicate_episode", str(path), f"the same episode as {seen[key].name}")
            seen[key] = path
            given.append(episode)
        if self.episodes is None:
            return
        missing = [e.name for e in self.episodes if not any(e.matches(g) for g in given)]
        extra = [g.name for g in given if not any(e.matches(g) for e in self.episodes)]
        for code, names in (("missing_episodes", missing), ("unknown_episodes", extra)):
            if names:
                words = f"{len(names)}: {', '.join(sorted(names))}"[:MOST_TOLD]
                self.report.add("error", code, str(folder), words)


def _read(video: Path, rules: Track1Rules) -> tuple[VideoInfo, int]:
    """What the header says, and how many frames there are: decoded, or counted. ``DatasetError`` for a video that is none or too much."""
    from physisforcing.core.video import VideoBounds, count_frames, probe_mp4

    limits, info = rules.limits, probe_mp4(video)
    if info.height * info.width > limits.frame_pixels:
        got, wanted = f"{info.width}x{info.height} pixels", f"at most {limits.frame_pixels} pixels a frame"
        raise DatasetError(video.name, got=f"{got}, {wanted}", wanted=wanted, fix="scale it down")
    if not rules.decode:
        return info, _packets(video, limits)
    bounds = VideoBounds(frames=limits.video_frames, pixels=limits.frame_pixels, seconds=limits.video_s)
    return info, count_frames(video, bounds)


def _packets(video: Path, limits: ArchiveLimits) -> int:
    """Frames whose data are there, read without decoding them."""
    import av

    count, begun = 0, time.monotonic()
    try:
        with av.open(str(video), format="mp4") as container:
            for packet in container.demux(video=0):
                count += packet.size > 0
                if count > limits.video_frames or time.monotonic() - begun > limits.video_s:
                    got = f"more than {limits.video_frames} frames, or {limits.video_s:g} s to read them"
                    raise DatasetError(video.name, got=got, wanted="a shorter video", fix="cut it")
    except av.FFmpegError as error:
        raise DatasetError(video.name, got=str(error), wanted="a whole video", fix="write it again") from error
    return count


def main(argv: Sequence[str]) -> int:
    """See ``HELP``."""
    parser = argparse.ArgumentParser(prog="physis check track1", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("archive", nargs="?", type=Path)
    parser.add_argument("--layout", default="")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--frames", default="")
    parser.add_argument("--fps", type=float, default=24.0)
    parser.add_argument("--size", default="640x480")
    for name in ("decode", "json", "help"):
        parser.add_argument(f"--{name}", *(["-h"] if name == "help" else []), action="store_true")
    options = parser.parse_args(list(argv))
    if options.help:
        print(HELP)
        return 0
    if options.archive is None:
        raise UserError("ARCHIVE", got=None, wanted="a submission", fix="physis check track1 submission.tar.gz")
    width, _, height = options.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UserError("--size", got=options.size, wanted="WIDTHxHEIGHT", fix="--size 640x480")
    rules = Track1Rules(
        layout=options.layout,
        summary=options.summary,
        frames=options.frames,
        fps=options.fps,
        width=int(width),
        height=int(height),
        decode=options.decode,
    )
    report = check_archive(options.archive, rules)
    print(as_json(report) if options.json else as_text(report))
    return 0 if report.valid else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
