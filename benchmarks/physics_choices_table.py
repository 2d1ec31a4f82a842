"""The table of ``physics_choices.py``: paired differences against the default over training seeds, from the lines of its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from probe import ROOT, fill_page

from physisforcing.core.results import ResultsFile
from physisforcing.planner.measurements import measurement, write_measurements

Row = dict[str, Any]
#: Measure -> (read-out, kind), unit px of 240x320; and flow matching.
MEASURES = {"epe_px": ("head", "soft"), "argmax_px": ("head", "argmax"), "probe_px": ("probe", "soft"), "fm": None}


def value_of(row: Row, measure_name: str) -> float | None:
    """Mean over the noise levels; None where the variant has no such read-out."""
    where = MEASURES[measure_name]
    if where is None:
        return float(np.mean(list(row["fm"].values())))
    return float(np.mean(list(row["px"][where[0]][where[1]].values()))) if where[0] in row["px"] else None


def differences(values: Sequence[float], default: Sequence[float]) -> dict[str, float]:
    """Mean of the paired differences, its 95 % t interval and the p value of a paired t test; nothing but the mean for one seed."""
    from scipy import stats

    gaps = np.subtract(values, default)
    said = {"difference": float(gaps.mean())}
    if len(gaps) < 2:
        return said
    error = float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
    half = float(stats.t.ppf(0.975, len(gaps) - 1)) * error
    p = 2 * float(stats.t.sf(abs(gaps.mean()) / error, len(gaps) - 1)) if error > 0 else float(not gaps.any())
    return said | {"difference_low": said["difference"] - half, "difference_high": said["difference"] + half, "p": p}


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment."""
    adjusted, highest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def report(results: Path, out: Path, order: Sequence[str]) -> None:
    """Write the measurements of finished runs to ``out`` and the table to docs/results/physics_choices.md, variants in ``order``."""
    rows = [row for row in ResultsFile(results).rows if row["status"] == "success"]
    settings = ("manifest", "steps", "batch", "probe_steps", "compile")
    kinds = {tuple(row[name] for name in settings) for row in rows}
    assert len(kinds) == 1, f"runs of one kind, not of {len(kinds)}: {settings} {kinds}"
    table = {(row["variant"], row["seed"]): row for row in rows}
    lines: dict[str, dict[str, dict[str, Any]]] = {}
    for name in MEASURES:
        lines[name] = {v: line for v in order if (line := line_of(v, name, table)) is not None}
        tested = {v: line["against"]["p"] for v, line in lines[name].items() if "p" in line["against"]}
        enough = [v for v in tested if len(lines[name][v]["against"]["training_seeds"]) >= 5]
        for v, p in holm({v: tested[v] for v in enough}).items():
            lines[name][v]["against"]["p_holm"] = p
    write_measurements(out, [line for part in lines.values() for line in part.values()])
    fill_page(ROOT / "docs" / "results" / "physics_choices.md", PAGE, page_text(lines))


def line_of(name: str, measure_name: str, table: Mapping[tuple[str, int], Row]) -> dict[str, Any] | None:
    """The measurement of a variant; None without the read-out or without seeds that the default has too."""
    from scipy import stats

    seeds = sorted(seed for variant, seed in table if variant == name and ("default", seed) in table)
    pairs = [[value_of(table[variant, seed], measure_name) for seed in seeds] for variant in (name, "default")]
    if not seeds or None in pairs[0]:
        return None
    rows, where = [table[name, seed] for seed in seeds], MEASURES[measure_name]
    levels = [row["fm"] if where is None else row["px"][where[0]][where[1]] for row in rows]
    by_sigma = {sigma: float(np.mean([level[sigma] for level in levels])) for sigma in levels[0]}
    against: dict[str, Any] = {
        "training_seeds": seeds,
        "steps": rows[0]["steps"],
        "windows": rows[0]["windows"]["heldout"]["kept"],
    }
    against |= {"by_sigma": by_sigma, "still_px": rows[0]["still"], "uniform_px": rows[0]["uniform"]}
    if name != "default":
        against |= {"default": float(np.mean(pairs[1]))} | differences(*pairs)  # type: ignore[arg-type]
    values, interval = np.array(pairs[0], float), {}
    if len(seeds) > 1:
        half = stats.t.ppf(0.975, len(seeds) - 1) * values.std(ddof=1) / math.sqrt(len(seeds))
        interval = {"low": float(values.mean() - half), "high": float(values.mean() + half)}
    command = f"python benchmarks/physics_choices.py --windows windows.safetensors.xz --results runs.jsonl --steps {rows[0]['steps']}"
    command += f" --batch {rows[0]['batch']} --probe-steps {rows[0]['probe_steps']}" + " --compile" * rows[0]["compile"]
    return measurement(
        f"physics/choices/{name}/{measure_name}",
        float(values.mean()),
        unit="1" if where is None else "px of 240x320",
        n=rows[0]["episodes"],
        seeds=seeds,
        against=against,
        command=f"{command} --seeds {' '.join(map(str, seeds))}",
        provenance=rows[-1]["provenance"],
        **interval,
    )


PAGE = """# Which choices of the physics losses matter at pico size

Measurements: [physics_choices.json](physics_choices.json), written by `benchmarks/physics_choices.py`, which says how each figure is made:
one training a choice and seed, each changing one option of [the losses](../physics.md), read out alike on held-out demonstrations with
simulator truth. Differences are paired by training seed, with 95 % t intervals, each by itself: of so many some miss their value; negative is
better.

"""


def page_text(lines: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The default in words and a row for each variant. ``lines``: measure -> variant -> measurement."""
    default = {name: part["default"] for name, part in lines.items()}
    about = default["epe_px"]["against"]
    text = (
        f"Default: end-point error {default['epe_px']['value']:.2f} px of 240x320 ({default['argmax_px']['value']:.2f} by best cell, "
        f"{default['probe_px']['value']:.2f} by a fresh phi), flow matching {default['fm']['value']:.4f}; points that stay "
        f"{about['still_px']:.2f}, uniform map {about['uniform_px']:.2f}. {about['steps']} updates, {about['windows']} windows of "
        f"{default['epe_px']['n']} episodes, mean over five noise levels, {len(about['training_seeds'])} training seeds.\n\n"
    )
    held = any("p_holm" in m["against"] for part in lines.values() for m in part.values())
    titles = [
        "choice",
        "soft-argmax, px",
        "difference",
        "by best cell",
        "by a fresh phi",
        "flow matching, %",
        *["p (Holm)"] * held,
    ]
    text += f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    for name in dict.fromkeys(v for part in lines.values() for v in part):
        if name == "default":
            continue
        cells = [f"{lines['epe_px'][name]['value']:.2f}" if name in lines["epe_px"] else "no phi trained"]
        for measure_name in MEASURES:
            line = lines[measure_name].get(name)
            scale = 100 / default["fm"]["value"] if measure_name == "fm" else 1.0
            cells.append(gap(line["against"], scale) if line else "")
        said = lines["epe_px"].get(name) or lines["probe_px"][name]
        p = said["against"].get("p_holm")
        cells += ["" if p is None else f"{p:.2g}"] * held
        text += f"| `{name}` | " + " | ".join(cells) + " |\n"
    return text


def gap(against: dict[str, Any], scale: float) -> str:
    if "difference_low" not in against:
        return f"{scale * against['difference']:+.2f}"
    low, high = scale * against["difference_low"], scale * against["difference_high"]
    return f"{scale * against['difference']:+.2f} ({low:+.2f} to {high:+.2f})"
