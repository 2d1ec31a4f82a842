"""The pictures of ``physis data inspect --pictures``: a window of a dataset, drawn to files and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from physisforcing.core.config import compose
from physisforcing.core.readers import open_dataset

from ..physics.config import PhysicsConfig
from ..teachers.selection import TeachersConfig
from .files import check_board, draw, open_board, write_board, write_pictures
from .predict import check_sigma, predict_window
from .window import load_window


@dataclass(slots=True, kw_only=True)
class PictureSettings:
    """``cache``: folder of cached targets (``targets`` in the dataset where empty). ``codec``: folder of the model's codec (``vae``
    beside the model where empty). ``physics``, ``teacher``: as for training."""

    cache: str | None = None
    codec: str | None = None
    physics: PhysicsConfig = field(default_factory=PhysicsConfig)
    teacher: TeachersConfig = field(default_factory=TeachersConfig)


def draw_dataset(
    root: str,
    *,
    folder: str | None = None,
    tensorboard: str | None = None,
    episode: int = 0,
    start: int | None = None,
    model: str | None = None,
    sigma: float = 0.5,
    overrides: Sequence[str] = (),
) -> list[Path]:
    """Draw a window into ``folder`` and into the TensorBoard ``tensorboard``, where they are named. Returns the files, the sheet first.

    ``start``: control step, None: the window with the most selected points. ``model``: a world-model folder or ``shipped``;
    ``overrides``: of ``PictureSettings``. Raises ``UserError`` before anything is written.
    """
    settings = compose("data_inspect", list(overrides), PictureSettings)
    check_sigma(sigma)
    if tensorboard:
        check_board()
    dataset = open_dataset(root)
    window, batch = load_window(
        dataset, episode, start, settings.physics, teachers=settings.teacher, cache=settings.cache
    )
    if model is not None:
        window.prediction = predict_window(
            model, dataset, episode, window, batch, settings.physics, sigma=sigma, codec=settings.codec
        )
        window.notes.append(f"model: {window.prediction.model} at sigma {sigma:g}")
    drawn = draw(window)
    if tensorboard:
        write_board(window, drawn, open_board(tensorboard))
    return write_pictures(window, drawn, folder) if folder else []
