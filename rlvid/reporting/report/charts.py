"""Draws charts as inline SVG: pure functions from series of points to markup, without script or plotting library.

Colours come from the page's CSS variables (`--s0` to `--s5`), so that one picture serves light and dark. Every text is
escaped by `Markup.format`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

from markupsafe import Markup

# Cards have about this size in pixels, so font sizes in the chart are font sizes on the screen.
WIDTH, HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 30
_COLOURS = 6
_MAX_POINTS = 300  # a card has no pixels for more: steps are averaged
_MAX_BARS = 60
_MAX_TOOLTIPS = 100
_SMOOTH_FROM = 24  # points; shorter curves are shown as they are

Format = Callable[[float], str]
Scale = Callable[[float], float]  # from a value to its position in the picture
Points = Sequence[tuple[float, float]]  # (step, value)
T = TypeVar("T")


@dataclass(frozen=True)
class Series:
    """One curve, in order of steps, all values finite."""

    name: str
    points: Points
    has_dots: bool = False  # measured at few steps
    is_noisy: bool = True  # drawn faintly when it is long, with its moving mean over it


@dataclass(frozen=True)
class Point:
    """One dot of a scatter chart."""

    x: Any  # a number, or anything else by its text
    y: float
    name: str  # its tooltip
    is_best: bool = False


def percent(value: float) -> str:
    return f"{100 * value:.3g} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"


def percent_precise(value: float) -> str:
    return f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Three significant digits; thousands with a thin space."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    text = f"{value:,.0f}".replace(",", "\u2009") if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def seconds(value: float) -> str:
    return f"{number(value)} s"


def line_chart(
    label: str,
    series: Sequence[Series],
    form: Format = number,
    bounds: tuple[float, float] | None = None,
    allow_log: bool = False,
) -> Markup:
    """Curves over steps, on a logarithmic axis if `allow_log` and the values span a wide range."""
    drawn = [replace(s, points=_thin(s.points)) for s in series]
    values = [value for s in drawn for _, value in s.points]
    steps = [step for s in series for step, _ in s.points]  # the axis covers all steps, also after averaging
    is_log = allow_log and min(values) > 0 and max(values) / min(values) > 30
    y_axis, y = _y_axis(values, form, bounds, is_log)
    x = _scale(min(steps), max(steps), _LEFT, WIDTH - _RIGHT)
    parts = [y_axis, _step_axis(min(steps), max(steps), x)]
    for index, one in enumerate(drawn):
        colour, window = f"c{index % _COLOURS}", smoothing_window(one)
        curves = [(f"line {colour} faint", one.points)] if window > 1 else []
        for kind, curve in (*curves, (f"line {colour}", _moving_mean(one.points, window))):
            parts.append(_tag("path", kind, d="M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in curve)))
        if one.has_dots or len(one.points) == 1:
            parts += [_tag("circle", f"dot {colour}", cx=x(step), cy=y(value), r=3.2) for step, value in one.points]
    return _svg(label, [*parts, *_tooltips(drawn, x, form)])


def stacked_chart(label: str, series: Sequence[Series], form: Format = seconds) -> Markup:
    """Bars over steps, the series on top of each other. A step that is missing in a series is 0."""
    tables = [dict(s.points) for s in series]
    steps = sorted({step for table in tables for step in table})
    buckets = _buckets(steps, _MAX_BARS)
    bars = [[fmean(table.get(step, 0.0) for step in bucket) for table in tables] for bucket in buckets]
    y_axis, y = _y_axis([0.0, *map(sum, bars)], form)
    slot = (WIDTH - _LEFT - _RIGHT) / len(buckets)
    width = min(slot - min(2.0, slot * 0.2), 40.0)
    parts, tooltips = [y_axis], []
    for column, (bucket, bar) in enumerate(zip(buckets, bars, strict=True)):
        left, base = _LEFT + column * slot, 0.0
        for index, value in enumerate(bar):
            top, height = y(base + value), y(base) - y(base + value)
            base += value
            if height > 0.05:
                kind = f"bar c{index % _COLOURS}"
                parts.append(_tag("rect", kind, x=left + (slot - width) / 2, y=top, width=width, height=height))
        lines = [f"{s.name}: {form(value)}" for s, value in zip(series, bar, strict=True)]
        tooltips.append(_tooltip(left, slot, bucket, lines))
    x = _scale(steps[0], steps[-1], _LEFT + slot / 2, WIDTH - _RIGHT - slot / 2)
    return _svg(label, [*parts, _step_axis(steps[0], steps[-1], x), *tooltips])


def scatter_chart(label: str, points: Sequence[Point], is_log: bool = False) -> Markup:
    """One dot per point. The x axis has numbers (logarithmic if `is_log`) or words in order of appearance."""
    if all(type(p.x) in (int, float) for p in points):
        places = [math.log10(p.x) if is_log else float(p.x) for p in points]
        low, high = min(places), max(places)
        margin = 0.05 * (high - low) or 0.5
        ticks = {place: number(10**place if is_log else place) for place in (low, high)}
    else:
        words = list(dict.fromkeys(str(p.x) for p in points))
        places = [float(words.index(str(p.x))) for p in points]
        low, high, margin = 0.0, len(words) - 1.0, 0.5
        ticks = {float(i): word for i, word in enumerate(words)}
    x = _scale(low - margin, high + margin, _LEFT, WIDTH - _RIGHT)
    y_axis, y = _y_axis([p.y for p in points], number)
    parts = [y_axis, _x_labels(ticks, x)]
    for place, p in sorted(zip(places, points, strict=True), key=lambda pair: pair[1].is_best):  # the best is on top
        colour, radius = ("c0", 6) if p.is_best else ("c1", 4)
        parts.append(_tag("circle", f"dot {colour}", _tag("title", "", p.name), cx=x(place), cy=y(p.y), r=radius))
    return _svg(label, parts)


def smoothing_window(series: Series) -> int:
    """Number of points in the moving mean of a curve; 1: it is not smoothed."""
    n = min(len(series.points), _MAX_POINTS)
    return 2 * max(2, n // 40) + 1 if series.is_noisy and n >= _SMOOTH_FROM else 1


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, from at most `low` to at least `high`."""
    span = high - low
    if span <= 0:
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10, 20) if span / (m * magnitude) <= count + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


