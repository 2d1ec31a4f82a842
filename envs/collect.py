"""``physis data collect``: demonstrations from RoboTwin as a LeRobot v3 dataset with exact ground truth beside it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError, UserError, check_at_least, unknown_name
from physisforcing.core.files import locked
from physisforcing.core.lerobot import LeRobotDataset, LeRobotWriter
from physisforcing.core.lerobot_format import write_json
from physisforcing.core.shards import parse_shard
from physisforcing.core.stats import wilson

from .collector import POLICIES, JointCollector, episode_key
from .recording import GROUND_TRUTH, PICTURES
from .seeds import Job, Outcome, run_seeds, split_of
from .shards import ShardPlan

HELP = """Record demonstrations in RoboTwin.

settings (field=value):
  tasks=[click_bell,adjust_bottle]   which tasks (task=click_bell is short for one)
  output=PATH                        dataset folder; run the same command again to continue an interrupted collection
  episodes=20 start_seed=0           per task; seeds whose scene does not come to rest are skipped, counted and listed
  policy=expert                      expert | expert+noise (joint noise at the start) | expert+errors (replanned every 32 steps, its
                                     targets executed with smooth errors; deviation drawn up to noise_rad=0.06) | expert+random (smooth
                                     random targets from some step on) | random | module:factory (called without arguments)
  ground_truth=sparse                poses, cameras, contacts of every frame; depth and body ids of every 8th frame;
                                     full: of all frames; poses: of none; none: no ground truth
  keep=all                           success: scenes in which the policy fails are skipped, counted and listed
  pictures=240x320 crf=18            or 120x160: halved by area; crf: x264's quality, smaller is better
  shard=0/4                          this machine's part of a collection that four share; physis data merge joins them
  instruction=template               full: the task's one general description; others: see physis tasks <task>
  embodiment=null                    another robot of the assets
  randomization=demo_clean           demo_randomized: RoboTwin's textures, light, clutter and table height; test_ood: as in test_ood manifests
  cameras=[head] workers=2 hold_frames=4 max_steps=null time_limit_s=0
flags: --json prints the summary as JSON

