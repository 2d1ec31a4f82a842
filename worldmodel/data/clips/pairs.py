"""Likeness of pairs of clips, remembered in ``pairs.jsonl``, so that machines share the comparing and a killed run goes on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from physisforcing.core.results import ResultKey, ResultsFile, config_hash

from . import duplicates
from .measure import Measured
from .sources import ClipSource


class PairLikeness:
    """``duplicates.likeness`` of clips by number, called or read from ``folder``/``pairs.jsonl``. ``shift``: see there."""

    def __init__(self, folder: Path, sources: Sequence[ClipSource], measured: Sequence[Measured], shift: float) -> None:
        self.file = ResultsFile(folder / "pairs.jsonl")
        self.sources, self.measured, self.shift = sources, measured, shift
        self.key = config_hash({"version": duplicates.VERSION, "shift": shift})

    def __call__(self, i: int, j: int) -> float:
        row = self._row(i, j)
        if row is None:
            a, b = self._ordered(i, j)
            value = duplicates.likeness(self.sources[a].span, self.sources[b].span, self.shift)
            row = self.file.append(self._key(i, j), "success", likeness=value)
        return float(row["likeness"])

    def run(self, pairs: Sequence[tuple[int, int]], *, part: tuple[int, int] = (0, 1), progress: bool = False) -> int:
        """Compare part ``part[0]`` of ``part[1]`` of the pairs, which lie beside one another: they share films. Returns how many of all
        are not known after it."""
        from tqdm import tqdm

        first, end = (len(pairs) * place // part[1] for place in (part[0], part[0] + 1))
        for pair in tqdm(pairs[first:end], desc="pairs", unit="pair", disable=not progress, file=sys.stderr):
            self(*pair)
        self.file.reload()  # what others have compared meanwhile
        return sum(self._row(*pair) is None for pair in pairs)

    def _ordered(self, i: int, j: int) -> list[int]:
        """One number for both orders, also after the input's rows changed places."""
        return sorted((i, j), key=lambda k: self.measured[k].id)

    def _key(self, i: int, j: int) -> ResultKey:
        pair = "+".join(self.measured[k].id for k in self._ordered(i, j))
        return ResultKey(manifest="pairs", episode=pair, fingerprint=self.key, config="")

    def _row(self, i: int, j: int) -> dict[str, Any] | None:
        return self.file.get(self._key(i, j))
