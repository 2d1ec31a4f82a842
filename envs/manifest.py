"""Frozen episode manifests: which scenes an evaluation runs on, fixed by their hashes.

A manifest is written once (``freeze.py``), from seeds whose scene comes to rest and whose task the expert solves, and never
edited. At evaluation time each scene is compared with its entry, so that results measured on drifted scenes cannot be mixed
with others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from physisforcing.core.errors import UserError, nearest
from physisforcing.core.files import replace_text

SCHEMA = "physisforcing.manifest/2"
#: How far a body may have settled from where it was frozen: metres, degrees.
SETTLED_M, SETTLED_DEG = 1e-3, 0.5
#: Sets that ship, one manifest a task: ``<set>_<task>``.
SETS = ("train", "validation", "test", "test_ood", "test_embodiment", "swapped_instruction", "table2")


class ManifestDriftError(UserError):
    """A scene is not the one that the manifest froze."""


@dataclass(slots=True, kw_only=True, frozen=True)
class ManifestEntry:
    """One scene. ``expert_steps``: frames of the expert's episode, a scale for step limits. ``settled``: [name, xyz in metres,
    wxyz] of every free body once the scene had come to rest.
    """

    task: str
    seed: int
    instruction: str
    scene_hash: str
    expert_steps: int = 0
    settled: tuple[tuple[str | float, ...], ...] = ()

    @property
    def episode(self) -> str:
        """The episode's name in results."""
        return f"{self.task}/{self.seed}"

    def check(self, info: dict[str, Any], instruction: str) -> None:
        """``ManifestDriftError`` unless the scene just reset is this one. ``info``: that of the reset."""
        pairs = [("scene_hash", self.scene_hash, info["scene_hash"]), ("instruction", self.instruction, instruction)]
        for name, expected, got in [("task", self.task, info["task"]), ("seed", self.seed, info["seed"]), *pairs]:
            if expected != got:
                raise self._drift(name, got, f"{expected!r} as frozen in the manifest", info)
        if self.settled:
            self._check_settled(info)

    def _check_settled(self, info: dict[str, Any]) -> None:
        bodies = info["settled"]
        names = [[row[0] for row in rows] for rows in (self.settled, bodies)]
        if names[0] != names[1]:
            raise self._drift("settled", names[1], f"the bodies {names[0]}", info)
        for here, (moved, turned) in zip(bodies, self.settled_differences(info), strict=True):
            if not (moved <= SETTLED_M and turned <= SETTLED_DEG):
                got = f"{here[0]} {1000 * moved:.2f} mm and {turned:.2f} degrees from where it was frozen"
                wanted = f"at most {1000 * SETTLED_M:g} mm and {SETTLED_DEG:g} degrees"
                raise self._drift("settled", got, wanted, info)

    def settled_differences(self, info: dict[str, Any]) -> list[tuple[float, float]]:
        """Metres and degrees between where each body settled and where it was frozen. ``info``: that of the reset."""
        return [pose_difference(a[1:], b[1:]) for a, b in zip(self.settled, info["settled"], strict=True)]

    def _drift(self, name: str, got: Any, wanted: str, info: dict[str, Any]) -> ManifestDriftError:
        return ManifestDriftError(
            f"{self.episode} {name}",
            got=got,
            wanted=wanted,
            fix=f"this run uses assets {info['assets']!r} and runtime {info['runtime']!r}: use the versions that the "
            "manifest names, or freeze a new manifest (physis data manifest) and report it under a new name",
        )


def pose_difference(one: Any, two: Any) -> tuple[float, float]:
    """Metres and degrees between two poses [xyz, wxyz]."""
    moved = math.dist(one[:3], two[:3])
    norms = math.hypot(*one[3:]) * math.hypot(*two[3:])
    cosine = abs(sum(a * b for a, b in zip(one[3:], two[3:], strict=True))) / norms if norms else math.nan
    return moved, math.degrees(2 * math.acos(min(1.0, cosine)))


