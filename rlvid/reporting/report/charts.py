"""Draws charts as inline SVG: pure functions from series of points to markup, without script or plotting library.

Colours come from the page's CSS variables (`--s0` to `--s5`), so that one picture serves light and dark. Every text is
escaped by `Markup.format`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

# Cards have about this size in pixels, so font sizes in the chart are font sizes on the screen.
WIDTH, HEIGHT = 400, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 12, 30
_COLOURS = 6
_MAX_POINTS = 300  # a card has no pixels for more: steps are averaged
_MAX_BARS = 60
_SMOOTH_FROM = 24  # points; shorter curves are shown as they are

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One curve: (step, value) in order of steps, all values finite."""

    name: str
    points: Sequence[tuple[float, float]]
    has_dots: bool = False  # measured at few steps
    is_noisy: bool = True  # drawn faintly when it is long, with its moving mean over it


@dataclass(frozen=True)
class Point:
    """One dot of a scatter chart."""

    x: object  # a number, or anything else by its text
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
    drawn = [replace(s, points=_thin(s.points, _MAX_POINTS)) for s in series if s.points]
    values = [value for s in drawn for _, value in s.points]
    steps = [step for s in series for step, _ in s.points]  # the axis covers all steps, also after averaging
    is_log = allow_log and min(values) > 0 and max(values) / min(values) > 30
    axis = _Axis.logarithmic(values) if is_log else _Axis.linear(values, bounds)
    x = _scale(min(steps), max(steps), _LEFT, WIDTH - _RIGHT)
    y = axis.position
    parts = [_y_axis(axis, form), _x_axis(min(steps), max(steps), x)]
    for index, one in enumerate(drawn):
        colour = index % _COLOURS
        window = smoothing_window(one)
        if window > 1:
            parts.append(_path(one.points, x, y, Markup('class="line c{} faint"').format(colour)))
        parts.append(_path(_moving_mean(one.points, window), x, y, Markup('class="line c{}"').format(colour)))
        if one.has_dots or len(one.points) == 1:
            parts += [
                Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(colour, x(step), y(value))
                for step, value in one.points
            ]
    parts.append(_hover(drawn, x, form))
    return _svg(label, parts)


def stacked_chart(label: str, series: Sequence[Series], form: Format = seconds) -> Markup:
    """Bars over steps, the series on top of each other. A step that is missing in a series is 0."""
    all_steps = sorted({step for s in series for step, _ in s.points})
    width = math.ceil(len(all_steps) / _MAX_BARS)
    buckets = [all_steps[i : i + width] for i in range(0, len(all_steps), width)]
    tables = [dict(s.points) for s in series]
    heights = [[sum(table.get(step, 0.0) for step in bucket) / len(bucket) for table in tables] for bucket in buckets]
    axis = _Axis.linear([0.0, *(sum(column) for column in heights)], None)
    slot = (WIDTH - _LEFT - _RIGHT) / len(buckets)
    bar = min(slot - min(2.0, slot * 0.2), 40.0)
    parts = [_y_axis(axis, form)]
    hits = []
    for column, (bucket, values) in enumerate(zip(buckets, heights, strict=True)):
        left = _LEFT + column * slot
        base = 0.0
        for index, value in enumerate(values):
            top, bottom = axis.position(base + value), axis.position(base)
            base += value
            if bottom - top > 0.05:
                parts.append(
                    Markup('<rect class="bar c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                        index % _COLOURS, left + (slot - bar) / 2, top, bar, bottom - top
                    )
                )
        lines = [f"{s.name}: {form(value)}" for s, value in zip(series, values, strict=True)]
        hits.append(_hit(left, slot, _step_range(bucket), lines))
    first, last = all_steps[0], all_steps[-1]
    inner = _scale(first, last, _LEFT + slot / 2, WIDTH - _RIGHT - slot / 2)
    return _svg(label, [*parts, _x_axis(first, last, inner), *hits])


def scatter_chart(label: str, points: Sequence[Point], is_log: bool = False) -> Markup:
    """One dot per point. The x axis has numbers (logarithmic if `is_log`) or words in order of appearance."""
    numbers = [p.x for p in points if isinstance(p.x, int | float) and not isinstance(p.x, bool)]
    if len(numbers) < len(points):
        words = list(dict.fromkeys(str(p.x) for p in points))
        places = [float(words.index(str(p.x))) for p in points]
        x = _scale(-0.5, len(words) - 0.5, _LEFT, WIDTH - _RIGHT)
        ticks = [(float(i), word) for i, word in enumerate(words)]
    else:
        places = [math.log10(v) for v in numbers] if is_log else [float(v) for v in numbers]
        low, high = min(places), max(places)
        margin = 0.05 * (high - low) or 0.5
        x = _scale(low - margin, high + margin, _LEFT, WIDTH - _RIGHT)
        ticks = [(place, number(10**place if is_log else place)) for place in dict.fromkeys((low, high))]
    axis = _Axis.linear([p.y for p in points], None)
    parts = [_y_axis(axis, number)]
    parts += [
        Markup('<text x="{:.1f}" y="{}" class="x">{}</text>').format(x(place), HEIGHT - _BOTTOM + 16, text)
        for place, text in ticks
    ]
    for place, p in sorted(
        zip(places, points, strict=True), key=lambda pair: pair[1].is_best
    ):  # the best is drawn last, on top
        dot = '<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
        size = 6 if p.is_best else 4
        parts.append(Markup(dot).format(0 if p.is_best else 1, x(place), axis.position(p.y), size, p.name))
    return _svg(label, parts)


