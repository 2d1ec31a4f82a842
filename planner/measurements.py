"""Lines for ``docs/results/*.json``: every published figure with the command, commit and machine that made it."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from physisforcing.core.provenance import git_commit

#: Fields of a measurement, in the order they are written.
FIELDS = (
    "claim", "value", "unit", "low", "high", "n", "seeds", "against", "command", "commit", "hardware", "versions", "date",
)  # fmt: skip
PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "sapien", "numpy", "gymnasium")
#: A machine's own path in a command (absolute, from home, or above the repository; ``http://...`` is none), whatever stands round it.
PLACE = re.compile(
    r"(?<![\w.:/~-])(?:~|\.\.|/)[^\s,:{}\[\]'\"=]*|(?<=[:=])(?<!http:)(?<!https:)(?:~|\.\.|/)[^\s,:{}\[\]'\"=]*"
)


def measurement(
    claim: str,
    value: float,
    *,
    unit: str,
    n: int,
    low: float | None = None,
    high: float | None = None,
    seeds: Sequence[int] | str = (),
    against: Mapping[str, Any] | None = None,
    command: str,
    provenance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One line. ``claim``: a path such as ``planner/oracle/click_bell/success``; ``provenance``: ``provenance()`` of the run."""
    known = dict(provenance or machine_provenance())
    line = {
        "claim": claim,
        "value": value,
        "unit": unit,
        "low": low,
        "high": high,
        "n": n,
        "seeds": seed_range(seeds),
        "against": dict(against or {}),
        "command": command,
        "commit": known["commit"],
        "hardware": known["hardware"],
        "versions": known["versions"],
        "date": known["date"],
    }
    assert tuple(line) == FIELDS
    return line


def placeless(command: str) -> str:
    """The command with ``runs/NAME`` for every path of one machine; of RUN/export and RUN/model both parts are kept."""

    def short(found: re.Match[str]) -> str:
        parts = [part for part in found[0].split("/") if part not in ("", "~", "..", ".")]
        kept = parts[-2:] if parts[-1:] in (["export"], ["model"]) else parts[-1:]
        return "/".join(["runs", *(part for part in kept if part != "runs")])

    return PLACE.sub(short, command)


def claims_of(*, protocol: str, control: str, manifest: str) -> str:
    """What measurements call the episodes of a command: the protocol it follows, or its control mode and its set of scenes where that is
    not the test set."""
    from . import worldarena

    if protocol == worldarena.NAME:
        return worldarena.claims(control)
    usual = manifest in ("auto", "none", "test")
    return control if usual else f"{control}-{Path(manifest).stem}"


def from_summary(
    summary: Mapping[str, Any], *, protocol: str, manifests: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Lines of an evaluation (``summary.summarise`` with ``command`` and ``provenance``): success of every policy, with its
    tests against no-op and random, and every other number it measured.

    Claims: ``planner/oracle/<task>/...`` for the oracle, ``planner/oracle/<control>/<task>/...`` for its controls,
    ``planner/<protocol>/<policy>/<task>/...`` otherwise. ``manifests``: task -> key of the scenes, noted in ``against``.
    """
    from .summary import MEANS

    lines = []
    for task, policies in summary["tasks"].items():
        for name, entry in policies.items():
            parts = [protocol, task] if name == protocol else [protocol, name, task]
            path = "planner/" + "/".join(parts)
            shared: dict[str, Any] = {"command": summary["command"], "provenance": summary["provenance"]}
            shared |= {"n": entry["n"], "seeds": entry["seeds"]}
            against = {f"{k}_p": v for k, v in entry["against"].items()}
            against |= {"scenes": manifests[task]} if manifests and task in manifests else {}
            if protocol == "oracle":
                against |= {
                    k: policies[k]["rate"] for k in ("black", "other", "recorded") if k in policies and k != name
                }
            if entry["rate"] is not None:
                interval = {"low": entry["low"], "high": entry["high"]}
                lines.append(
                    measurement(f"{path}/success", entry["rate"], unit="share", against=against, **interval, **shared)
                )
            if gap := entry.get("gap"):
                claim = f"planner/{protocol}/perfect-minus-{name}/{task}/success_difference"
                about = {word: gap[word] for word in ("only_perfect", "only_model")}
                about |= {"scenes": manifests[task]} if manifests and task in manifests else {}
                interval = {word: gap[word] for word in ("low", "high", "n", "seeds")}
                lines.append(measurement(claim, gap["difference"], unit="share", against=about, **(shared | interval)))
            lines += [measurement(f"{path}/{m}", entry[m], unit=MEANS[m], **shared) for m in MEANS if m in entry]
    return lines


def machine_provenance(root: Path | None = None) -> dict[str, Any]:
    """Commit (with ``+`` when the tree has changes), hardware, package versions and UTC time of now."""
    import torch

    import physisforcing

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": git_commit(root or Path(physisforcing.__file__).resolve().parent) or "not a git checkout",
        "hardware": hardware(),
        "versions": versions,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def hardware() -> str:
    """GPU name where torch sees one, and the processor with its cores."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor}, {cores} cores"


def seed_range(seeds: Sequence[int] | str) -> str:
    """``100000-100019`` for consecutive seeds, else a list."""
    if isinstance(seeds, str) or not len(seeds):
        return str(seeds) if isinstance(seeds, str) else ""
    ordered = sorted({int(s) for s in seeds})
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))


def write_measurements(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """Write the list as JSON. Lines of other claims already in the file stay; the same claim is replaced."""
    path = Path(path)
    kept = []
    if path.is_file():
        new = {line["claim"] for line in lines}
        kept = [line for line in json.loads(path.read_text()) if line["claim"] not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = sorted([*kept, *map(dict, lines)], key=lambda line: line["claim"])
    path.write_text(json.dumps(merged, indent=1) + "\n")
    return path
