"""The HTML page: one file that opens anywhere, needs no script and fetches nothing (its own policy forbids it)."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from ..errors import UserError
from .charts import interval_bar, line_chart
from .data import Figure, LossChange, ReportData, SuccessRow, interval
from .markup import Markup, fill, join

#: A page may show only what is inside it.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
MIME = {".mp4": "video/mp4", ".png": "image/png"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>
<style>{style}</style></head><body>
<header class="top"><div><h1>{title}</h1><p class="lede">{summary}</p>{glance}
<nav aria-label="Sections">{links}</nav></div></header>
<main>{sections}<footer>Written {created}. {missing}</footer></main>
</body></html>
"""


def render_html(data: ReportData, folder: Path) -> str:
    """The page as text, figures read from ``folder`` and embedded. ``UserError`` names a figure that is missing."""
    built = [
        ("imagined", "Imagined and executed", _imagined(data, folder)),
        ("physics", "What the physics losses look at", _physics(data, folder)),
        ("training", "Training", _training(data)),
        ("success", "Closed loop", _success(data)),
        ("time", "Where the time went", _stages(data)),
        ("provenance", "Provenance", _provenance(data)),
        ("limits", "What this does not show", _limits(data)),
    ]
    present = [(anchor, heading, body) for anchor, heading, body in built if body]
    absent = [heading for _, heading, body in built if not body]
    sections = join(
        fill('<section id="{a}"><h2>{h}</h2>{b}</section>', a=anchor, h=heading, b=body)
        for anchor, heading, body in present
    )
    links = join(fill('<a href="#{a}">{h}</a>', a=anchor, h=heading) for anchor, heading, _ in present)
    missing = f"This run has nothing for: {', '.join(absent)}." if absent else ""
    return fill(
        PAGE, policy=POLICY, title=data.title, summary=data.summary, created=data.created, glance=_glance(data),
        links=links, sections=sections, missing=missing, style=Markup(_style()),
    )  # fmt: skip


def _style() -> str:
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def _glance(data: ReportData) -> Markup:
    cards = [
        fill(
            "<div><b>{k} of {n}</b><span>{policy} on {task}{interval}</span></div>",
            k=row.successes, n=row.episodes, policy=row.policy, task=row.task, interval=f", {range_text(row)}",
        )
        for row in data.success
        if not row.baseline and row.episodes
    ]  # fmt: skip
    if data.losses:
        lower = sum(change.lower for change in data.losses)
        cards.append(
            fill(
                "<div><b>{k} of {n}</b><span>loss terms lower on held-out windows after training</span></div>",
                k=lower,
                n=len(data.losses),
            )
        )
    if data.stages:
        spent = sum(stage.seconds for stage in data.stages)
        cards.append(fill("<div><b>{t}</b><span>on the clock, all stages</span></div>", t=duration(spent)))
    return fill('<div class="glance">{cards}</div>', cards=join(cards)) if cards else Markup("")


def _imagined(data: ReportData, folder: Path) -> Markup:
    if not data.imagined:
        return Markup("")
    text = (
        "Left of each pair: the video that the world model imagined from one camera picture, the joint angles and an "
        "instruction. Right: what the simulator rendered while the robot followed the joint targets that an inverse "
        "dynamics model had read out of the imagined video. Only the right side happened. The closer the two are, the "
        "better the model knew what its own plan would do."
    )
    return join([fill("<p>{t}</p>", t=text), _figures(data.imagined, folder)])


def _physics(data: ReportData, folder: Path) -> Markup:
    if not data.physics:
        return Markup("")
    text = (
        "Training adds two losses to the usual one. Points on a demonstration are followed through time (lines), and "
        "those that move most, weighted towards the camera, make up the physics-informative mask (bright region). The "
        "trajectory loss asks the network's features to find each such point again in later frames; the relation loss "
        "asks the features in the mask to be as similar to one another as those of a frozen image encoder. Tracks, "
        "depth and visibility come from the simulator's own state, so they are exact."
    )
    return join([fill("<p>{t}</p>", t=text), _figures(data.physics, folder)])


