"""Pictures and videos of a page, embedded as data."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from ..errors import UserError
from .data import Figure
from .markup import Markup, fill, join

MIME = {".mp4": "video/mp4", ".png": "image/png"}


def render_figures(figures: list[Figure], folder: Path) -> Markup:
    return fill('<div class="figures">{f}</div>', f=join(_figure(figure, folder) for figure in figures))


def _figure(figure: Figure, folder: Path) -> Markup:
    source = data_uri(figure, folder)
    if figure.path.endswith(".mp4"):
        media = fill(
            '<video controls loop autoplay muted playsinline preload="auto" aria-label="{d}">'
            '<source src="{s}" type="video/mp4">{d}</video>',
            d=figure.description,
            s=source,
        )
    else:
        media = fill('<img src="{s}" alt="{d}">', s=source, d=figure.description)
    panels = join(fill("<span>{p}</span>", p=panel) for panel in figure.panels)
    return fill(
        '<figure class="card{wide}"><h3>{t}</h3>{p}{m}<figcaption>{c}</figcaption></figure>',
        wide=" wide" if len(figure.panels) > 2 else "",
        t=figure.title,
        p=fill('<div class="panels" aria-hidden="true">{p}</div>', p=panels) if panels else "",
        m=media,
        c=figure.caption,
    )


def data_uri(figure: Figure, folder: Path) -> Markup:
    """The figure's bytes as a data URI. The path must stay inside ``folder``: a report must not embed other files."""
    path = Path(os.path.normpath(folder / figure.path))
    mime = MIME.get(path.suffix)
    if mime is None or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        fix = "run the command that wrote this run folder again"
        raise UserError("figure", got=figure.path, wanted="a .png or .mp4 inside the run folder", fix=fix)
    return Markup(f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}")