# --- private helpers --------------------------------------------------------------------------------------------------


def _buckets(items: Sequence[T], limit: int) -> list[Sequence[T]]:
    """At most `limit` slices of about equal length."""
    width = max(1, math.ceil(len(items) / limit))
    return [items[i : i + width] for i in range(0, len(items), width)]


def _thin(points: Points) -> Points:
    return [(fmean(s for s, _ in bucket), fmean(v for _, v in bucket)) for bucket in _buckets(points, _MAX_POINTS)]


def _moving_mean(points: Points, window: int) -> Points:
    """Centred moving mean; near the ends it uses the points that exist."""
    half = window // 2
    around = (points[max(0, index - half) : index + half + 1] for index in range(len(points)))
    return [(step, fmean(value for _, value in near)) for (step, _), near in zip(points, around, strict=True)]


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _y_axis(
    values: Sequence[float], form: Format, bounds: tuple[float, float] | None = None, is_log: bool = False
) -> tuple[Markup, Scale]:
    """Grid lines with labels, and the scale on which `values` (or `bounds`) are drawn."""
    low, high = bounds or (min(values), max(values))
    to_linear: Scale = math.log10 if is_log else float
    if is_log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = math.ceil((last - first) / 5)
        ticks = [10.0**power for power in range(first, last + every, every)]
    else:
        if bounds is None and 0 <= low < 0.5 * high:  # a curve near 0 is drawn with 0 on its axis
            low = 0.0
        if high == low:
            margin = abs(high) * 0.5 or 1.0
            low, high = (0.0, high + margin) if high >= 0 else (low - margin, high + margin)
        ticks = nice_ticks(low, high)
    scale = _scale(to_linear(ticks[0]), to_linear(ticks[-1]), HEIGHT - _BOTTOM, _TOP)
    parts = []
    for tick, label in zip(ticks, _labels(ticks, form), strict=True):
        kind, y = "zero" if tick == 0 else "grid", scale(to_linear(tick))
        parts.append(_tag("line", kind, x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(_tag("text", "y", label, x=_LEFT - 7, y=y + 3.5))
    return Markup("").join(parts), lambda value: scale(to_linear(value))


def _labels(ticks: Sequence[float], form: Format) -> list[str]:
    """A label for each tick, with more digits if `form` would give two ticks the same label."""
    labels = [form(tick) for tick in ticks]
    if len(set(labels)) == len(ticks):
        return labels
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) + 1
    return [f"{tick:.{digits}f}".replace("-", "−") for tick in ticks]


def _step_axis(first: float, last: float, x: Scale) -> Markup:
    ticks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last and tick == int(tick)] or [first]
    return _x_labels({tick: number(tick) for tick in ticks}, x)


def _x_labels(ticks: Mapping[float, str], x: Scale) -> Markup:
    labels = [_tag("text", "x", text, x=x(tick), y=HEIGHT - _BOTTOM + 16) for tick, text in ticks.items()]
    return Markup("").join(labels)


def _tooltips(series: Sequence[Series], x: Scale, form: Format) -> list[Markup]:
    """Invisible columns with a tooltip, one per step, or one per several steps if there are many."""
    tables = [(s.name, dict(s.points)) for s in series]
    buckets = _buckets(sorted({step for _, table in tables for step in table}), _MAX_TOOLTIPS)
    slot = (WIDTH - _LEFT - _RIGHT) / len(buckets)
    tooltips = []
    for bucket in buckets:
        found = [(name, [table[step] for step in bucket if step in table]) for name, table in tables]
        lines = [f"{name}: {form(fmean(values))}" for name, values in found if values]
        tooltips.append(_tooltip((x(bucket[0]) + x(bucket[-1]) - slot) / 2, slot, bucket, lines))
    return tooltips


def _tooltip(left: float, width: float, steps: Sequence[float], lines: Sequence[str]) -> Markup:
    first, last = round(steps[0]), round(steps[-1])
    heading = f"step {first}" if first == last else f"steps {first}–{last}, mean"
    left = max(_LEFT, left)
    width = max(0.5, min(width, WIDTH - _RIGHT - left))
    title = _tag("title", "", "\n".join([heading, *lines]))
    return _tag("rect", "hit", title, x=left, y=_TOP, width=width, height=HEIGHT - _TOP - _BOTTOM)


def _tag(name: str, kind: str, content: str = "", **attributes: float | str) -> Markup:
    """An element of class `kind`; floats are written with one decimal."""
    given = {**attributes, "class": kind} if kind else attributes
    shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in given.items()}
    text = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in shown.items())
    return Markup("<{0}{1}>{2}</{0}>").format(name, text, content)


def _svg(label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )
