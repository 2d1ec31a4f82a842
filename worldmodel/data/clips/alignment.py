"""Whether a clip's caption says what its pictures show.

Two ways, with different reach. ``PredictedAlignment`` needs nothing but what ships: it learns from the other clips of the data set which
captions go with which look, and compares. It finds a caption of another task or scene, where the data set has several clips of each; it
cannot judge a clip that looks like no other, a mistake that all look-alikes share, or one that no first picture shows (left for right,
opens for closes). ``image_text.ImageTextAlignment`` asks a CLIP or SigLIP model of the user's, clip by clip: it needs no look-alikes, and
knows objects and scenes better than actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

#: Parts of the clips that are left out in turn, and the fewest clips that anything is learned from.
PARTS, FEWEST = 10, 24
#: Weight of the regression's penalty, beside rows of length 1.
RIDGE = 3.0
#: Clips compared with all others at once, and the most numbers that this makes (256 MB).
_BLOCK, _NUMBERS = 1024, 1 << 26
#: The most likenesses of which one alone, their largest, is looked at when those of interest are sought.
_GROUP = 64


@runtime_checkable
class TextAlignment(Protocol):
    """Scores captions against pictures: against what its own ``look`` saw of them (``LooksItself``), else the frame encoder's appearance."""

    def scores(
        self, seen_ND: NDArray[np.float32], captions: Sequence[str], same: Sequence[tuple[int, int]]
    ) -> NDArray[np.float64]:
        """-> [N], larger where caption and pictures agree. ``same``: pairs of clips that are one recording."""
        ...


@runtime_checkable
class LooksItself(TextAlignment, Protocol):
    """One with a picture model of its own. ``key``: identity of what ``look`` returns, part of the key of measurements."""

    key: str

    def look(self, pictures_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB pictures of one clip -> a vector of fixed length."""
        ...


class PredictedAlignment:
    """Cosine between a caption and what the other clips' captions let one expect of such pictures.

    A ridge regression from the look of the first picture to the captions' sentence vectors is fitted on nine tenths of the clips and
    asked about the rest, in turn; copies of a recording are never on both sides. Both vectors are taken from the mean caption, so that
    what all captions share says nothing. Below ``FEWEST`` clips nothing can be learned: every score is 1.
    """

    def scores(
        self, seen_ND: NDArray[np.float32], captions: Sequence[str], same: Sequence[tuple[int, int]]
    ) -> NDArray[np.float64]:
        if len(captions) < FEWEST:
            return np.ones(len(captions))
        text_ND = sentence_vectors(captions).astype(np.float64)
        look_ND = centre(seen_ND).astype(np.float64)
        part_N = _parts(len(captions), same)
        out = np.zeros(len(captions))
        for part in range(PARTS):
            asked = part_N == part
            if asked.any() and not asked.all():
                mean = text_ND[~asked].mean(0)
                expected = _ridge(look_ND[~asked], text_ND[~asked] - mean, look_ND[asked])
                out[asked] = _cosine(expected, text_ND[asked] - mean)
        return out


def _ridge(x_MD: NDArray[np.float64], y_ME: NDArray[np.float64], new_KD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Predictions [K,E] for ``new``; by the smaller of the two forms of the normal equations."""
    if len(x_MD) <= x_MD.shape[1]:
        weights = np.linalg.solve(x_MD @ x_MD.T + RIDGE * np.eye(len(x_MD)), y_ME)
        return new_KD @ (x_MD.T @ weights)
    weights = np.linalg.solve(x_MD.T @ x_MD + RIDGE * np.eye(x_MD.shape[1]), x_MD.T @ y_ME)
    return new_KD @ weights


def _parts(count: int, same: Sequence[tuple[int, int]]) -> NDArray[np.intp]:
    """Which tenth each clip belongs to; clips that are one recording, directly or by way of others, to the same."""
    group = np.arange(count)
    for a, b in same:
        group[group == group[b]] = group[a]
    drawn = np.random.default_rng(0).permutation(count) % PARTS
    return drawn[group]


def _cosine(a_ND: NDArray[np.float64], b_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    size = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return (a_ND * b_ND).sum(1) / np.maximum(size, 1e-9)


def nearest(seen_ND: NDArray[np.float32], count: int) -> list[list[int]]:
    """Of each row the ``count`` rows of largest cosine after the mean of all is taken out, nearest first; ties by number."""
    rows = len(seen_ND)
    if rows < 2 or count < 1:
        return [[] for _ in range(rows)]
    centred, count = centre(seen_ND), min(count, rows - 1)
    found = []
    step = max(1, min(_BLOCK, _NUMBERS // rows))
    for start in range(0, rows, step):
        likeness = centred[start : start + step] @ centred.T
        own = np.arange(len(likeness))
        likeness[own, start + own] = -np.inf
        for row, least in zip(likeness, _at_most(likeness, count), strict=True):
            near = np.nonzero(row >= least)[0]
            order = near[np.argsort(-row[near], kind="stable")][:count]
            found.append([int(j) for j in order])
    return found


def _at_most(values_BN: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """[B]: nothing above the ``count``-th largest value of a row, and little below it: the ``count``-th largest of the maxima of groups.
    Selecting among all values would take longer than making them."""
    rows, size = values_BN.shape[1], max(1, min(_GROUP, values_BN.shape[1] // (4 * count)))
    best = values_BN[:, : rows // size * size].reshape(len(values_BN), -1, size).max(2)
    return np.partition(best, best.shape[1] - count, axis=1)[:, -count]


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
