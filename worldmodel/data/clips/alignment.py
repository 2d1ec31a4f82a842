"""Whether a clip's caption says what its pictures show.

Two ways, with different reach. ``NeighbourAlignment`` needs nothing but what ships: it compares a caption with the captions of the
clips that look most alike. It finds a caption of another task or scene, where a data set has several clips of each; it cannot judge a
clip that looks like no other, a mistake that all look-alikes share, or one that shows in no still appearance (left for right, opens
for closes). ``image_text.ImageTextAlignment`` asks a CLIP or SigLIP model of the user's, clip by clip: it needs no look-alikes, and
knows objects and scenes better than actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

#: Pictures compared at once.
_BLOCK = 1024


@runtime_checkable
class TextAlignment(Protocol):
    """Scores captions against pictures.

    ``key``: identity of what ``look`` returns, part of the key of measurements ("" where it is not called). ``looks``: whether
    ``look`` is called for each clip; where not, ``scores`` gets the frame encoder's appearance.
    """

    key: str
    looks: bool

    def look(self, pictures_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB pictures of one clip -> a vector of fixed length."""
        ...

    def scores(
        self, seen_ND: NDArray[np.float32], captions: Sequence[str], same: Sequence[tuple[int, int]]
    ) -> NDArray[np.float64]:
        """-> [N], larger where caption and pictures agree. ``same``: pairs of clips that are one recording."""
        ...


class NeighbourAlignment:
    """Median cosine between a caption and those of the ``neighbours`` clips that look most alike, itself and its copies left out.

    A median, because some of those captions are wrong as well. 1.0 where there is no other clip to ask.
    """

    key = ""
    looks = False

    def __init__(self, neighbours: int = 9) -> None:
        self.neighbours = neighbours

    def look(self, pictures_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise NotImplementedError("neighbours are found by the frame encoder's appearance")

    def scores(
        self, seen_ND: NDArray[np.float32], captions: Sequence[str], same: Sequence[tuple[int, int]]
    ) -> NDArray[np.float64]:
        text_ND = sentence_vectors(captions)
        copies: dict[int, set[int]] = {}
        for a, b in same:
            copies.setdefault(a, set()).add(b)
            copies.setdefault(b, set()).add(a)
        most = max((len(c) for c in copies.values()), default=0)
        found = nearest(seen_ND, self.neighbours + most)
        out = np.ones(len(seen_ND))
        for i, others in enumerate(found):
            asked = [j for j in others if j not in copies.get(i, ())][: self.neighbours]
            if asked:
                out[i] = float(np.median(text_ND[asked] @ text_ND[i]))
        return out


def nearest(seen_ND: NDArray[np.float32], count: int) -> list[list[int]]:
    """Of each row the ``count`` rows of largest cosine after the mean of all is taken out, nearest first; ties by number."""
    rows = len(seen_ND)
    if rows < 2 or count < 1:
        return [[] for _ in range(rows)]
    centred = centre(seen_ND)
    found = []
    for start in range(0, rows, _BLOCK):
        likeness = centred[start : start + _BLOCK] @ centred.T
        for offset, row in enumerate(likeness):
            row[start + offset] = -np.inf
            order = np.argsort(-row, kind="stable")[: min(count, rows - 1)]
            found.append([int(j) for j in order])
    return found


def centre(seen_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1, after every column was standardised over the data set: what all clips share says nothing."""
    spread = seen_ND.std(0)
    out = (seen_ND - seen_ND.mean(0)) / np.where(spread > 1e-6, spread, 1.0)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def sentence_vectors(captions: Sequence[str]) -> NDArray[np.float32]:
    """Mean token embedding of each caption (its first 32 tokens), of length 1: [N,384]."""
    from ...text import TextEmbedder

    embedder, known = TextEmbedder(), {}
    for caption in captions:
        if caption not in known:
            mean = embedder.tokens(caption).astype(np.float32).mean(0)
            known[caption] = mean / max(float(np.linalg.norm(mean)), 1e-9)
    return np.stack([known[caption] for caption in captions])
