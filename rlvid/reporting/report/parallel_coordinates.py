"""Parallel coordinates as inline SVG: a line per trial over one axis per hyperparameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rlvid.reporting.report.charts import number

WIDTH, HEIGHT = 900, 300
_TOP, _BOTTOM, _SIDE = 34, 26, 70
_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which an axis is logarithmic


@dataclass(frozen=True)
class Dimension:
    """One axis. Its values are numbers, or anything else, which is then put in order of appearance."""

    name: str
    values: Sequence[Any]  # one per line

    def places(self) -> tuple[list[float], str, str]:
        """Place of each value between 0 and 1, and the labels at both ends."""
        numbers = [float(v) for v in self.values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) < len(self.values):
            kinds = list(dict.fromkeys(str(v) for v in self.values))
            return [_share(kinds.index(str(v)), 0, len(kinds) - 1) for v in self.values], kinds[0], kinds[-1]
        low, high = min(numbers), max(numbers)
        if low > 0 and high / low > _LOG_FROM:
            shares = [_share(math.log(v), math.log(low), math.log(high)) for v in numbers]
        else:
            shares = [_share(v, low, high) for v in numbers]
        return shares, number(low), number(high)


def parallel_coordinates(
    label: str, dimensions: Sequence[Dimension], classes: Sequence[str], names: Sequence[str]
) -> Markup:
    """A line per trial.

    Args:
        classes: CSS classes of each line; one with "best" among them is drawn last, on top.
        names: tooltip of each line.
    """
    gap = (WIDTH - 2 * _SIDE) / max(1, len(dimensions) - 1)
    points: list[list[str]] = [[] for _ in names]
    parts = []
    for i, dimension in enumerate(dimensions):
        x = _SIDE + i * gap
        shares, low, high = dimension.places()
        for path, share in zip(points, shares, strict=True):
            path.append(f"{x:.1f} {HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM):.1f}")
        axis = Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, _TOP, HEIGHT - _BOTTOM)
        texts = ((14, dimension.name), (28, high), (HEIGHT - 8, low))
        parts += [
            axis,
            *(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x, *t) for t in texts),
        ]
    for line in sorted(range(len(names)), key=lambda line: "best" in classes[line]):
        way = "M" + " L".join(points[line])
        parts.append(Markup('<path class="{}" d="{}"><title>{}</title></path>').format(classes[line], way, names[line]))
    return Markup('<svg class="lines" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5
