"""Frozen episode manifests: which scenes an evaluation runs on, fixed by their hashes.

A manifest is written once, from seeds whose scene comes to rest and whose task the expert solves, and never edited. At
evaluation time each scene is compared with its entry, so that results measured on drifted scenes cannot be mixed with others.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from physisforcing.core.errors import IncompleteCoverageError, UserError, nearest
from physisforcing.core.lerobot_format import write_json

from .seeds import Job, Outcome, SeedPlan, run_seeds

SCHEMA = "physisforcing.manifest/1"


class ManifestDriftError(UserError):
    """A scene is not the one that the manifest froze."""


@dataclass(slots=True, kw_only=True, frozen=True)
class ManifestEntry:
    """One scene. ``expert_steps``: frames of the expert's episode, a scale for step limits."""

    task: str
    seed: int
    instruction: str
    scene_hash: str
    expert_steps: int = 0

    @property
    def episode(self) -> str:
        """The episode's name in results."""
        return f"{self.task}/{self.seed}"

    def check(self, info: dict[str, Any], instruction: str) -> None:
        """``ManifestDriftError`` unless the scene just reset is this one."""
        pairs = [("scene_hash", self.scene_hash, info["scene_hash"]), ("instruction", self.instruction, instruction)]
        for name, expected, got in [("task", self.task, info["task"]), ("seed", self.seed, info["seed"]), *pairs]:
            if expected != got:
                raise ManifestDriftError(
                    f"{self.episode} {name}",
                    got=got,
                    wanted=f"{expected!r} as frozen in the manifest",
                    fix=f"this run uses assets {info['assets']!r} and runtime {info['runtime']!r}: use the versions that the "
                    "manifest names, or freeze a new manifest (physis data manifest) and report it under a new name",
                )


@dataclass(slots=True, kw_only=True, frozen=True)
class Manifest:
    """``fingerprint``: SHA-256 of everything else; results are keyed by it."""

    name: str
    assets: str
    runtime: str
    embodiment: str
    entries: tuple[ManifestEntry, ...]

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """Name and fingerprint, the ``manifest`` part of a result's key."""
        return f"{self.name}@{self.fingerprint[:12]}"

    def _content(self) -> dict[str, Any]:
        head = {"schema": SCHEMA, "name": self.name, "assets": self.assets, "runtime": self.runtime}
        return head | {"embodiment": self.embodiment, "entries": [dataclasses.asdict(entry) for entry in self.entries]}

    def save(self, path: str | Path) -> None:
        """Write JSON; ``UserError`` when another manifest is there already (frozen means frozen)."""
        path = Path(path)
        if path.exists() and load_manifest(path).fingerprint != self.fingerprint:
            fix = "give the new one another name, or delete the old one if nothing was reported on it"
            raise UserError("manifest", got=str(path), wanted="a path without another manifest", fix=fix)
        write_json(path, self._content() | {"fingerprint": self.fingerprint})


def load_manifest(path_or_name: str | Path) -> Manifest:
    """From a file, or a shipped one by name (``test_click_bell``). ``UserError`` for an unknown name or an edited file."""
    path = Path(path_or_name)
    if path.suffix != ".json":
        path = _shipped(str(path_or_name))
    if not path.is_file():
        raise UserError("manifest", got=str(path), wanted="an existing file", fix="physis data manifest writes one")
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        if content["schema"] != SCHEMA:
            raise KeyError(f"schema {content['schema']}")
        manifest = Manifest(
            **{name: content[name] for name in ("name", "assets", "runtime", "embodiment")},
            entries=tuple(ManifestEntry(**entry) for entry in content["entries"]),
        )
    except (KeyError, TypeError) as error:
        raise UserError(str(path), got=f"{error}", wanted=SCHEMA, fix="write it with physis data manifest") from error
    if manifest.fingerprint != content.get("fingerprint"):
        raise ManifestDriftError(
            f"{path} fingerprint",
            got=manifest.fingerprint,
            wanted=f"{content.get('fingerprint')!r} as written in the file",
            fix="the file was edited after it was frozen: restore it, or freeze a new one under a new name",
        )
    return manifest


