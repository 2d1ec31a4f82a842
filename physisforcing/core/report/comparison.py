"""Sections that a comparison adds to the page: tables, sentences on the controls, what was skipped, what others published."""

from __future__ import annotations

from collections.abc import Sequence

from .data import ReportData, Table
from .markup import Markup, fill, join

CRASHED = "They count as neither success nor failure and stand in no denominator."


def tables(data: ReportData) -> Markup:
    return _tables(data.tables)


def verdicts(data: ReportData) -> Markup:
    return _list(data.verdicts)


def skipped(data: ReportData) -> Markup:
    return _list(data.skipped)


def crashed(data: ReportData) -> Markup:
    return fill("<p>{t}</p>{items}", t=CRASHED, items=_list(data.crashed)) if data.crashed else Markup("")


def published(data: ReportData) -> Markup:
    if not data.published:
        return Markup("")
    text = "Copied from publications, not measured here: other protocols, other seeds. They stand apart from every table above."
    return fill('<div class="published"><p>{t}</p>{tables}</div>', t=text, tables=_tables(data.published))


def _list(sentences: Sequence[str]) -> Markup:
    if not sentences:
        return Markup("")
    return fill("<ul>{items}</ul>", items=join(fill("<li>{t}</li>", t=text) for text in sentences))


def _tables(found: Sequence[Table]) -> Markup:
    return join(_table(table) for table in found)


def _table(table: Table) -> Markup:
    def cell(column: int, text: str, tag: str) -> Markup:
        kind = Markup(' class="num"') if column in table.numeric else Markup("")
        scope = Markup(' scope="row"') if tag == "th" and column == 0 else Markup("")
        return fill("<{tag}{kind}{scope}>{text}</{tag}>", tag=tag, kind=kind, scope=scope, text=text)

    head = join(
        fill("<th{k}>{t}</th>", k=Markup(' class="num"') if i in table.numeric else "", t=t)
        for i, t in enumerate(table.head)
    )
    rows = join(
        fill("<tr>{cells}</tr>", cells=join(cell(i, t, "td" if i else "th") for i, t in enumerate(row)))
        for row in table.rows
    )
    body = fill(
        '<p class="soft">{text}</p><div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        "<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
        title=table.title,
        text=table.text,
        head=head,
        rows=rows,
    )
    frame = '<h3 class="spaced">{title}</h3>{body}'
    if table.folded:
        frame = '<details class="spaced"><summary>{title}</summary>{body}</details>'
    return fill(frame, title=table.title, body=body)
