"""``physis data nano``: the dataset on which models of 30 to 60 million parameters are compared, by one command.

Eight tasks; of each 200 demonstrations to train on (seeds from 0), 50 to validate on (from 50000) and 50 that the expert
made with noise in its path (seeds from 0). Six tasks move objects; ``click_bell`` and ``press_stapler`` only touch one that
stands still and serve as controls. The result is three datasets and one archive of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.archive import pack
from physisforcing.core.errors import IncompleteCoverageError, UserError
from physisforcing.core.lerobot_format import write_json

from .collect import CollectConfig, collect_together, expand_lists, show

TASKS = (
    "adjust_bottle",
    "place_empty_cup",
    "stack_blocks_two",
    "shake_bottle",
    "handover_block",
    "grab_roller",
    "click_bell",
    "press_stapler",
)
#: x264's quality of the lean pictures (docs/data.md has the sizes of other values).
LEAN_CRF = 30

HELP = """Record the nano dataset: eight tasks, 200 + 50 demonstrations each and 50 with noise, and pack it.

settings (field=value):
  output=PATH                  gets train/, validation/, noise/, nano.zip and nano.json; run again to continue
  workers=8                    processes
  pictures=120x160 crf=30      lean pictures; 240x320 and crf=18 for a dataset as physis data collect makes it
  ground_truth=poses           poses, cameras and contacts; sparse: also depth and body ids of every 8th frame (targets
                               of the physics losses are made from them); the archive never holds depth and body ids
  train=200 validation=50 noise=50   episodes a task
  tasks=[...]                  other tasks
  shard=0/1                    this machine's part (join the parts' datasets with physis data merge, then pack them)
flags: --json prints the summary as JSON

examples:
  physis data nano output=runs/nano workers=16
  physis data nano output=runs/small train=2 validation=1 noise=1 workers=2"""


@dataclass(slots=True, kw_only=True)
class NanoConfig:
    """Settings of the recipe (see ``HELP``)."""

    output: str
    workers: int = 8
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    train: int = 200
    validation: int = 50
    noise: int = 50
    pictures: str = "120x160"
    crf: int = LEAN_CRF
    ground_truth: str = "poses"
    shard: str = "0/1"

    def parts(self) -> dict[str, CollectConfig]:
        """The collections that make up the dataset, by the name of their folder."""
        wanted = {
            "train": (self.train, 0, "expert"),
            "validation": (self.validation, 50_000, "expert"),
            "noise": (self.noise, 0, "expert+noise"),
        }
        common = {
            name: getattr(self, name) for name in ("workers", "tasks", "pictures", "crf", "ground_truth", "shard")
        }
        made = {
            name: CollectConfig(
                output=str(Path(self.output) / name),
                episodes=episodes,
                start_seed=start,
                policy=policy,
                keep="success" if policy == "expert" else "all",
                **common,
            )
            for name, (episodes, start, policy) in wanted.items()
            if episodes
        }
        if not made:
            fix = "write train=2 validation=1 noise=1 for a small one"
            raise UserError("train", got="no episodes at all", wanted="at least one", fix=fix)
        return made


def nano(config: NanoConfig, *, progress: bool = True) -> dict[str, Any]:
    """Collect what is missing, pack and return the summary (also ``<output>/nano.json``)."""
    started = time.time()
    parts = config.parts()
    summaries = collect_together(parts, progress=progress)
    root = Path(config.output)
    archive = pack(root / "nano.zip", {name: root / name for name in parts})
    summary = {
        "archive": archive,
        "parts": summaries,
        "seconds": round(time.time() - started, 1),
        "config": dataclasses.asdict(config),
    }
    write_json(root / "nano.json", summary)
    return summary


def main(argv: list[str]) -> int:
    """``physis data nano``. Exit code 3 when fewer episodes could be recorded than were asked for."""
    parser = argparse.ArgumentParser(
        prog="physis data nano", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_intermixed_args(argv)
    from physisforcing.core.config import compose

    config = compose("nano", expand_lists(options.overrides, {"task": "tasks", "tasks": "tasks"}), NanoConfig)
    summary = nano(config)
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        for part in summary["parts"].values():
            show(part)
        archive = summary["archive"]
        print(f"{archive['archive']}: {archive['bytes'] / 1e6:.2f} MB, content {archive['content_sha256']}")
    short = [
        f"{name}/{task} {row['recorded']}"
        for name, part in summary["parts"].items()
        for task, row in part["tasks"].items()
        if row["recorded"] < row["wanted"]
    ]
    if short:
        raise IncompleteCoverageError(f"recorded only {', '.join(short)}; run the same command again to continue")
    return 0
