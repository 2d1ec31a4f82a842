"""The panels: each function draws one thing of a ``Window`` and returns a matplotlib figure, all of the same width.

Positions are in [0,1] per axis, whatever the resolution of a picture; lengths and errors are told in pixels of 240x320.
Colours are Okabe and Ito's and cividis, which people with colour-blindness tell apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from physisforcing.core.report.draw import draw_mask

from .window import Prediction, Relations, Tracks, Window

#: Screen pixels: width of a panel, margin, gap between pictures, head and foot; dots an inch.
WIDTH, MARGIN, GAP, HEAD, FOOT, DPI = 1360, 22, 12, 66, 36, 100
#: Selected points and where points are, other points, what a model predicts, borders of the mask (Okabe and Ito).
SELECTED, OTHER, PREDICTED, BORDER = "#0072B2", "#777777", "#D55E00", "#56B4E9"
#: From little to much, and what is not known.
SCALE, UNKNOWN = "cividis", "#CCCCCC"
#: Pixels in which errors are told, (W, H).
REPORT_SIZE = np.array([320.0, 240.0])
#: Strength of hidden points.
FAINT = 0.3


def heading(window: Window) -> Figure:
    """The title of a sheet: what is shown, and the choices that are not the usual ones."""
    first, *rest = window.title.splitlines()
    return _figure(HEAD + 18 * len(window.notes), first, "\n".join([*rest, *window.notes]))


def tracks_panel(window: Window) -> Figure:
    """Points over the first and three later pictures: selected ones with the path so far, hidden ones faint."""
    tracks = window.tracks
    assert tracks is not None
    count, total = int(tracks.select_N.sum()), len(tracks.select_N)
    figure, axes = _row(
        tracks.frames_THWC.shape[1:3],
        4,
        f"Tracks: {count} of {total} points are physics-informative",
        "Points of a regular grid over the first picture, followed through the window. The losses look at the blue ones: they "
        "move, and they are near.",
    )
    for axis, t in zip(axes, np.linspace(0, len(tracks.frames_THWC) - 1, 4).round().astype(int).tolist(), strict=True):
        _picture(axis, tracks.frames_THWC[t], f"picture {t}, {tracks.seconds_T[t]:.2f} s")
        axis.add_collection(_trails(tracks, t))
        for chosen, colour, size in ((~tracks.select_N, OTHER, 5), (tracks.select_N, SELECTED, 16)):
            for seen, alpha in ((tracks.visible_TN[t], 1.0), (~tracks.visible_TN[t], FAINT)):
                at = tracks.points_TN2[t, chosen & seen]
                edge = {"edgecolors": "white", "linewidths": 0.6} if colour == SELECTED else {"linewidths": 0}
                axis.scatter(at[:, 0], at[:, 1], s=size, c=colour, alpha=alpha, zorder=3, **edge)
    _legend(
        figure,
        [
            (_dot(SELECTED, 5, edge=True), f"selected ({count}), with its path so far"),
            (_dot(OTHER, 3.2), f"not selected ({total - count})"),
            (_dot(SELECTED, 5, alpha=FAINT, edge=True), "faint: hidden in this picture"),
        ],
    )
    return figure


def scores_panel(window: Window) -> Figure:
    """Motion, nearness and their product, the score, as coloured points over the first picture; selected points are ringed."""
    tracks = window.tracks
    assert tracks is not None
    rule = "" if tracks.threshold is None else f"a score of at least the mean, {tracks.threshold:.3g}, and "
    figure, axes = _row(
        tracks.frames_THWC.shape[1:3],
        3,
        "Scores: what moves and is near",
        f"Selected points (ringed) have {rule}a motion of at least {tracks.min_motion:.3g} px; they are visible in the "
        "first picture.",
        foot=FOOT + 42,
    )
    shown = tracks.visible_TN[0]
    for axis, values, title, label in (
        (axes[0], tracks.motion_N, "motion m", "length of the path, px"),
        (axes[1], tracks.weight_N, "nearness r = 1 / (D + eps)", "weight: large is near"),
        (axes[2], tracks.score_N, "score q = m r", "px times weight"),
    ):
        _picture(axis, _grey(tracks.frames_THWC[0], 0.0, 0.35), title)
        scale = Normalize(0.0, max(float(values[shown].max(initial=0.0)), 1e-6))
        order = np.argsort(values[shown], kind="stable")
        at = tracks.points_TN2[0, shown][order]
        axis.scatter(at[:, 0], at[:, 1], s=20, c=values[shown][order], cmap=SCALE, norm=scale, linewidths=0, zorder=3)
        if axis is axes[2]:
            ringed = tracks.points_TN2[0, tracks.select_N]
            axis.scatter(
                ringed[:, 0], ringed[:, 1], s=34, facecolors="none", edgecolors="white", linewidths=0.9, zorder=4
            )
        _scale_below(figure, axis, scale, label)
    return figure


def mask_panel(window: Window) -> Figure:
    """The tokens that selected points pass, a picture a latent frame: bright inside the mask, dark outside."""
    frames, rows, columns = window.mask_Fhw.shape
    share = window.mask_Fhw.mean()
    figure, axes = _row(
        window.pictures_FHWC.shape[1:3],
        frames,
        f"Token mask: {int(window.mask_Fhw.sum())} of {window.mask_Fhw.size} tokens ({share:.0%})",
        f"A token is a cell of the {rows}x{columns} grid in one latent frame. Bright cells are passed by a selected, visible point "
        "in one of the latent frame's pictures; the relation loss compares these.",
        foot=MARGIN,
    )
    shown = masked_pictures(window)
    for k, axis in enumerate(axes):
        covers = "picture 0" if k == 0 else f"pictures {4 * k - 3} to {4 * k}"
        _picture(axis, shown[k], f"latent {k} ({covers}): {int(window.mask_Fhw[k].sum())} tokens")
        axis.add_collection(LineCollection(_borders(window.mask_Fhw[k]), colors=BORDER, linewidths=1.2))
    return figure


def relations_panel(window: Window) -> Figure:
    """Relation matrices over the same tokens on one scale: teacher, student (with a model), rigid bodies (where known)."""
    found, prediction = window.relations, window.prediction
    assert found is not None
    matrices = dict(found.matrices)
    if prediction is not None:
        teacher = next(iter(matrices))
        label = f"student: psi(H) of the model at sigma {prediction.sigma:g}"
        matrices = {teacher: matrices.pop(teacher), label: prediction.student_KK, **matrices}
    figure = _figure(
        HEAD + 20 + 400 + 70,
        f"Relations: cosines between {len(found.token_K)} tokens of the mask",
        "Rows and columns are the tokens, in the same order everywhere: by what they show, and then by likeness. "
        + _sem_note(prediction),
    )
    values = np.concatenate([matrix.ravel() for matrix in matrices.values()])
    scale = Normalize(min(0.0, float(np.nanmin(values))), 1.0)
    for place, (title, matrix) in enumerate(matrices.items()):
        axis = _axes(figure, 150 + place * 404, HEAD + 20, 388, 388)
        draw_matrix(axis, matrix, scale)
        axis.set_title(title, fontsize=9.5, loc="left", pad=4)
        _group_lines(axis, found, labels=place == 0)
    bar = figure.colorbar(
        ScalarMappable(scale, SCALE),
        cax=_axes(figure, 150, HEAD + 20 + 400 + 10, 388, 12),
        orientation="horizontal",
    )
    bar.ax.tick_params(labelsize=8.5)
    bar.set_label("cosine (1: alike); grey: not known", fontsize=9)
    return figure


def prediction_panel(window: Window) -> Figure:
    """Where the model finds each selected point, against where it is, in every later latent frame."""
    prediction = window.prediction
    assert prediction is not None
    frames = len(window.mask_Fhw)
    terms = prediction.metrics
    figure, axes = _row(
        window.pictures_FHWC.shape[1:3],
        frames - 1,
        f"Prediction: mean error {terms['epe_px']:.1f} px of 240x320",
        f"Soft-argmax of phi(H) of {prediction.model} at noise level sigma {prediction.sigma:g}. For comparison: points that stay "
        f"where they were {terms['epe_still_px']:.1f} px, a uniform map {terms['epe_uniform_px']:.1f} px.",
    )
    errors = np.linalg.norm((prediction.points_FN2 - prediction.target_FN2) * REPORT_SIZE, axis=-1)
    for axis, k in zip(axes, range(1, frames), strict=True):
        weight = prediction.weight_FN[k - 1]
        counted, told = weight > 0, "no point counts"
        if counted.any():
            mean = np.average(errors[k - 1], weights=weight)
            told = f"mean {mean:.1f} px, largest {errors[k - 1, counted].max():.1f} px"
        truth, guess = prediction.target_FN2[k - 1, counted], prediction.points_FN2[k - 1, counted]
        _picture(axis, _grey(window.pictures_FHWC[k], 0.55, 0.4), f"latent {k}: {told}")
        axis.add_collection(LineCollection(np.stack([truth, guess], 1), colors="#333333", linewidths=0.9))
        axis.scatter(truth[:, 0], truth[:, 1], s=17, c=SELECTED, edgecolors="white", linewidths=0.5, zorder=3)
        axis.scatter(guess[:, 0], guess[:, 1], s=20, c=PREDICTED, marker="x", linewidths=1.3, zorder=4)
    _legend(
        figure,
        [
            (_dot(SELECTED, 5, edge=True), "reference: where the point is"),
            (Line2D([], [], color=PREDICTED, marker="x", linestyle="", markersize=5), "predicted by the model"),
            (Line2D([], [], color="#333333", linewidth=1.2), "error"),
        ],
    )
    return figure


def masked_pictures(window: Window) -> NDArray[np.uint8]:
    """The latent frames' pictures, dark and grey outside the mask, [F,H,W,3]."""
    return draw_mask(window.pictures_FHWC, window.mask_Fhw)


