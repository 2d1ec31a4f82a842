"""Measurements of ``physics_cost.py``: medians, intervals and ratios of steps that took turns."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from math import comb
from typing import Any

from cost_teachers import SEED, TEACHERS

from physisforcing.planner.measurements import machine_provenance, measurement

#: Variant -> its name in claims.
NAMES = {"a": "a", "b": "b", "c": "c", "p": "c_plain"}
#: Variant with teachers -> their form.
KINDS: dict[str, str] = {"c": "fast", "p": "plain"}
PARTS = ("targets", "forward", "backward", "optimizer")


def median_interval(values: list[float]) -> tuple[float, float]:
    """Bounds of the median at 95 % or more, from order statistics (no assumption on the distribution); few values: their range."""
    ordered, n = sorted(values), len(values)
    place = 0
    while place + 1 <= (n - 1) // 2 and 2 * sum(comb(n, k) for k in range(place + 2)) / 2**n <= 0.05:
        place += 1
    return ordered[place], ordered[n - 1 - place]


@dataclass(slots=True)
class Results:
    """Times by (mode, variant), and everything that a line of the file says besides."""

    context: dict[str, Any]
    command: str
    provenance: dict[str, Any] = field(default_factory=machine_provenance)
    times: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    memory: dict[tuple[str, str], float] = field(default_factory=dict)

    def line(self, claim: str, values: list[float], unit: str, **against: Any) -> dict[str, Any]:
        low, high = median_interval(values)
        digits = 4 if "/" in unit else 2
        return measurement(
            f"physics/cost/{claim}",
            round(statistics.median(values), digits),
            unit=unit,
            low=round(low, digits),
            high=round(high, digits),
            n=len(values),
            seeds=str(SEED),
            against=against | self.context,
            command=self.command,
            provenance=self.provenance,
        )

    def lines(self) -> list[dict[str, Any]]:
        found = []
        for (mode, variant), rows in self.times.items():
            parts = {f"{name}_ms": round(statistics.median(row[name] for row in rows), 2) for name in PARTS}
            peak = {"peak_memory_gb": round(self.memory.get((mode, variant), 0.0), 2)}
            steps = [row["step"] for row in rows]
            label = NAMES[variant]
            found.append(self.line(f"{mode}/{label}_step_ms", steps, "ms", **parts, **peak))
            for base in dict.fromkeys((mode, "eager")):
                reference = [row["step"] for row in self.times.get((base, "a"), ())]
                if (variant == "a" and base == mode) or len(reference) < len(rows):
                    continue
                ratios = [a / b for a, b in zip(steps, reference)]
                name = f"{label}_over_a" if base == mode else f"{label}_over_eager_a"
                medians = {f"{base}_a_ms": round(statistics.median(reference), 2)}
                medians |= {f"{mode}_{label}_ms": round(statistics.median(steps), 2)}
                found.append(self.line(f"{mode}/{name}", ratios, "step time / step time", **medians))
            if mode == "eager" and variant in KINDS:
                found += self.teacher_lines(KINDS[variant], rows)
        return found

    def teacher_lines(self, kind: str, rows: list[dict[str, float]]) -> list[dict[str, Any]]:
        parts = (*TEACHERS, "reduction")
        total = [sum(row[name] for name in parts) for row in rows]
        lines = [self.line(f"teacher/{name}/{kind}_ms", [row[name] for row in rows], "ms") for name in parts]
        return [*lines, self.line(f"teacher/all/{kind}_ms", total, "ms")]
