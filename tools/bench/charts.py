"""Line, step and dot charts as inline SVG: no script, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal, NamedTuple

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 42  # around the plot
NUM_TICKS = 5
LOG_SPAN = 30.0  # from the least to the largest value, from where on a logarithmic axis says more
DOT = 2.8
MAX_SERIES = 4  # colours of report.py

Point = tuple[float, float]


class Series(NamedTuple):
    name: str
    points: Sequence[Point]


class Chart(NamedTuple):
    """y begins at 0. x is logarithmic where it may be and its values differ much."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["lines", "steps", "dots"] = "lines"
    may_be_log: bool = False
    y_max: float | None = None


class Axis(NamedTuple):
    """Values -> pixels, and where its ticks are."""

    place: Callable[[float], float]
    ticks: Sequence[float]


def linear(low: float, high: float, start: float, end: float) -> Axis:
    """low..high, widened to whole steps, over start..end."""
    step = nice_step((high - low) / NUM_TICKS)
    low, high = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    ticks = [low + step * index for index in range(round((high - low) / step) + 1)]
    return Axis(lambda value: start + (value - low) / (high - low) * (end - start), ticks)


def logarithmic(low: float, high: float, start: float, end: float) -> Axis:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [10.0**power for power in range(first, last + 1)]

    def place(value: float) -> float:
        return start + (math.log10(value) - first) / (last - first) * (end - start)

    return Axis(place, ticks)


def nice_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, not less than this."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def axes_of(chart: Chart) -> tuple[Axis, Axis]:
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    low, high = min(xs), max(xs)
    if chart.may_be_log and low > 0 and high / low > LOG_SPAN:
        across = logarithmic(low, high, LEFT, WIDTH - RIGHT)
    else:
        low, high = (min(0.0, low), high) if low < high else (low - 0.5, low + 0.5)
        across = linear(low, high, LEFT, WIDTH - RIGHT)
    top = chart.y_max if chart.y_max is not None else max(ys)
    return across, linear(0.0, top if top > 0 else 1.0, HEIGHT - BOTTOM, TOP)


def svg(chart: Chart) -> str:
    """The chart as an <svg> element of a page that has report.py's style; a line of text if it has no points."""
    drawn = [series for series in chart.series if series.points]
    if not drawn:
        return f'<p class="none">{escape(chart.title)}: nothing to show</p>'
    chart = chart._replace(series=drawn[:MAX_SERIES])
    across, up = axes_of(chart)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    parts += _grid(across, up)
    for number, series in enumerate(chart.series):
        parts += _marks(chart.kind, series, number, across, up)
    middle, at = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text("label", middle, HEIGHT - 6, chart.x_label))
    parts.append(_text("label", 13, at, chart.y_label, turned=True))
    return "\n".join([*parts, "</svg>"])


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle", *, turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def legend(chart: Chart) -> str:
    """Which colour is what; nothing to say of a single series."""
    names = [series.name for series in chart.series if series.points][:MAX_SERIES]
    if len(names) < 2:
        return ""
    items = "".join(f'<span class="key k{number}">{escape(name)}</span>' for number, name in enumerate(names))
    return f'<p class="legend">{items}</p>'


def _grid(across: Axis, up: Axis) -> list[str]:
    parts, floor = [], HEIGHT - BOTTOM
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", LEFT - 6, y + 3.5, shown(tick), "end"))
    for tick in across.ticks:
        x = across.place(tick)
        parts.append(f'<line class="notch" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(_text("tick", x, floor + 16, shown(tick)))
    return parts


def _marks(kind: str, series: Series, number: int, across: Axis, up: Axis) -> list[str]:
    places = [(across.place(x), up.place(y)) for x, y in series.points]
    if kind == "dots":
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}"/>' for x, y in places)
        return [f'<g class="dots s{number}">{dots}</g>']
    path = [f"M{places[0][0]:.1f} {places[0][1]:.1f}"]
    path += [f"H{x:.1f}V{y:.1f}" if kind == "steps" else f"L{x:.1f} {y:.1f}" for x, y in places[1:]]
    parts = [f'<path class="line s{number}" d="{"".join(path)}"/>']
    if kind == "lines":
        for (x, y), (value_x, value_y) in zip(places, series.points, strict=True):
            said = f"<title>{escape(f'{series.name}: {shown(value_y)} at {shown(value_x)}')}</title>"
            parts.append(f'<circle class="knot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{said}</circle>')
    return parts


def shown(value: float) -> str:
    """Short: 1500 -> 1,500; 0.30000000000000004 -> 0.3."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