def _training(data: ReportData) -> Markup:
    parts: list[Markup] = []
    if data.losses:
        rows = join(_loss_row(change) for change in data.losses)
        parts.append(
            fill(
                "<p>{held_out}</p>"
                '<div class="scroll"><table><thead><tr><th>loss term</th><th>what it measures</th>'
                '<th class="num">before</th><th class="num">after</th><th class="num">change</th></tr></thead>'
                "<tbody>{rows}</tbody></table></div>",
                held_out=data.held_out,
                rows=rows,
            )
        )
    if data.curves:
        cards = join(
            fill(
                '<div class="card"><h3>{name}</h3><p class="note">{meaning}</p>{chart}</div>',
                name=f"{curve.name} ({curve.unit})" if curve.unit else curve.name,
                meaning=curve.meaning,
                chart=line_chart(curve),
            )
            for curve in data.curves
        )
        note = "Every training step as logged (thin) and its running mean over a twentieth of the run (thick)."
        parts.append(fill('<p class="soft spaced">{n}</p><div class="curves">{c}</div>', n=note, c=cards))
    return join(parts)


def _loss_row(change: LossChange) -> Markup:
    relative = change.after / change.before - 1 if change.before else float("nan")
    return fill(
        '<tr><th scope="row">{term}</th><td>{meaning}</td><td class="num">{before}</td><td class="num">{after}</td>'
        '<td class="num {kind}">{relative} {word}</td></tr>',
        term=change.term,
        meaning=change.meaning,
        before=f"{change.before:.5g}",
        after=f"{change.after:.5g}",
        kind="good" if change.lower else "bad",
        relative=f"{relative:+.2%}",
        word="lower" if change.lower else "not lower",
    )


def _success(data: ReportData) -> Markup:
    if not data.success:
        return Markup("")
    rows: list[Markup] = []
    previous = None
    for row in data.success:
        rows.append(_success_row(row, new_task=previous is not None and row.task != previous))
        previous = row.task
    return fill(
        '<p>{text}</p><div class="scroll"><table><thead><tr><th>task</th><th>policy</th><th class="num">successes</th>'
        '<th class="num">rate</th><th>0 to 100 %, 95 % interval</th><th>note</th></tr></thead>'
        "<tbody>{rows}</tbody></table></div>",
        text=data.closed_loop,
        rows=join(rows),
    )


def _success_row(row: SuccessRow, *, new_task: bool) -> Markup:
    classes = " ".join(name for name, on in (("baseline", row.baseline), ("new-task", new_task)) if on)
    notes = [row.note] if row.note else []
    if row.errors:
        notes.append(f"{row.errors} crashed, not counted")
    return fill(
        '<tr class="{c}"><th scope="row">{task}</th><td>{policy}</td><td class="num">{k} / {n}</td>'
        '<td class="num">{rate}</td><td>{bar}<span class="note">{ci}</span></td><td>{note}</td></tr>',
        c=classes, task=row.task, policy=row.policy, k=row.successes, n=row.episodes, bar=interval_bar(row),
        rate=f"{row.successes / row.episodes:.0%}" if row.episodes else "no episode",
        ci=range_text(row), note="; ".join(notes),
    )  # fmt: skip


def _stages(data: ReportData) -> Markup:
    if not data.stages:
        return Markup("")
    rows = join(
        fill(
            '<tr><th scope="row">{n}</th><td>{w}</td><td class="num">{t}</td><td>{r}</td></tr>',
            n=stage.name, w=stage.what, t=duration(stage.seconds), r="reused, inputs unchanged" if stage.reused else "",
        )
        for stage in data.stages
    )  # fmt: skip
    return fill(
        '<div class="scroll"><table><thead><tr><th>stage</th><th>what it did</th><th class="num">time</th><th></th>'
        "</tr></thead><tbody>{rows}</tbody></table></div>",
        rows=rows,
    )


def _provenance(data: ReportData) -> Markup:
    groups = join(
        fill(
            '<div class="card"><h3>{g}</h3><dl>{items}</dl></div>',
            g=group,
            items=join(fill("<dt>{k}</dt><dd>{v}</dd>", k=key, v=value) for key, value in values.items()),
        )
        for group, values in data.provenance.items()
    )
    if not groups:
        return Markup("")
    return fill(
        '<p>Enough to run this again and to know what it ran on.</p><div class="provenance">{g}</div>', g=groups
    )


def _limits(data: ReportData) -> Markup:
    if not data.limits:
        return Markup("")
    return fill("<ul>{items}</ul>", items=join(fill("<li>{t}</li>", t=text) for text in data.limits))


def _figures(figures: list[Figure], folder: Path) -> Markup:
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


def range_text(row: SuccessRow) -> str:
    """95 % interval in words."""
    bounds = interval(row)
    return f"95 % interval {bounds[0]:.0%} to {bounds[1]:.0%}" if bounds else ""


def duration(seconds: float) -> str:
    """Seconds as 8.2 s, 3 min 05 s or 1 h 02 min."""
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
