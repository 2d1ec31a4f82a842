"""``physis data inspect``: check a dataset completely, say what is in it, and draw what the physics losses see of a window."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from physisforcing.core.errors import UserError
from physisforcing.core.inspect import add_arguments, inspect, show

EPILOG = """examples:
  physis data inspect runs/bell
  physis data inspect runs/bell --pictures runs/pictures --episode 3 --start 16
  physis data inspect runs/bell --pictures runs/pictures --model shipped
  physis data inspect runs/bell --pictures runs/pictures physics.select=topk teacher=permissive

fields, with pictures: physics.* and physics=NAME (docs/physics.md), teacher.* and teacher=NAME (physis data targets --help), cache
(folder of cached targets instead of the dataset's own), codec (folder of the model's codec instead of vae beside the model)"""


def main(argv: list[str]) -> int:
    """``physis data inspect PATH [--quick] [--json] [--pictures FOLDER ...] [field=value ...]``."""
    options = _parser().parse_intermixed_args(argv)
    drawn = _draw(options)
    report = inspect(options.root, check=not options.quick)
    if drawn:
        report["pictures"] = [str(path) for path in drawn]
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    show(report)
    if drawn:
        print(f"  pictures     {drawn[0]} and {len(drawn) - 1} single panels beside it")
    if options.tensorboard:
        print(f"  tensorboard  tensorboard --logdir {options.tensorboard}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="physis data inspect",
        description="Check a dataset of any known layout and summarise it; with --pictures also draw a window of it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    group = parser.add_argument_group("pictures of what the physics losses see of one window")
    group.add_argument(
        "--pictures", metavar="FOLDER", help="write PNG files: tracks, scores, mask, relations, one sheet"
    )
    group.add_argument("--tensorboard", metavar="FOLDER", help="the same as image summaries (needs tensorboard)")
    group.add_argument("--episode", type=int, metavar="N", help="episode, counted from 0 (default 0)")
    group.add_argument(
        "--start",
        type=int,
        metavar="STEP",
        help="first control step, a multiple of 8 (default: where most points count)",
    )
    group.add_argument(
        "--model",
        metavar="FOLDER",
        help="also what a world model predicts: its folder, or 'shipped' for the one in this package",
    )
    group.add_argument(
        "--sigma", type=float, metavar="S", help="noise level of the model's input, 0 to 1 (default 0.5)"
    )
    group.add_argument("overrides", nargs="*", metavar="field=value", help="options of losses and teachers, see below")
    return parser


def _draw(options: argparse.Namespace) -> list[Path]:
    wanted = {name: getattr(options, name) for name in ("episode", "start", "model", "sigma")}
    given = {name: value for name, value in wanted.items() if value is not None}
    if not (options.pictures or options.tensorboard):
        words = [f"--{name} {value}" for name, value in given.items()] + options.overrides
        if words:
            fix = "add --pictures FOLDER, or leave it out"
            raise UserError("physis data inspect", got=words[0], wanted="a folder for the pictures with it", fix=fix)
        return []
    from physisforcing.worldmodel.pictures.command import draw_dataset

    return draw_dataset(
        options.root,
        folder=options.pictures,
        tensorboard=options.tensorboard,
        overrides=options.overrides,
        **given,
    )