def smoothing_window(series: Series) -> int:
    """Number of points in the moving mean of a curve; 1: it is not smoothed."""
    n = min(len(series.points), _MAX_POINTS)
    return 2 * max(2, n // 40) + 1 if series.is_noisy and n >= _SMOOTH_FROM else 1


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers, from at most `low` to at least `high`."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10, 20) if span / (m * magnitude) <= count + 0.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


# --- private helpers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    ticks: list[float]
    position: Callable[[float], float]

    @classmethod
    def linear(cls, values: Sequence[float], bounds: tuple[float, float] | None) -> _Axis:
        low, high = bounds or (min(values), max(values))
        if bounds is None:
            if 0 <= low < 0.5 * high:  # a curve near 0 is drawn with 0 on its axis
                low = 0.0
            if high == low:
                margin = abs(high) * 0.5 or 1.0
                low, high = (0.0, high + margin) if high >= 0 else (low - margin, high + margin)
        ticks = nice_ticks(low, high)
        return cls(ticks, _scale(ticks[0], ticks[-1], HEIGHT - _BOTTOM, _TOP))

    @classmethod
    def logarithmic(cls, values: Sequence[float]) -> _Axis:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        every = math.ceil((high - low) / 5)
        scale = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
        return cls([10.0**power for power in range(low, high + 1, every)], lambda value: scale(math.log10(value)))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _thin(points: Sequence[tuple[float, float]], limit: int) -> Sequence[tuple[float, float]]:
    width = math.ceil(len(points) / limit)
    if width <= 1:
        return points
    buckets = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(s for s, _ in b) / len(b), sum(v for _, v in b) / len(b)) for b in buckets]


def _moving_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Centred moving mean; near the ends it uses the points that exist."""
    half = window // 2
    smooth = []
    for index, (step, _) in enumerate(points):
        around = [value for _, value in points[max(0, index - half) : index + half + 1]]
        smooth.append((step, sum(around) / len(around)))
    return smooth


def _path(
    points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float], attributes: Markup
) -> Markup:
    data = "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
    return Markup('<path {} d="{}"/>').format(attributes, data)


def _labels(ticks: Sequence[float], form: Format) -> list[str]:
    """A label for each tick, with more digits if `form` would give two ticks the same label."""
    labels = [form(tick) for tick in ticks]
    if len(set(labels)) == len(ticks):
        return labels
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]))) + 1
    return [f"{tick:.{digits}f}".replace("-", "−") for tick in ticks]


def _y_axis(axis: _Axis, form: Format) -> Markup:
    lines = []
    for tick, label in zip(axis.ticks, _labels(axis.ticks, form), strict=True):
        y = axis.position(tick)
        kind = "zero" if tick == 0 else "grid"
        lines.append(
            Markup(
                '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/><text x="{}" y="{:.1f}" class="y">{}</text>'
            ).format(kind, _LEFT, WIDTH - _RIGHT, y, y, _LEFT - 7, y + 3.5, label)
        )
    return Markup("").join(lines)


def _x_axis(first: float, last: float, x: Callable[[float], float]) -> Markup:
    ticks = [tick for tick in nice_ticks(first, last, 5) if first <= tick <= last and tick == int(tick)] or [first]
    labels = [
        Markup('<text x="{:.1f}" y="{}" class="x">{}</text>').format(x(tick), HEIGHT - _BOTTOM + 16, number(tick))
        for tick in ticks
    ]
    return Markup("").join(labels)


def _hover(series: Sequence[Series], x: Callable[[float], float], form: Format) -> Markup:
    """Invisible columns with a tooltip, one per step, or one per several steps if there are many."""
    steps = sorted({step for s in series for step, _ in s.points})
    width = math.ceil(len(steps) / 100)
    buckets = [steps[i : i + width] for i in range(0, len(steps), width)]
    slot = (WIDTH - _LEFT - _RIGHT) / max(1, len(buckets))
    tables = [(s.name, dict(s.points)) for s in series]
    hits = []
    for bucket in buckets:
        lines = []
        for name, table in tables:
            values = [table[step] for step in bucket if step in table]
            if values:
                lines.append(f"{name}: {form(sum(values) / len(values))}")
        centre = (x(bucket[0]) + x(bucket[-1])) / 2
        hits.append(_hit(max(_LEFT, centre - slot / 2), slot, _step_range(bucket), lines))
    return Markup("").join(hits)


def _hit(left: float, width: float, steps: str, lines: Sequence[str]) -> Markup:
    text = "\n".join([steps, *lines])
    return Markup('<rect class="hit" x="{:.1f}" y="{}" width="{:.1f}" height="{}"><title>{}</title></rect>').format(
        left, _TOP, max(0.5, min(width, WIDTH - _RIGHT - left)), HEIGHT - _TOP - _BOTTOM, text
    )


def _step_range(steps: Sequence[float]) -> str:
    first, last = round(steps[0]), round(steps[-1])
    return f"step {first}" if first == last else f"steps {first}–{last}, mean"


def _svg(label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )
