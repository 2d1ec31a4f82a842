"""Rules that rename tensors, readable in both directions.

A rule is a pair of names with ``{i}`` and ``{j}`` for numbers and ``{p}`` for ``weight`` or ``bias``, so that a model of a thousand
tensors takes some thirty lines. Nothing is renamed by replacing parts of a name: a name fits a rule as a whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PARTS = {"i": r"(?:0|[1-9]\d*)", "j": r"(?:0|[1-9]\d*)", "p": "(?:weight|bias)"}

Pairs = list[tuple[str, str]]


class KeyMap:
    """Original names <-> names of the stock model.

    ``pairs``: the rules, (original, stock). ``prefixes``: what may stand before every original name (wrappers of a release), the
    first one is used to say what is missing. ``left_out``: beginnings of original names (without prefix) that the stock model has no
    place for, with the reason; they are counted, never dropped in silence.
    """

    def __init__(self, pairs: Pairs, prefixes: tuple[str, ...] = ("",), left_out: dict[str, str] | None = None) -> None:
        self.prefixes, self.left_out = prefixes, left_out or {}
        self._forward = [(_pattern(old), new) for old, new in pairs]
        self._backward = [(_pattern(new), old) for old, new in pairs]

    def stock(self, name: str) -> str | None:
        """The stock model's name for an original one; None where no rule fits."""
        return _renamed(self.bare(name), self._forward)

    def original(self, name: str) -> str | None:
        """The original name of a stock model's tensor; None where no rule fits."""
        found = _renamed(name, self._backward)
        return None if found is None else self.prefixes[0] + found

    def bare(self, name: str) -> str:
        """A name without its prefix; the longest one that fits counts."""
        fitting = [prefix for prefix in self.prefixes if name.startswith(prefix)]
        return name.removeprefix(max(fitting, key=len, default=""))

    def why_left_out(self, name: str) -> str | None:
        """Why this original tensor has no place in the stock model; None for one that has."""
        bare = self.bare(name)
        return next((why for start, why in self.left_out.items() if bare.startswith(start)), None)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template)
    for part, fits in _PARTS.items():
        text = text.replace(rf"\{{{part}\}}", f"(?P<{part}>{fits})")
    return re.compile(text)


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if found := pattern.fullmatch(name):
            return template.format(**found.groupdict())
    return None
