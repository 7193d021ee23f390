"""Rewards for where something is: time spans and boxes (VideoChat-R1, OpenGVLab/VideoChat-R1, src_eval and training).

Its division by a union of 0 is 0 here. Text of a model is read as JSON, never evaluated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlvid.config import AnswerPart, BoxIouPart, GlueIouPart
from rlvid.rewards.answers import MAX_ANSWER_CHARS, answer_text
from rlvid.rewards.part import Group, NoReward, Values

_SPAN = re.compile(r"(\d+\.?\d*) (?:to|and) (\d+\.?\d*)")
Interval = tuple[float, float]


def last_span(text: str) -> Interval | None:
    """The last "START to END" or "START and END" of a text; None without one, or where it ends before it starts."""
    found = _SPAN.findall(text[-MAX_ANSWER_CHARS:])
    if not found:
        return None
    start, end = map(float, found[-1])
    return (start, end) if start <= end else None


def interval_iou(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Intersection over union of two sets of intervals; intervals of one set may overlap."""
    one, other = merged(one), merged(other)
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in one for b in other)
    union = sum(end - start for start, end in (*one, *other)) - both
    return both / union if union > 0 else 0.0


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The same points as intervals that do not overlap."""
    done: list[Interval] = []
    for start, end in sorted(intervals):
        if done and start <= done[-1][1]:
            done[-1] = (done[-1][0], max(end, done[-1][1]))
        else:
            done.append((start, end))
    return done


def temporal_iou(part: AnswerPart, group: Group) -> Values:
    right = last_span(group.sample.answer)
    if right is None:
        raise NoReward(f"the sample's answer {group.sample.answer[:80]!r} has no time span such as 3.5 to 7")
    spans = [last_span(answer_text(r.text, part.tags, group.opening) or "") for r in group.responses]
    return [interval_iou([span], [right]) if span else 0.0 for span in spans]


def glue_iou(part: GlueIouPart, group: Group) -> Values:
    right = numbers(group.sample.extra.get(part.gold), 2)
    if right is None or any(start > end for start, end in right):
        raise NoReward(f"the sample has no time spans [[start, end], ...] in {part.gold!r}")
    values = []
    for response in group.responses:
        spans = _read(answer_text(response.text, (part.tag,), group.opening) or "", 2)
        is_fit = spans is not None and all(start <= end for start, end in spans)
        values.append(interval_iou(_pairs(spans), _pairs(right)) if spans is not None and is_fit else 0.0)
    return values


def box_iou(part: BoxIouPart, group: Group) -> Values:
    """Mean over the right boxes; a missing box counts 0, further ones are ignored."""
    right = numbers(group.sample.extra.get(part.gold), 4)
    if right is None:
        raise NoReward(f"the sample has no boxes [[x0, y0, x1, y1], ...] in {part.gold!r}")
    values = []
    for response in group.responses:
        boxes = _read(answer_text(response.text, part.tags, group.opening) or "", 4) or []
        ious = [_box_iou(one, other) for one, other in zip(boxes, right, strict=False)]
        values.append(sum(ious) / len(right))
    return values


def _box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    both = float(np.prod(np.clip(high - low, 0.0, None)))
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (one, other)]
    union = sum(areas) - both
    return both / union if union > 0 else 0.0


def _pairs(rows: Sequence[Sequence[float]]) -> list[Interval]:
    return [(row[0], row[1]) for row in rows]


def _read(text: str, size: int) -> list[list[float]] | None:
    """Rows of `size` numbers from a text such as [(1, 2), (3, 4)]; None if it is anything else."""
    if len(text) > MAX_ANSWER_CHARS:
        return None
    try:
        return numbers(json.loads(text.replace("(", "[").replace(")", "]")), size)
    except (ValueError, RecursionError):
        return None


def numbers(value: Any, size: int) -> list[list[float]] | None:
    """A list of at least one row of `size` finite numbers; None if it is anything else."""
    if not isinstance(value, list | tuple) or not value:
        return None
    for row in value:
        if not isinstance(row, list | tuple) or len(row) != size:
            return None
        if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in row):
            return None
    return [[float(x) for x in row] for row in value]
