"""Rows of scores: ``name`` has a value or None, and ``name_n`` says what it was averaged over.

That is points, objects, or pairs of point and frame, whatever the score counts; so chunks of an episode merge exactly, and nothing that
could not be measured hides in a mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .comparison_rows import COUNT_SUFFIX

Row = dict[str, float | int | None]


def score(name: str, value: float | None, count: int) -> Row:
    """``name`` and ``name_n``; the value is None where nothing was counted."""
    return {name: float(value) if value is not None and count else None, f"{name}{COUNT_SUFFIX}": int(count)}


def merge_rows(rows: Iterable[Mapping[str, float | int | None]]) -> Row:
    """One row of several chunks: every score is the mean over everything that was counted, None where nothing was."""
    rows = list(rows)
    merged: Row = {"chunks": len(rows), "seconds": float(sum(float(r["seconds"] or 0) for r in rows))}
    for name in dict.fromkeys(key for row in rows for key in row if f"{key}{COUNT_SUFFIX}" in row):
        parts = [(row[name], int(row[f"{name}{COUNT_SUFFIX}"] or 0)) for row in rows if name in row]
        known = [(float(value), n) for value, n in parts if value is not None and n > 0]
        total = sum(n for _, n in known)
        merged |= score(name, sum(v * n for v, n in known) / total if total else None, total)
    return merged
