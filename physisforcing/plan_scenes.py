"""Which scenes an evaluation runs in: frozen ones of a manifest, or plain seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError
from physisforcing.core.results import config_hash

#: Evaluation seeds start here; what is below may have been trained on.
FIRST_SEED = 100_000


@dataclass(slots=True, kw_only=True)
class Scenes:
    """``seeds``: of each task, in order. ``manifests``: name and digest of each task's scenes. ``entries``: what a manifest says of a
    scene (``envs.manifest.ManifestEntry``), by (task, seed). ``environments``: arguments of a task's environment, where named."""

    seeds: dict[str, list[int]] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    entries: dict[tuple[str, int], Any] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)


def plan_scenes(tasks: Sequence[str], episodes: int, manifest: str, first_seed: int | None = None) -> Scenes:
    """The first ``episodes`` scenes of each task. ``manifest`` as in ``find_manifest``; ``first_seed``: of plain seeds.

    ``UserError`` for a manifest with too few scenes of a task, with scenes that may have been trained on, or with a ``first_seed`` beside it.
    """
    from physisforcing.envs.seeds import SPLITS

    scenes = Scenes()
    for task in tasks:
        found = find_manifest(manifest, task)
        if found is None:
            first = FIRST_SEED if first_seed is None else first_seed
            scenes.manifests[task] = f"seeds-from-{first}@{scene_source()}"
            scenes.seeds[task] = list(range(first, first + episodes))
            continue
        refuse_first_seed(
            first_seed, f"{found.name} says which scenes of {task} there are", "leave it out, or add manifest=none"
        )
        mine = [entry for entry in found.entries if entry.task == task][:episodes]
        if not mine:
            fix = f"use a manifest of {task}, for instance manifest=test_{task}"
            raise UserError("manifest", got=f"{found.name}, without {task}", wanted=f"scenes of {task}", fix=fix)
        if len(mine) < episodes:
            wanted = f"{episodes} scenes of {task} in {found.name}"
            raise UserError("episodes", got=len(mine), wanted=wanted, fix=f"episodes={len(mine)}, or manifest=none")
        if any(entry.seed < SPLITS["validation"][0] for entry in mine):
            fix = "use a manifest of the validation or test split"
            raise UserError("manifest", got=found.name, wanted="scenes nobody trained on", fix=fix)
        scenes.manifests[task], scenes.environments[task] = found.key, found.environment()
        scenes.entries |= {(task, entry.seed): entry for entry in mine}
        scenes.seeds[task] = [entry.seed for entry in mine]
    return scenes


def training_demonstrations(root: str) -> Any:
    """The dataset that retrieval remembers. ``UserError`` where it holds an episode of a validation or test scene: its answer."""
    from physisforcing.core.lerobot import LeRobotDataset
    from physisforcing.envs.seeds import SPLITS

    dataset, first = LeRobotDataset(root), SPLITS["validation"][0]
    seen = [episode.seed for episode in dataset.episodes if episode.seed >= first]
    if seen:
        raise UserError(
            "train_demos",
            got=f"seed {seen[0]} in {root}",
            wanted=f"demonstrations with training seeds: from {first} on retrieval would remember the compared scenes",
            fix="physis data collect start_seed=0 output=F, then train_demos=F",
        )
    return dataset


def refuse_first_seed(given: int | None, why: str, fix: str) -> None:
    """``UserError`` where scenes are known already."""
    if given is not None:
        raise UserError("first_seed", got=given, wanted=f"to be left out: {why}", fix=fix)


def scene_source() -> str:
    """Digest of what builds a scene here from a seed. A frozen manifest names the same three and checks every scene."""
    from physisforcing.core.vulkan import ensure_vulkan_env
    from physisforcing.envs.robotwin.embodiment import load_embodiment, resolve_assets
    from physisforcing.envs.robotwin.runtime import load_runtime

    ensure_vulkan_env()  # before RoboTwin imports SAPIEN
    assets = resolve_assets(None)
    robot = load_embodiment(assets, None).name
    return config_hash({"assets": assets.label, "runtime": load_runtime().label, "embodiment": robot})[:12]


def find_manifest(name: str, task: str) -> Any:
    """The frozen scenes of ``task``, or None for plain seeds: ``auto`` takes the shipped test set where there is one, the name
    of a set that set's manifest of the task, and a folder the manifest ``<task>.json`` in it.
    """
    from physisforcing.envs.manifest import SETS, load_manifest, shipped_manifests

    if name == "auto":
        path = shipped_manifests().get(f"test_{task}")
        return None if path is None else load_manifest(path)
    if name == "none":
        return None
    if name not in SETS and Path(name).is_dir():
        return load_manifest(Path(name) / f"{task}.json")
    return load_manifest(f"{name}_{task}" if name in SETS else name)