@dataclass(slots=True, kw_only=True, frozen=True)
class Manifest:
    """Scenes and what they are built from. ``randomization``, ``sentences`` (the environment's ``instruction``) and
    ``scene_of`` are those of ``RoboTwinEnv``. ``fingerprint``: SHA-256 of everything else; results are keyed by it.
    """

    name: str
    assets: str
    runtime: str
    embodiment: str
    randomization: str = "demo_clean"
    sentences: str = "template"
    scene_of: str | None = None
    entries: tuple[ManifestEntry, ...]

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self._head() | {"entries": self._rows()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def key(self) -> str:
        """Name and fingerprint, the ``manifest`` part of a result's key."""
        return f"{self.name}@{self.fingerprint[:12]}"

    def environment(self) -> dict[str, Any]:
        """Arguments of the environment that builds these scenes."""
        return {
            "embodiment": self.embodiment,
            "randomization": self.randomization,
            "instruction": self.sentences,
            "scene_of": self.scene_of,
        }

    def _head(self) -> dict[str, Any]:
        names = ("name", "assets", "runtime", "embodiment", "randomization", "sentences", "scene_of")
        return {"schema": SCHEMA} | {name: getattr(self, name) for name in names}

    def _rows(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(entry) for entry in self.entries]

    def save(self, path: str | Path) -> None:
        """Write JSON; ``UserError`` when another manifest is there already (frozen means frozen)."""
        path = Path(path)
        if path.exists() and load_manifest(path).fingerprint != self.fingerprint:
            fix = "give the new one another name, or delete the old one if nothing was reported on it"
            raise UserError("manifest", got=str(path), wanted="a path without another manifest", fix=fix)
        head = json.dumps(self._head() | {"fingerprint": self.fingerprint}, indent=1).removesuffix("\n}")
        lines = ",\n  ".join(json.dumps(row) for row in self._rows())
        replace_text(path, f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')


def load_manifest(path_or_name: str | Path) -> Manifest:
    """From a file, or a shipped one by name (``test_click_bell``). ``UserError`` for an unknown name or an edited file."""
    path = Path(path_or_name)
    if path.suffix != ".json":
        path = _shipped(str(path_or_name))
    if not path.is_file():
        raise UserError("manifest", got=str(path), wanted="an existing file", fix="physis data manifest writes one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise KeyError(f"schema {content['schema']}")
        rows = [entry | {"settled": tuple(map(tuple, entry["settled"]))} for entry in content["entries"]]
        head = {name: value for name, value in content.items() if name not in ("schema", "fingerprint", "entries")}
        manifest = Manifest(**head, entries=tuple(ManifestEntry(**row) for row in rows))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(str(path), got=f"{error}", wanted=SCHEMA, fix="write it with physis data manifest") from error
    if manifest.fingerprint != content.get("fingerprint"):
        raise ManifestDriftError(
            f"{path} fingerprint",
            got=manifest.fingerprint,
            wanted=f"{content.get('fingerprint')!r} as written in the file",
            fix="the file was edited after it was frozen: restore it, or freeze a new one under a new name",
        )
    return manifest


def shipped_manifests() -> dict[str, Path]:
    """Name -> file of the manifests that ship: ``configs/manifests/<set>/<task>.json`` is ``<set>_<task>``."""
    from physisforcing.core.config import config_dir

    found = (config_dir() / "manifests").glob("*/*.json")
    return {f"{path.parent.name}_{path.stem}": path for path in sorted(found)}


def _shipped(name: str) -> Path:
    known = shipped_manifests()
    if name not in known:
        close = nearest(name, list(known))
        fix = f"did you mean '{close}'?" if close else f"a set ({', '.join(SETS)}) and a task, or give a .json file"
        raise UserError("manifest", got=name, wanted="a shipped manifest (<set>_<task>)", fix=fix)
    return known[name]
