"""``physis data prepare OUT IN``: demonstrations as a LeRobot v3 dataset, or clips chosen for training; the input says which."""

from __future__ import annotations

import argparse
from pathlib import Path

from physisforcing.core.errors import UserError
from physisforcing.core.prepare import HELP as CONVERT_HELP
from physisforcing.worldmodel.data.clips.config import HELP as CLIPS_HELP

WAYS = ("auto", "dataset", "clips")
CHOICE = """Two things to make of recordings. A table of clips, or a folder of videos, becomes a list of clips for training of a video
model (to=clips); demonstrations in a known layout become a LeRobot v3 dataset (to=dataset). to= decides where both fit.

"""


def main(argv: list[str]) -> int:
    """``physis data prepare OUT IN [to=dataset|clips] [field=value ...] [--json]``."""
    options = _parser().parse_intermixed_args(argv)
    wanted = [word.partition("=")[2] for word in options.overrides if word.startswith("to=")]
    rest = [word for word in options.overrides if not word.startswith("to=")]
    if wanted and wanted[-1] not in WAYS:
        raise UserError("to", got=wanted[-1], wanted=f"one of {', '.join(WAYS)}", fix="write to=clips or to=dataset")
    way = wanted[-1] if wanted else "auto"
    if way == "auto":
        way = "clips" if holds_clips(options.input) else "dataset"
    from physisforcing.core.config import compose

    if way == "dataset":
        from physisforcing.core.prepare import PrepareConfig, run

        return run(options.output, options.input, compose("prepare", rest, PrepareConfig), as_json=options.json)
    from physisforcing.worldmodel.data.clips.command import run as run_clips
    from physisforcing.worldmodel.data.clips.config import ClipsConfig

    config = compose("prepare_clips", rest, ClipsConfig)
    return run_clips(options.output, options.input, config, as_json=options.json)


def holds_clips(root: str | Path) -> bool:
    """Whether ``root`` is a table of clips (by its name, where there is no such file), or a folder with videos that is no dataset of a
    known layout."""
    from physisforcing.core.errors import DatasetError
    from physisforcing.core.readers import detect_layout
    from physisforcing.worldmodel.data.clips.decode import CONTAINERS
    from physisforcing.worldmodel.data.clips.tables import TABLES

    root = Path(root)
    if root.is_file() or root.suffix.lower() in TABLES:
        return True
    try:
        detect_layout(root)
    except DatasetError:
        return any(path.suffix.lower() in CONTAINERS for path in root.rglob("*"))
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="physis data prepare",
        description=CHOICE + "to=dataset: " + CONVERT_HELP,
        epilog="to=clips: " + CLIPS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", help="folder of the new dataset, or of the list of clips")
    parser.add_argument("input", help="the demonstrations, the videos or the table of clips")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser
