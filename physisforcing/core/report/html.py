"""The HTML page: one file that opens anywhere and fetches nothing (its own policy forbids it).

A page has no script, unless it has players: then exactly the script that keeps them together, allowed by its hash.
"""

from __future__ import annotations

from pathlib import Path

from .charts import interval_bar, line_chart
from .comparison import crashed, published, skipped, tables, verdicts
from .data import LossChange, Player, ReportData, SuccessRow, films_heading, interval
from .figures import render_figures
from .markup import Markup, fill, join
from .players import render_players, script, script_policy

#: A page may show only what is inside it.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
#: Sections that only a comparison has: a page without them does not name them as missing.
OPTIONAL = ("players", "failures", "verdicts", "tables", "skipped", "crashed", "published")

PLAYERS = (
    "Each group plays on one clock. Executed is what the simulator rendered. The other panels are what the planner took for the future, "
    "chunk by chunk, before it happened: what a model imagined, or what a control put in its place; each says which. Coloured points are "
    "followed through these pictures, pale points are where the simulator says they truly went."
)
FAILURES = "Episodes that did not succeed: what was imagined, and what happened instead."

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>
<style>{style}</style></head><body>
<header class="top"><div><h1>{title}</h1><p class="lede">{summary}</p>{glance}
<nav aria-label="Sections">{links}</nav></div></header>
<main>{sections}<footer>Written {created}. {missing}</footer></main>{script}
</body></html>
"""


def render_html(data: ReportData, folder: Path) -> str:
    """The page as text, figures read from ``folder`` and embedded. ``UserError`` names a figure that is missing."""
    built = [
        ("imagined", films_heading(data.imagined), _imagined(data, folder)),
        ("players", "Real and imagined on one clock", _players(PLAYERS, data.players, data.players_note, folder)),
        ("failures", "Failures", _players(FAILURES, data.failures, data.failures_note, folder)),
        ("physics", "What the physics losses look at", _physics(data, folder)),
        ("training", "Training", _training(data)),
        ("success", "Closed loop", _success(data)),
        ("verdicts", "What the controls say", verdicts(data)),
        ("tables", "Comparison", tables(data)),
        ("skipped", "Skipped", skipped(data)),
        ("crashed", "Crashed episodes", crashed(data)),
        ("published", "Published numbers of others", published(data)),
        ("time", "Where the time went", _stages(data)),
        ("provenance", "Provenance", _provenance(data)),
        ("limits", "What this does not show", _limits(data)),
    ]
    present = [(anchor, heading, body) for anchor, heading, body in built if body]
    absent = [heading for anchor, heading, body in built if not body and anchor not in OPTIONAL]
    sections = join(
        fill('<section id="{a}"><h2>{h}</h2>{b}</section>', a=anchor, h=heading, b=body)
        for anchor, heading, body in present
    )
    links = join(fill('<a href="#{a}">{h}</a>', a=anchor, h=heading) for anchor, heading, _ in present)
    missing = f"This run has nothing for: {', '.join(absent)}." if absent else ""
    playing = bool(data.players or data.failures)
    return fill(
        PAGE, policy=POLICY + (script_policy() if playing else ""), title=data.title, summary=data.summary, created=data.created, glance=_glance(data),
        links=links, sections=sections, missing=missing, style=Markup(_style()),
        script=Markup(f"<script>{script()}</script>") if playing else Markup(""),
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
    films = (
        "What the simulator rendered while the robot was driven; who drove it stands above each film. A policy computes joint targets from "
        "pictures and an instruction, and shows no video of its own; the expert's are replayed."
    )
    text = (
        "Left of each pair: the video that the world model imagined from one camera picture, the joint angles and an "
        "instruction. Right: what the simulator rendered while the robot followed the joint targets that an inverse "
        "dynamics model had read out of the imagined video. Only the right side happened. The closer the two are, the "
        "better the model knew what its own plan would do."
    )
    kinds = {len(figure.panels) > 1 for figure in data.imagined}
    said = [fill("<p>{t}</p>", t=words) for pair, words in ((True, text), (False, films)) if pair in kinds]
    return join([*said, render_figures(data.imagined, folder)])


def _players(text: str, players: list[Player], note: str, folder: Path) -> Markup:
    if not players:
        return fill("<p>{note}</p>", note=note) if note else Markup("")
    return fill("<p>{text} {note}</p>{players}", text=text, note=note, players=render_players(players, folder))


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
    return join([fill("<p>{t}</p>", t=text), render_figures(data.physics, folder)])


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
