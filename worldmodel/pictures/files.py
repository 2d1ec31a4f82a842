"""Pictures of a window as files and in TensorBoard: the single panels, and all of them on one sheet."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physisforcing import __version__
from physisforcing.core.errors import UserError

from .window import Window


def draw(window: Window) -> dict[str, NDArray[np.uint8]]:
    """The panels that a window has, by name, RGB [H,W,3] of equal width: ``tracks``, ``scores``, ``mask``, ``relations``,
    ``prediction``."""
    from . import panels

    figures = {}
    if window.tracks is not None:
        figures["tracks"] = panels.tracks_panel(window)
        figures["scores"] = panels.scores_panel(window)
    figures["mask"] = panels.mask_panel(window)
    if window.relations is not None:
        figures["relations"] = panels.relations_panel(window)
    if window.prediction is not None:
        figures["prediction"] = panels.prediction_panel(window)
    return {name: render(figure) for name, figure in figures.items()}


def render(figure: Any) -> NDArray[np.uint8]:
    """A matplotlib figure as RGB [H,W,3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def sheet(window: Window, drawn: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The panels below each other under the window's title, RGB [H,W,3]."""
    from . import panels

    return np.concatenate([render(panels.heading(window)), *drawn.values()])


def write_pictures(window: Window, drawn: dict[str, NDArray[np.uint8]], folder: str | Path) -> list[Path]:
    """Write ``<name>.png``, the sheet, and ``<name>_<panel>.png`` of the panels that ``draw`` made. Returns the paths, the sheet first."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {window.name: sheet(window, drawn)} | {f"{window.name}_{name}": image for name, image in drawn.items()}
    about = PngInfo()
    about.add_text("Software", f"physisforcing {__version__}")
    about.add_itxt("Description", " | ".join([*window.title.splitlines(), *window.notes]))
    paths = []
    for name, image in pictures.items():
        paths.append(folder / f"{name}.png")
        Image.fromarray(image).save(paths[-1], optimize=True, pnginfo=about)
    return paths


def check_board() -> None:
    """``UserError`` where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        fix = "pip install tensorboard, or leave --tensorboard out"
        raise UserError("--tensorboard", got="tensorboard is not installed", wanted="the package tensorboard", fix=fix)


def open_board(folder: str | Path) -> Any:
    """A TensorBoard writer."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def write_board(window: Window, drawn: dict[str, NDArray[np.uint8]], board: Any) -> None:
    """The same panels as image summaries ``<name>/<panel>``; closes the board."""
    for name, image in drawn.items():
        board.add_image(f"{window.name}/{name}", image, 0, dataformats="HWC")
    board.close()