examples:
  physis data collect tasks=[click_bell] episodes=20 output=runs/bell
  physis data collect task=click_bell,adjust_bottle episodes=50 start_seed=100000 output=runs/test workers=4
  physis data collect task=click_bell episodes=200 shard=0/4 output=runs/part0"""


#: Which episodes a collection holds, and how many scenes of a task may be rejected before the first one is kept, or crash in a row.
KEEP, PATIENCE = ("all", "success"), 30


@dataclass(slots=True, kw_only=True)
class CollectConfig:
    """Settings of a collection (see ``HELP``)."""

    output: str
    tasks: list[str] = field(default_factory=lambda: ["click_bell"])
    episodes: int = 20
    start_seed: int = 0
    policy: str = "expert"
    ground_truth: str = "sparse"
    keep: str = "all"
    pictures: str = "240x320"
    crf: int = 18
    shard: str = "0/1"
    instruction: str = "template"
    embodiment: str | None = None
    randomization: str = "demo_clean"
    cameras: list[str] = field(default_factory=lambda: ["head"])
    workers: int = 2
    hold_frames: int = 4
    noise_rad: float = 0.06
    max_steps: int | None = None
    time_limit_s: float = 0.0

    def check(self) -> None:
        """``UserError`` for what would fail only after the simulator has started."""
        from .robotwin.instructions import check_instruction
        from .robotwin.randomization import RANDOMIZATIONS
        from .robotwin.tasks import task_info

        for task in self.tasks:
            task_info(task)
        split_of(self.start_seed)
        check_at_least(self, episodes=1, workers=0, hold_frames=0, time_limit_s=0, crf=0)
        if self.ground_truth not in GROUND_TRUTH:
            fix = f"choose from {', '.join(GROUND_TRUTH)}"
            raise UserError("ground_truth", got=self.ground_truth, wanted="a known level", fix=fix)
        check_instruction(self.instruction)
        if self.randomization not in RANDOMIZATIONS:
            raise unknown_name("randomization", self.randomization, RANDOMIZATIONS, see="physis data collect --help")
        if self.keep not in KEEP:
            raise unknown_name("keep", self.keep, KEEP, see="physis data collect --help")
        if self.pictures not in PICTURES:
            raise unknown_name("pictures", self.pictures, PICTURES, see="physis data collect --help")
        part, _ = parse_shard(self.shard)
        if part >= self.episodes:
            fix = "use fewer shards or record more episodes"
            raise UserError("shard", got=self.shard, wanted=f"a part of {self.episodes} episodes", fix=fix)
        if self.policy not in POLICIES and ":" not in self.policy:
            wanted = f"{', '.join(POLICIES)} or module:factory"
            raise UserError("policy", got=self.policy, wanted=wanted, fix="policy=expert")


def _by_policy(key: str, policy: str) -> bool:
    suffix = episode_key(Job(task="", seed=0), policy).removeprefix("-00000000")
    return re.search(rf"-\d{{8,}}{re.escape(suffix)}$", key) is not None


class Collection:
    """A collection under way: its plan, and what becomes of its seeds."""

    def __init__(self, config: CollectConfig) -> None:
        self.config, self.root = config, Path(config.output)
        self.skipped = _without_crashes(_read_skipped(self.root), config.policy)
        taken = _taken(self.root, config, self.skipped)
        self.plan = ShardPlan(config.tasks, config.episodes, config.start_seed, taken, parse_shard(config.shard))
        self.successes = 0
        self._cpu_s: dict[str, list[float]] = {task: [] for task in config.tasks}
        self._rejected: dict[str, int] = {}
        self._crashed: dict[str, int] = {}  # in a row
        self._began = self._ended = 0.0

    def note(self, outcome: Outcome) -> None:
        """A seed is dealt with. ``UserError`` for a policy that never does the task although only successes are kept, ``RuntimeError`` where seed after seed
        of a task crashes: there is no end of seeds, and the program is broken, not they."""
        self._ended = time.time()
        self._began = self._began or self._ended - outcome.seconds
        self._crashed[outcome.task] = self._crashed.get(outcome.task, 0) + 1 if outcome.kind == "crashed" else 0
        if outcome.kind == "recorded":
            self.successes += outcome.details["success"]
            self._cpu_s[outcome.task].append(outcome.details["cpu_s"])
            return
        reason = {"task": outcome.task, "seed": outcome.seed, "policy": self.config.policy, "reason": outcome.kind}
        self.skipped.append(reason | {"message": outcome.message.strip()[-2000:]})
        write_json(self.root / "skipped.json", self.skipped)
        if self._crashed[outcome.task] >= PATIENCE:
            last = outcome.message.strip()[-2000:]
            raise RuntimeError(f"{outcome.task}: {PATIENCE} episodes in a row crashed; the last one: {last}")
        if outcome.kind == "rejected" and not self.plan.recorded[outcome.task]:
            self._rejected[outcome.task] = self._rejected.get(outcome.task, 0) + 1
            if self._rejected[outcome.task] >= PATIENCE:
                got = f"{outcome.task}: {PATIENCE} scenes and no success ({outcome.message})"
                raise UserError("keep", got=got, wanted="a policy that can do the task", fix="use keep=all")

    def finish(self) -> dict[str, Any]:
        """Close the dataset and write the summary."""
        writer = LeRobotWriter.resume(self.root)
        if writer is not None:
            writer.finalize()
        summary = _summary(self.config, self.skipped, self._ended - self._began)
        for task, spent in self._cpu_s.items():
            # The median: a worker's first episode also compiles the shaders.
            summary["tasks"][task]["cpu_s_per_episode"] = round(statistics.median(spent), 2) if spent else None
        write_json(self.root / "collect.json", summary)
        return summary


class _JointPlan:
    """The plans of several collections, one after the other; a job's task is ``<collection>/<task>``."""

    def __init__(self, collections: dict[str, Collection]) -> None:
        self._collections = collections

    def next(self) -> Job | None:
        for name, collection in self._collections.items():
            if (job := collection.plan.next()) is not None:
                return Job(task=f"{name}/{job.task}", seed=job.seed)
        return None

    def report(self, outcome: Outcome) -> None:
        name, own = _apart(outcome)
        self._collections[name].plan.report(own)


