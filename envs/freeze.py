"""``physis data manifest``: freeze the scenes of an evaluation (``manifest.py`` says what a frozen scene is).

The expert plays every scene once, here and never at evaluation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError, UserError, check_at_least, unknown_name

from .manifest import Manifest, ManifestEntry, load_manifest
from .seeds import Job, Outcome, SeedPlan, run_seeds, split_of

HELP = """Freeze the scenes of an evaluation: seeds that come to rest and that the expert solves.

settings (field=value):
  tasks=[click_bell]   episodes=50   start_seed=100000   per task; output=FOLDER gets <task>.json each
  name=test            the manifest of a task is called <name>_<task>
  randomization=demo_clean | demo_randomized | test_ood      instruction=template | template_unseen | full
  embodiment=null      another robot of the assets
  swapped=false        true: each task in the scene of the task that shares one with it (other tasks are refused)
  tries=5              at most tries*episodes seeds of a task are tried
  workers=2
A task's manifest is written as soon as it is complete; the same command again continues with the others.
flags: --json prints what was written and which seeds were left out

examples:
  physis data manifest tasks=[click_bell] episodes=50 output=manifests/mine name=mine
  physis data manifest tasks=[click_bell] randomization=test_ood instruction=template_unseen name=ood output=manifests/ood"""


@dataclass(slots=True, kw_only=True)
class ManifestConfig:
    """Settings of ``physis data manifest`` (see ``HELP``)."""

    output: str
    tasks: list[str] = field(default_factory=lambda: ["click_bell"])
    episodes: int = 50
    start_seed: int = 100_000
    name: str = "test"
    randomization: str = "demo_clean"
    instruction: str = "template"
    embodiment: str | None = None
    swapped: bool = False
    tries: int = 5
    workers: int = 2

    def check(self) -> None:
        """``UserError`` for what would fail only after the simulator has started."""
        from .robotwin.instructions import check_instruction
        from .robotwin.randomization import RANDOMIZATIONS
        from .robotwin.tasks import task_info

        check_at_least(self, episodes=1, tries=1, workers=0)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise UserError("name", got=self.name, wanted="letters, digits, '_', '-' and '.'", fix="name=mine")
        split_of(self.start_seed)
        check_instruction(self.instruction)
        if self.randomization not in RANDOMIZATIONS:
            raise unknown_name("randomization", self.randomization, RANDOMIZATIONS, see="physis data manifest --help")
        if not self.tasks:
            raise UserError("tasks", got="none", wanted="at least one", fix="tasks=[click_bell]")
        for task in self.tasks:
            task_info(task)
            self.scene_of(task)
        self.head(self.tasks[0])

    def head(self, task: str) -> dict[str, Any]:
        """All of the manifest of ``task`` but its scenes. ``UserError`` for an unknown robot."""
        from physisforcing.core.vulkan import ensure_vulkan_env

        from .robotwin.embodiment import load_embodiment, resolve_assets
        from .robotwin.runtime import load_runtime

        ensure_vulkan_env()  # before RoboTwin imports SAPIEN
        assets = resolve_assets(None)
        return {
            "name": f"{self.name}_{task}",
            "assets": assets.label,
            "runtime": load_runtime().label,
            "embodiment": load_embodiment(assets, self.embodiment).name,
            "randomization": self.randomization,
            "sentences": self.instruction,
            "scene_of": self.scene_of(task),
        }

    def scene_of(self, task: str) -> str | None:
        """The task whose scene ``task`` is played in; None is its own."""
        from .robotwin.shared_scene import SHARED_SCENES, check_scene_of

        return check_scene_of(task, SHARED_SCENES.get(task, "another scene")) if self.swapped else None


class Verifier:
    """Plays the expert once on a seed, without pictures, and notes the scene."""

    def __init__(self, config: ManifestConfig) -> None:
        self.config = config
        self._env: Any = None
        self._task = ""

    def handle(self, job: Job) -> Outcome:
        import gymnasium

        from . import robotwin  # noqa: F401  (registers the tasks)

        config = self.config
        if self._env is None or self._task != job.task:
            self.close()
            self._env = gymnasium.make(
                f"RoboTwin/{job.task}-v0",
                cameras=(),
                randomization=config.randomization,
                instruction=config.instruction,
                embodiment=config.embodiment,
                scene_of=config.scene_of(job.task),
                disable_env_checker=True,
            ).unwrapped
            self._task = job.task
        observation, info = self._env.reset(seed=job.seed, options={"observe": False})
        if not self._env.play_expert():
            return Outcome(task=job.task, seed=job.seed, kind="rejected", message=f"expert: {self._env.expert_failure}")
        entry = ManifestEntry(
            task=job.task,
            seed=job.seed,
            instruction=observation["instruction"],
            scene_hash=info["scene_hash"],
            expert_steps=self._env.steps,
            settled=tuple((name, *(round(v, 4) for v in pose)) for name, *pose in info["settled"]),
        )
        about = {name: info[name] for name in ("assets", "runtime", "embodiment")}
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details={"entry": entry, "about": about})

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


def freeze(config: ManifestConfig, *, progress: bool = True) -> dict[str, Any]:
    """Write ``<output>/<task>.json`` for each task with enough scenes, as soon as it has them; returns per task what was written
    and which seeds were left out, with their reasons. A task whose file is there, frozen with these settings, is left as it is.
    """
    from tqdm import tqdm

    config.check()
    written = {task: row for task in config.tasks if (row := _kept(config, task)) is not None}
    missing = [task for task in config.tasks if task not in written]
    plan = SeedPlan(missing, config.episodes, config.start_seed, {}, tries=config.tries * config.episodes)
    bar = tqdm(total=plan.missing(), desc="scenes", disable=not progress, file=sys.stderr)
    found: dict[str, list[Outcome]] = {task: [] for task in missing}

    def on_outcome(outcome: Outcome) -> None:
        found[outcome.task].append(outcome)
        bar.update(outcome.kind == "recorded")
        if plan.recorded[outcome.task] == config.episodes:  # then none of its seeds is under way
            written[outcome.task] = _write(config, outcome.task, found[outcome.task])

    with bar:
        run_seeds(plan, partial(Verifier, config), workers=config.workers, on_outcome=on_outcome)
    return {task: written.get(task) or _row(found[task]) for task in config.tasks}


def _kept(config: ManifestConfig, task: str) -> dict[str, Any] | None:
    """The row of a task that an earlier run finished. ``UserError`` where its file was frozen with other settings."""
    path = Path(config.output) / f"{task}.json"
    if not path.is_file():
        return None
    manifest = load_manifest(path)
    wanted = config.head(task)
    same = all(getattr(manifest, name) == value for name, value in wanted.items())
    tried = range(config.start_seed, config.start_seed + config.tries * config.episodes)
    if not same or len(manifest.entries) != config.episodes or any(e.seed not in tried for e in manifest.entries):
        fix = "give this one another folder, or delete the file if nothing was reported on it"
        raise UserError("output", got=str(path), wanted="no manifest, or one with these settings", fix=fix)
    return {"path": str(path), "entries": len(manifest.entries), "key": manifest.key, "skipped": None}


def _row(found: list[Outcome]) -> dict[str, Any]:
    left = sorted((o for o in found if o.kind != "recorded"), key=lambda o: o.seed)
    skipped = [{"seed": o.seed, "reason": o.kind, "message": o.message.strip()[-500:]} for o in left]
    return {"path": "", "entries": len(found) - len(left), "key": "", "skipped": skipped}


def _write(config: ManifestConfig, task: str, found: list[Outcome]) -> dict[str, Any]:
    kept = sorted((o for o in found if o.kind == "recorded"), key=lambda o: o.seed)
    # a crash says nothing about its scene: another run would freeze another set
    if any(outcome.kind == "crashed" for outcome in found):
        return _row(found)
    head = config.head(task)
    for outcome in kept:
        assert outcome.details["about"] == {name: head[name] for name in outcome.details["about"]}
    manifest = Manifest(entries=tuple(o.details["entry"] for o in kept), **head)
    path = Path(config.output) / f"{task}.json"
    manifest.save(path)
    return _row(found) | {"path": str(path), "key": manifest.key}


def main(argv: list[str]) -> int:
    """``physis data manifest``. Exit code 3 when a task has too few scenes that the expert solves."""
    parser = argparse.ArgumentParser(
        prog="physis data manifest", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(argv)
    from physisforcing.core.config import compose

    from .collect import expand_lists

    overrides = expand_lists(options.overrides, {"task": "tasks", "tasks": "tasks"})
    written = freeze(config := compose("manifest", overrides, ManifestConfig))
    if options.json:
        print(json.dumps(written, indent=2))
    else:
        for task, row in written.items():
            where = f"{row['path']} ({row['key']})" if row["path"] else "no file"
            if row["skipped"] is None:
                print(f"{task}: {row['entries']} scenes in {where}, kept from an earlier run")
                continue
            seeds = ", ".join(f"{skip['seed']} ({skip['reason']})" for skip in row["skipped"]) or "none"
            print(f"{task}: {row['entries']} scenes in {where}; seeds left out: {seeds}")
    short = [f"{task}: {row['entries']} of {config.episodes}" for task, row in written.items() if not row["path"]]
    if short:
        crashed = sum(skip["reason"] == "crashed" for row in written.values() for skip in row["skipped"] or [])
        more = f" ({crashed} seeds crashed: such a task is not written, run it again)" if crashed else ""
        raise IncompleteCoverageError(f"too few scenes could be verified: {', '.join(short)}{more}")
    return 0
