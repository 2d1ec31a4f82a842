"""Charts as inline SVG: no script, no dependency, colours from the page's style sheet so that dark mode works."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .data import Curve, SuccessRow, interval
from .markup import Markup, fill, join

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30


def line_chart(curve: Curve) -> Markup:
    """A curve: raw values faint, its running mean over a twentieth of the run on top. What is not finite is a gap."""
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    if not points:
        return fill('<p class="empty">{name}: no finite value was logged.</p>', name=curve.name)
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high, ticks = _axis(min(values), max(values))
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    grid = join(
        fill(
            '<line class="grid" x1="{l}" x2="{r}" y1="{y}" y2="{y}"/>'
            '<text class="tick" x="{t}" y="{ty}" text-anchor="end">{v}</text>',
            l=LEFT, r=WIDTH - RIGHT, y=_px(y(tick)), t=LEFT - 6, ty=_px(y(tick) + 3.5), v=f"{tick:.4g}",
        )
        for tick in ticks
    )  # fmt: skip
    marks = join(
        fill('<text class="tick" x="{x}" y="{y}" text-anchor="{a}">{v}</text>', x=_px(x(s)), y=HEIGHT - 12, a=a, v=s)
        for s, a in ((first, "start"), (last, "end"))
    )
    raw = " ".join(f"{_px(x(s))},{_px(y(v))}" for s, v in points)
    smooth = " ".join(f"{_px(x(s))},{_px(y(v))}" for s, v in zip(steps, _running_mean(values), strict=True))
    return fill(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-label="{label}">{grid}{marks}'
        '<text class="tick" x="{mid}" y="{by}" text-anchor="middle">training step</text>'
        '<polyline class="raw" points="{raw}"/><polyline class="smooth" points="{smooth}"/></svg>',
        w=WIDTH, h=HEIGHT, grid=grid, marks=marks, mid=(LEFT + WIDTH - RIGHT) // 2, by=HEIGHT - 12,
        raw=raw, smooth=smooth,
        label=f"{curve.name} over training steps: from {values[0]:.4g} to {values[-1]:.4g} {curve.unit}",
    )  # fmt: skip


def interval_bar(row: SuccessRow) -> Markup:
    """Success rate as a dot on 0..1 with its 95 % interval as a bar."""
    bounds = interval(row)
    if bounds is None:
        return Markup("")
    low, high, rate = bounds[0], bounds[1], row.successes / row.episodes
    return fill(
        '<svg class="bar {kind}" viewBox="-6 0 212 20" role="img" aria-label="{label}">'
        '<line class="grid" x1="0" x2="200" y1="10" y2="10"/><line class="grid" x1="0" x2="0" y1="4" y2="16"/>'
        '<line class="grid" x1="100" x2="100" y1="6" y2="14"/><line class="grid" x1="200" x2="200" y1="4" y2="16"/>'
        '<rect class="range" x="{x}" y="6" width="{w}" height="8" rx="4"/>'
        '<circle class="dot" cx="{c}" cy="10" r="5"/></svg>',
        kind="baseline" if row.baseline else "model",
        label=f"{rate:.0%}, interval {low:.0%} to {high:.0%}",
        x=_px(200 * low),
        w=_px(max(200 * (high - low), 1)),
        c=_px(200 * rate),
    )


def _px(value: float) -> str:
    return f"{value:.1f}"


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(len(values) // 40, 0)
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    out = []
    for i in range(len(values)):
        lo, hi = max(i - half, 0), min(i + half + 1, len(values))
        out.append((total[hi] - total[lo]) / (hi - lo))
    return out


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Range and about four round ticks that cover [low, high]."""
    if high - low < 1e-12 * max(abs(high), 1e-30):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [i * step for i in range(first, last + 1)]
    return first * step, last * step, ticks