def _shipped(name: str) -> Path:
    from physisforcing.core.config import config_dir

    folder = config_dir() / "manifests"
    known = sorted(path.stem for path in folder.glob("*.json"))
    if name not in known:
        close = nearest(name, known)
        fix = (
            f"did you mean '{close}'?"
            if close
            else f"choose from {', '.join(known) or '(none shipped)'}, or give a .json file"
        )
        raise UserError("manifest", got=name, wanted="a shipped manifest", fix=fix)
    return folder / f"{name}.json"


@dataclass(slots=True, kw_only=True)
class ManifestConfig:
    """Settings of ``physis data manifest``. ``name``: default ``<split>_<task>``; one file a task below ``output``."""

    output: str
    tasks: list[str] = field(default_factory=lambda: ["click_bell"])
    episodes: int = 50
    start_seed: int = 100_000
    workers: int = 2
    prefix: str = "test"


class Verifier:
    """Plays the expert once on a seed, without pictures, and notes the scene."""

    def __init__(self, config: ManifestConfig) -> None:
        self._env: Any = None
        self._task = ""

    def handle(self, job: Job) -> Outcome:
        import gymnasium

        from . import robotwin  # noqa: F401  (registers the tasks)

        if self._env is None or self._task != job.task:
            self.close()
            self._env = gymnasium.make(f"RoboTwin/{job.task}-v0", disable_env_checker=True).unwrapped
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
        )
        about = {name: info[name] for name in ("assets", "runtime", "embodiment")}
        return Outcome(task=job.task, seed=job.seed, kind="recorded", details={"entry": entry, "about": about})

    def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()


def freeze(config: ManifestConfig, *, progress: bool = True) -> dict[str, Any]:
    """Write ``<output>/<prefix>_<task>.json`` for each task; returns what was written and which seeds were left out."""
    from tqdm import tqdm

    from .robotwin.tasks import task_info

    for task in config.tasks:
        task_info(task)
    plan = SeedPlan(config.tasks, config.episodes, config.start_seed, {})
    bar = tqdm(total=plan.missing(), desc="scenes", disable=not progress, file=sys.stderr)
    found: list[Outcome] = []

    def on_outcome(outcome: Outcome) -> None:
        found.append(outcome)
        bar.update(outcome.kind == "recorded")

    with bar:
        run_seeds(plan, partial(Verifier, config), workers=config.workers, on_outcome=on_outcome)
    return {task: _write(config, task, [o for o in found if o.task == task]) for task in config.tasks}


def _write(config: ManifestConfig, task: str, found: list[Outcome]) -> dict[str, Any]:
    kept = sorted((o for o in found if o.kind == "recorded"), key=lambda o: o.seed)
    left = sorted((o for o in found if o.kind != "recorded"), key=lambda o: o.seed)
    if len(kept) < config.episodes:
        raise IncompleteCoverageError(f"{task}: only {len(kept)} of {config.episodes} scenes could be verified")
    about = kept[0].details["about"]
    assert all(outcome.details["about"] == about for outcome in kept)
    name = f"{config.prefix}_{task}"
    manifest = Manifest(name=name, entries=tuple(o.details["entry"] for o in kept), **about)
    path = Path(config.output) / f"{name}.json"
    manifest.save(path)
    skipped = [{"seed": o.seed, "reason": o.kind, "message": o.message} for o in left]
    return {"path": str(path), "entries": len(kept), "key": manifest.key, "skipped": skipped}


def main(argv: list[str]) -> int:
    """``physis data manifest``."""
    parser = argparse.ArgumentParser(
        prog="physis data manifest",
        description="Freeze the scenes of an evaluation: seeds that come to rest and that the expert solves.",
        epilog="example: physis data manifest tasks=[click_bell] episodes=50 start_seed=100000 output=manifests",
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    from physisforcing.core.config import compose

    from .collect import expand_lists

    overrides = expand_lists(options.overrides, {"task": "tasks", "tasks": "tasks"})
    written = freeze(compose("manifest", overrides, ManifestConfig))
    if options.json:
        print(json.dumps(written, indent=2))
        return 0
    for task, row in written.items():
        seeds = ", ".join(f"{skip['seed']} ({skip['reason']})" for skip in row["skipped"]) or "none"
        print(f"{task}: {row['entries']} scenes in {row['path']} ({row['key']}); seeds left out: {seeds}")
    return 0
