"""`physis pack track1`: generated videos as a WorldArena Track 1 submission, checked before it gets its name."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from physisforcing.core.errors import UserError

from .track1 import check_archive
from .track1_names import FIELDS, ReadmeError, front_matter
from .track1_report import README, V1_SUFFIXES, Track1Report, Track1Rules, as_text

HELP = """usage: physis pack track1 VIDEOS ARCHIVE --model-name NAME --version V --organization O --release-year Y
                         --source-type open_source|closed_source --control-type text_driven|action_driven|hybrid [options]

Pack a folder of videos, named {task}_episode{NN}.mp4 or episode_{NNNNNN}.mp4, into a submission and check it. An archive
that fails the check is not written. Videos are packed as they are.

  physis pack track1 runs/videos submission.tar.gz --readme model_readme.md --summary summary.json
  physis pack track1 runs/clips Pico_eval.tar.gz --layout v1 --readme model_readme.md

options:
  --layout wa2|v1    wa2: model_readme.md and videos/; v1: a folder named like the archive with the three folders {model}_test,
                     {model}_test_1 and {model}_test_2 that stand in VIDEOS
  --readme FILE      a finished model_readme.md in place of the fields
  --license, --paper-url, --code-url
  --summary FILE, --frames N|gt|any, --fps N   see physis check track1 --help

Exit code 0: written, 1: not valid and not written, 2: a mistake in the command."""


def pack(videos: Path, archive: Path, readme: bytes, rules: Track1Rules) -> Track1Report:
    """Write and check a submission; it gets its name only when it is valid. The same input gives the same bytes.

    ``rules.layout`` chooses the layout (empty: ``wa2``). ``UserError`` for folders without videos, links among them and a README
    that is wrong.
    """
    rules.layout = rules.layout or "wa2"
    rules.check()
    try:
        front_matter(readme)
    except ReadmeError as error:
        fix = "see physis pack track1 --help"
        raise UserError("model_readme.md", got=str(error), wanted="a valid front matter", fix=fix) from error
    if not archive.name.endswith((".tar.gz", ".tgz")):
        raise UserError("ARCHIVE", got=archive.name, wanted="a name that ends in .tar.gz", fix="submission.tar.gz")
    root = archive.name.removesuffix(".tar.gz").removesuffix(".tgz") if rules.layout == "v1" else ""
    readme_name = f"{root}/{README}" if root else README
    entries: list[tuple[str, bytes | Path]] = [(readme_name, readme), *_files(videos, rules.layout, root)]
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{os.getpid()}.partial.{archive.name}")
    try:
        _write(partial, entries)
        report = check_archive(partial, rules)
        if report.valid:
            os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _files(videos: Path, layout: str, root: str) -> Sequence[tuple[str, bytes | Path]]:
    """(name in the archive, file), sorted."""
    if layout == "wa2":
        found = [(f"videos/{path.name}", path) for path in _mp4s(videos)]
    else:
        folders = [path for path in sorted(videos.iterdir()) if path.is_dir() and path.name.endswith(V1_SUFFIXES)]
        found = [(f"{root}/{folder.name}/{path.name}", path) for folder in folders for path in _mp4s(folder)]
    if not found:
        wanted = "a folder of .mp4 files" if layout == "wa2" else "folders {model}_test, {model}_test_1, {model}_test_2"
        raise UserError("VIDEOS", got=str(videos), wanted=wanted, fix="check the path, or --layout")
    return found


def _mp4s(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError("VIDEOS", got=str(folder), wanted="a folder", fix="check the path")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4")
    link = next((path for path in found if path.is_symlink() or not path.is_file()), None)
    if link is not None:
        raise UserError("VIDEOS", got=str(link), wanted="files, no links", fix="copy the video itself")
    return found


def _write(path: Path, entries: list[tuple[str, bytes | Path]]) -> None:
    """Owners, times and modes are the same for everybody: who packed is nobody's business."""
    with path.open("xb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for name, content in entries:
                info = tarfile.TarInfo(name)
                info.mode = 0o644
                info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
                with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                    archive.addfile(info, file)


def readme_text(values: dict[str, str]) -> bytes:
    """A ``model_readme.md`` from its fields. ``UserError`` names a required field that is missing."""
    import yaml

    for name, (required, _) in FIELDS.items():
        if required and not values.get(name):
            option = "--" + name.replace("_", "-")
            raise UserError(option, got=None, wanted="a value", fix=f"{option} ..., or --readme FILE")
    given: dict[str, str | int] = {name: values[name] for name in FIELDS if values.get(name)}
    if values["release_year"].isdecimal():
        given["release_year"] = int(values["release_year"])
    block = yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    title = f"# {values['model_name']} {values['version']}"
    return f"---\n{block}---\n\n{title}\n\nGenerated videos of the WorldArena Track 1 test split.\n".encode()


def main(argv: Sequence[str]) -> int:
    """See ``HELP``."""
    parser = argparse.ArgumentParser(prog="physis pack track1", usage=argparse.SUPPRESS, add_help=False)
    parser.add_argument("videos", nargs="?", type=Path)
    parser.add_argument("archive", nargs="?", type=Path)
    for name in FIELDS:
        parser.add_argument("--" + name.replace("_", "-"), default="")
    parser.add_argument("--readme", type=Path)
    parser.add_argument("--layout", default="wa2")
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--frames", default="")
    parser.add_argument("--fps", type=float, default=24.0)
    parser.add_argument("-h", "--help", action="store_true")
    options = parser.parse_args(list(argv))
    if options.help:
        print(HELP)
        return 0
    if options.videos is None or options.archive is None:
        raise UserError("VIDEOS ARCHIVE", got=None, wanted="a folder and a file", fix="physis pack track1 --help")
    if options.readme is not None and not options.readme.is_file():
        raise UserError("--readme", got=str(options.readme), wanted="a file", fix="check the path")
    values = {name: getattr(options, name) for name in FIELDS}
    readme = options.readme.read_bytes() if options.readme is not None else readme_text(values)
    rules = Track1Rules(layout=options.layout, summary=options.summary, frames=options.frames, fps=options.fps)
    report = pack(options.videos, options.archive, readme, rules)
    print(as_text(report))
    print(f"wrote {options.archive}" if report.valid else "nothing was written")
    return 0 if report.valid else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
