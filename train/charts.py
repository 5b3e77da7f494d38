"""Line charts as SVG, for pages that must work without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40  # room around the plot
COLOURS = ("#1f6fb4", "#d1621b", "#2f8f46", "#8a4fb0", "#777777", "#b03a52")


@dataclass(frozen=True)
class Series:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def line_chart(title: str, x_label: str, series: Sequence[Series]) -> str:
    """An <svg> of all series in one pair of axes, the vertical one from zero; "" if there is no finite point."""
    points = [_finite(line) for line in series]
    shown = [(line, xy) for line, xy in zip(series, points, strict=True) if len(xy)]
    if not shown:
        return ""
    everything = np.concatenate([xy for _, xy in shown])
    x_ticks = _ticks(everything[:, 0].min(), everything[:, 0].max())
    y_ticks = _ticks(min(0.0, everything[:, 1].min()), everything[:, 1].max())
    parts = [f'<text x="{LEFT}" y="16" class="title">{html.escape(title)}</text>']
    for tick in y_ticks:
        y = _place(tick, y_ticks, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        x = _place(tick, x_ticks, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 22}" class="tick" text-anchor="middle">{tick:.4g}</text>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{HEIGHT - 6}" class="tick" text-anchor="middle">{html.escape(x_label)}</text>')
    for number, (line, xy) in enumerate(shown):
        x = _place(xy[:, 0], x_ticks, LEFT, WIDTH - RIGHT)
        y = _place(xy[:, 1], y_ticks, HEIGHT - BOTTOM, TOP)
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        dash = ' stroke-dasharray="5 4"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(number)}" stroke-width="2"{dash}/>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f"<figure><svg {size}>{''.join(parts)}</svg>{_legend([line for line, _ in shown])}</figure>"


def cumulative(label: str, values: Sequence[float], dashed: bool = False) -> Series:
    """The share of values that are at most x, as steps."""
    x = np.sort(np.asarray(values, np.float64))
    share = np.arange(len(x) + 1) / max(len(x), 1)
    return Series(label, np.repeat(x, 2).tolist(), np.repeat(share, 2)[1:-1].tolist(), dashed)


def _finite(line: Series) -> np.ndarray:
    xy = np.array([line.x, line.y], np.float64).T
    return xy[np.isfinite(xy).all(axis=1)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _legend(series: Sequence[Series]) -> str:
    entries = (
        f'<span><i style="border-top:3px {"dashed" if line.dashed else "solid"} {_colour(number)}"></i>'
        f"{html.escape(line.label)}</span>"
        for number, line in enumerate(series)
    )
    return f"<figcaption>{''.join(entries)}</figcaption>"


def _ticks(low: float, high: float) -> np.ndarray:
    """Three to six round numbers that span the range."""
    span = float(high - low) or abs(high) or 1.0
    magnitude = 10.0 ** np.floor(np.log10(span))
    step = magnitude * next(m for m in (0.2, 0.5, 1, 2) if span / (magnitude * m) <= 5)
    first = np.floor(low / step)
    return np.arange(first, max(np.ceil(high / step), first + 1) + 1) * step


def _place(value: np.ndarray | float, ticks: np.ndarray, first: float, last: float) -> np.ndarray:
    """Pixels between `first` and `last` for values between the first and the last tick."""
    return first + (np.asarray(value) - ticks[0]) / (ticks[-1] - ticks[0]) * (last - first)