def _apart(outcome: Outcome) -> tuple[str, Outcome]:
    """The collection's name, and the outcome as that collection knows it."""
    name, _, task = outcome.task.partition("/")
    return name, dataclasses.replace(outcome, task=task)


def collect_together(configs: dict[str, CollectConfig], *, progress: bool = True) -> dict[str, dict[str, Any]]:
    """Run or continue several collections with the same processes; their summaries, by name.

    So the processes start once. ``workers`` and ``time_limit_s`` are those of the first. ``UserError`` where another process collects into one of
    the outputs.
    """
    assert configs, "at least one collection"
    for config in configs.values():
        config.check()
    # two processes would record the same seeds, and each forget what the other skipped
    with contextlib.ExitStack() as held:
        for output in sorted({Path(config.output).resolve() for config in configs.values()}):
            held.enter_context(locked(output, "collection"))
        return _collect(configs, progress)


def _collect(configs: dict[str, CollectConfig], progress: bool) -> dict[str, dict[str, Any]]:
    from tqdm import tqdm

    collections = {name: Collection(config) for name, config in configs.items()}
    missing = sum(collection.plan.missing() for collection in collections.values())
    bar = tqdm(total=missing, desc="episodes", unit="ep", disable=not progress, file=sys.stderr)

    def on_outcome(outcome: Outcome) -> None:
        name, own = _apart(outcome)
        collections[name].note(own)
        bar.update(own.kind == "recorded")
        skipped = sum(len(collection.skipped) for collection in collections.values())
        bar.set_postfix(success=sum(c.successes for c in collections.values()), skipped=skipped)

    first = next(iter(configs.values()))
    try:
        with bar:
            run_seeds(
                _JointPlan(collections),
                partial(JointCollector, configs),
                workers=min(first.workers, max(1, missing)) if first.workers else 0,
                on_outcome=on_outcome,
                time_limit_s=first.time_limit_s,
            )
    except BaseException:  # what is complete stays usable
        for collection in collections.values():
            if not collection.plan.missing():
                collection.finish()
        raise
    return {name: collection.finish() for name, collection in collections.items()}


