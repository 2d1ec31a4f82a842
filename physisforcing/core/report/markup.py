"""HTML from templates in which every value is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already. Only ``fill`` and ``join`` make it; everything else is escaped on its way in."""

    __slots__ = ()


def fill(template: str, **values: object) -> Markup:
    """``template`` (a literal of ours) with ``{name}`` replaced by escaped values.

    >>> fill("<p>{text}</p>", text="a < b")
    '<p>a &lt; b</p>'
    """
    return Markup(template.format(**{name: escape(value) for name, value in values.items()}))


def join(parts: Iterable[object]) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup("".join(escape(part) for part in parts))


def escape(value: object) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value), quote=True)
