"""Which part of the sequence sees which, as data: the attention patterns of the conditioning modes.

A sequence is ``first`` (tokens of the clean first latent frame), ``future`` (noisy latent frames), ``copy`` (the future frames once more, as
the actions see them in ``idm``) and ``action``, in this order; parts may be missing. ``first`` sees itself alone in every mode, so its keys
and values depend on nothing that comes later: a plan of ``first_frame`` computes them once. The copy's first frame would be the same numbers
and is left out.

Attention runs once for each run of queries that see the same keys: without a mask, so that nothing is computed that is thrown away, but for
the actions of ``optional_idm``, whose copy some samples do not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PARTS = ("first", "future", "copy", "action")

#: Mode -> part -> what it sees.
PATTERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "first_frame": {"first": ("first",), "future": ("first", "future"), "action": ("first", "action")},
    "joint": {"first": ("first",), "future": ("first", "future"), "action": ("first", "future", "action")},
    "idm": {
        "first": ("first",), "future": ("first", "future"), "copy": ("first", "copy"), "action": ("first", "copy", "action"),
    },
}  # fmt: skip
# which of its samples' actions see the copy is drawn for each of them
PATTERNS["optional_idm"] = PATTERNS["idm"]


class Group(NamedTuple):
    """Queries [begin, end) of the sequence and the runs of keys that they see."""

    query: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


def spans(lengths: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Part -> its place [begin, end) in the sequence, for the parts that have tokens."""
    found, begin = {}, 0
    for part in PARTS:
        if lengths.get(part, 0):
            found[part] = begin, begin + lengths[part]
            begin += lengths[part]
    return found


def groups(mode: str, lengths: Mapping[str, int]) -> tuple[Group, ...]:
    """The attention calls of a sequence. ``lengths``: tokens of each part; a part without any is neither query nor key."""
    places, sees = spans(lengths), PATTERNS[mode]
    found: list[Group] = []
    for part, (begin, end) in places.items():
        keys = _joined([places[seen] for seen in PARTS if seen in sees[part] and seen in places])
        if found and found[-1].keys == keys:
            found[-1] = Group((found[-1].query[0], end), keys)
        else:
            found.append(Group((begin, end), keys))
    return tuple(found)


def _joined(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbouring runs as one: a slice instead of a copy."""
    made: list[tuple[int, int]] = []
    for begin, end in runs:
        if made and made[-1][1] == begin:
            made[-1] = made[-1][0], end
        else:
            made.append((begin, end))
    return tuple(made)