def collect(config: CollectConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run or continue a collection and return its summary; ``IncompleteCoverageError`` is the command's business.

    The summary (also ``<output>/collect.json``): per task how many were recorded and succeeded, seeds that were skipped
    with their reason (also ``<output>/skipped.json``), sizes and times.
    """
    return collect_together({"all": config}, progress=progress)["all"]


def _without_crashes(rows: list[dict[str, Any]], policy: str) -> list[dict[str, Any]]:
    """A crash says something about the program that crashed, not about the scene: this policy tries the seed again."""
    return [row for row in rows if (row["reason"], row["policy"]) != ("crashed", policy)]


def _taken(root: Path, config: CollectConfig, skipped: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Seeds that this policy has dealt with in earlier runs."""
    taken = {(row["task"], row["seed"]): row["reason"] for row in skipped if row["policy"] == config.policy}
    writer = LeRobotWriter.resume(root)
    if writer is not None:
        for row in writer.sidecars():
            if _by_policy(row["key"], config.policy):
                taken[row["task_name"], row["seed"]] = "recorded"
    return taken


def _read_skipped(root: Path) -> list[dict[str, Any]]:
    path = root / "skipped.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _summary(config: CollectConfig, skipped: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    root = Path(config.output)
    tasks: dict[str, Any] = {}
    dataset = LeRobotDataset(root) if (root / "meta/info.json").exists() else None
    part, parts = parse_shard(config.shard)
    rows = [e for e in (dataset.episodes if dataset else []) if _by_policy(e.key, config.policy)]
    for task in config.tasks:
        mine = [episode for episode in rows if episode.task_name == task]
        good = sum(bool(episode.success) for episode in mine)
        missed = [row for row in skipped if row["task"] == task and row["policy"] == config.policy]
        tasks[task] = {
            "recorded": len(mine),
            "wanted": len(range(part, config.episodes, parts)),
            "successes": good,
            "success_interval": [round(x, 4) for x in wilson(good, len(mine))],
            "frames": sum(episode.length for episode in mine),
            "skipped": [{"seed": row["seed"], "reason": row["reason"]} for row in missed],
        }
    videos = sorted(root.glob("videos/**/*.mp4"))
    size = sum(path.stat().st_size for path in videos)
    truth = sum(path.stat().st_size for path in root.glob("ground_truth/**/*.safetensors"))
    count = max(1, len(videos))
    return {
        "output": str(root),
        "episodes": len(dataset) if dataset else 0,
        "frames": dataset.num_frames if dataset else 0,
        "fingerprint": dataset.fingerprint() if dataset else "",
        "tasks": tasks,
        "video_kb_per_episode": round(size / count / 1000, 1),
        "ground_truth_kb_per_episode": round(truth / count / 1000, 1),
        "seconds": round(seconds, 1),
        "config": dataclasses.asdict(config),
    }


def show(summary: dict[str, Any]) -> None:
    """Print a summary for people."""
    print(f"{summary['output']}: {summary['episodes']} episodes, {summary['frames']} frames, {summary['seconds']} s")
    for task, row in summary["tasks"].items():
        low, high = row["success_interval"]
        print(
            f"  {task:20} {row['successes']}/{row['recorded']} succeeded ({low:.2f}-{high:.2f}), {row['frames']} frames"
        )
        if row["skipped"]:
            listed = ", ".join(f"{skip['seed']} ({skip['reason']})" for skip in row["skipped"])
            print(f"  {'':20} {len(row['skipped'])} seeds skipped: {listed}")
    print(
        f"  per episode: video {summary['video_kb_per_episode']} kB, ground truth {summary['ground_truth_kb_per_episode']} kB"
    )


def expand_lists(arguments: list[str], names: dict[str, str]) -> list[str]:
    """``task=a,b`` and ``tasks=a`` as ``tasks=[a,b]``: what people type for a list with one or two entries."""
    expanded = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in names and not value.startswith("["):
            argument = f"{names[key]}=[{value}]"
        elif equals and key in names:
            argument = f"{names[key]}={value}"
        expanded.append(argument)
    return expanded


def main(argv: list[str]) -> int:
    """``physis data collect``. Exit code 3 when fewer episodes could be recorded than were asked for."""
    parser = argparse.ArgumentParser(
        prog="physis data collect", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    options = parser.parse_intermixed_args(argv)
    from physisforcing.core.config import compose

    lists = {"task": "tasks", "tasks": "tasks", "cameras": "cameras"}
    overrides = [o.replace("root=", "output=", 1) if o.startswith("root=") else o for o in options.overrides]
    config = compose("collect", expand_lists(overrides, lists), CollectConfig)
    summary = collect(config)
    print(json.dumps(summary, indent=2)) if options.json else show(summary)
    short = {t: row for t, row in summary["tasks"].items() if row["recorded"] < row["wanted"]}
    if short:
        counts = ", ".join(f"{task} {row['recorded']}/{row['wanted']}" for task, row in short.items())
        raise IncompleteCoverageError(f"recorded only {counts}; run the same command again to continue")
    return 0