def draw_matrix(axis: Axes, matrix_KK: NDArray[np.floating], scale: Normalize) -> None:
    """One relation matrix; NaN is grey."""
    import matplotlib

    colours = matplotlib.colormaps[SCALE].with_extremes(bad=UNKNOWN)
    axis.imshow(matrix_KK, cmap=colours, norm=scale, interpolation="auto")
    axis.set_xticks([])
    axis.set_yticks([])


def _sem_note(prediction: Prediction | None) -> str:
    if prediction is None:
        return ""
    return f"The relation loss between teacher and student is {prediction.metrics['sem']:.3f} here."


def _trails(tracks: Tracks, t: int) -> LineCollection:
    """Paths of the selected points up to picture ``t``, where both ends of a step are seen."""
    ends = np.stack([tracks.points_TN2[:t], tracks.points_TN2[1 : t + 1]], 2)
    seen = tracks.visible_TN[:t] & tracks.visible_TN[1 : t + 1] & tracks.select_N
    return LineCollection(ends[seen], colors=SELECTED, linewidths=1.0, alpha=0.75, zorder=2)


def _borders(mask_hw: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Edges between cells inside and outside the mask, as line segments [S,2,2] in [0,1]."""
    rows, columns = mask_hw.shape
    padded = np.pad(mask_hw, 1)
    upright = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # (row, edge)
    flat = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # (edge, column)
    lines = [[(e / columns, r / rows), (e / columns, (r + 1) / rows)] for r, e in upright]
    lines += [[(c / columns, e / rows), ((c + 1) / columns, e / rows)] for e, c in flat]
    return np.array(lines, dtype=np.float64).reshape(-1, 2, 2)


def _grey(picture_HWC: NDArray[np.uint8], level: float, contrast: float) -> NDArray[np.uint8]:
    """Grey values from ``level`` to ``level + contrast`` of 1, so that coloured points stand out."""
    grey = 255 * level + contrast * picture_HWC.mean(-1, keepdims=True)
    return np.repeat(np.rint(grey), 3, axis=-1).astype(np.uint8)


def _group_lines(axis: Axes, found: Relations, *, labels: bool) -> None:
    """Lines between the groups, and the names of those that are large enough to be read."""
    for _, _, last in found.groups[:-1]:
        axis.axhline(last - 0.5, color="white", linewidth=0.5)
        axis.axvline(last - 0.5, color="white", linewidth=0.5)
    named = [g for g in found.groups if g[2] - g[1] >= 0.03 * len(found.token_K)]
    if labels and named:
        axis.set_yticks(
            [(first + last - 1) / 2 for _, first, last in named], [name for name, _, _ in named], fontsize=8.5
        )


def _figure(height: int, title: str, subtitle: str) -> Figure:
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    figure.text(MARGIN / WIDTH, 1 - 12 / height, title, fontsize=13, fontweight="bold", va="top")
    text = "\n".join(line for part in subtitle.splitlines() for line in textwrap.wrap(part, 200))
    figure.text(MARGIN / WIDTH, 1 - 34 / height, text, fontsize=9, va="top", color="#444444")
    return figure


def _row(
    size: tuple[int, int], count: int, title: str, subtitle: str, *, foot: int = FOOT
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` pictures of the shape ``size`` (H, W) side by side."""
    width = (WIDTH - 2 * MARGIN - (count - 1) * GAP) // count
    height = round(width * size[0] / size[1])
    figure = _figure(HEAD + 20 + height + foot, title, subtitle)
    return figure, [_axes(figure, MARGIN + k * (width + GAP), HEAD + 20, width, height) for k in range(count)]


def _axes(figure: Figure, left: int, top: int, width: int, height: int) -> Axes:
    """Axes at screen pixels from the upper left corner."""
    full = round(figure.get_figheight() * DPI)
    return figure.add_axes((left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full))


def _picture(axis: Axes, picture_HWC: NDArray[np.uint8], title: str) -> None:
    axis.imshow(picture_HWC, extent=(0, 1, 1, 0), aspect="auto", interpolation="bilinear")
    axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
    axis.set_title(title, fontsize=9.5, loc="left", pad=4)


def _scale_below(figure: Figure, axis: Axes, scale: Normalize, label: str) -> None:
    box = axis.get_position()
    height = figure.get_figheight() * DPI
    inset = 16 / WIDTH  # the numbers at the ends need room
    place = figure.add_axes((box.x0 + inset, box.y0 - 18 / height, box.width - 2 * inset, 10 / height))
    bar = figure.colorbar(ScalarMappable(scale, SCALE), cax=place, orientation="horizontal")
    bar.ax.tick_params(labelsize=8.5)
    bar.set_label(label, fontsize=9)


def _dot(colour: str, size: float, *, alpha: float = 1.0, edge: bool = False) -> Line2D:
    outline = {"markeredgecolor": "white", "markeredgewidth": 0.6} if edge else {"markeredgewidth": 0}
    return Line2D([], [], color=colour, marker="o", linestyle="", markersize=size, alpha=alpha, **outline)


def _legend(figure: Figure, entries: Sequence[tuple[Line2D, str]]) -> None:
    handles, labels = zip(*entries, strict=True)
    height = figure.get_figheight() * DPI
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(MARGIN / WIDTH - 0.006, 4 / height),
        ncols=len(labels),
        frameon=False,
        fontsize=9.5,
        borderaxespad=0,
        handletextpad=0.3,
        columnspacing=2,
    )
