"""Groups of videos that play on one clock: their HTML, the small script that keeps them together, and how many fit."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from .data import Figure, Player
from .figures import data_uri
from .markup import Markup, fill, join

#: Bytes of video that the players of one report may embed, before base64: with it the page stays below its limit.
MAX_VIDEO_BYTES = 12 * 1024 * 1024
#: What an outcome is called on the page.
OUTCOMES = {"success": "succeeded", "failure": "did not succeed", "error": "crashed", "": ""}


def script() -> str:
    """The script of pages that have players. It is put between tags as it is, so its hash can be allowed and nothing else."""
    return Path(__file__).with_name("players.js").read_text(encoding="utf-8")


def script_policy() -> str:
    """The part of the page's policy that allows exactly this script."""
    digest = hashlib.sha256(script().encode("utf-8")).digest()
    return f"; script-src 'sha256-{base64.b64encode(digest).decode('ascii')}'"


def render_players(players: Sequence[Player], folder: Path) -> Markup:
    """One card a group. Without the script every video keeps its own controls."""
    return fill('<div class="figures">{p}</div>', p=join(_group(player, folder) for player in players))


def _group(player: Player, folder: Path) -> Markup:
    videos = join(
        fill(
            '<div class="panel"><p class="label">{label}</p>'
            '<video controls muted playsinline preload="none" aria-label="{d}" src="{s}"></video></div>',
            label=panel.label,
            d=panel.description,
            s=data_uri(Figure(path=panel.path, title=panel.label, caption="", description=panel.description), folder),
        )
        for panel in player.panels
    )
    word = OUTCOMES[player.outcome]
    return fill(
        '<figure class="card wide" data-players data-outcome="{o}"><h3>{t}{mark}</h3><div class="synchronised{thirds}">{v}</div>'
        '<div class="controls" hidden><button type="button">Play</button>'
        '<input type="range" min="0" max="1" value="0" step="{step}" aria-label="Time in {t}">'
        '<output>0.00 s</output><label>speed <select><option value="1">1</option><option value="0.5">1/2</option>'
        '<option value="0.25">1/4</option></select></label></div><figcaption>{c}</figcaption></figure>',
        o=player.outcome,
        thirds=" thirds" if len(player.panels) % 3 == 0 else "",
        t=player.title,
        mark=fill(' <span class="outcome {k}">{w}</span>', k="good" if player.outcome == "success" else "bad", w=word)
        if word
        else Markup(""),
        v=videos,
        step=f"{player.frame_seconds:.4f}",
        c=player.caption,
    )


def within_bytes(
    players: Sequence[Player], folder: str | Path, max_bytes: int = MAX_VIDEO_BYTES
) -> tuple[list[Player], int]:
    """The first players whose videos together stay within ``max_bytes``, and how many were left out.

    Players that are too large are passed over, so that one long episode does not hide the short ones after it.
    """
    kept, spent = [], 0
    for player in players:
        size = sum((Path(folder) / panel.path).stat().st_size for panel in player.panels)
        if spent + size <= max_bytes:
            kept.append(player)
            spent += size
    return kept, len(players) - len(kept)
