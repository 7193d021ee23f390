"""Rewards for where something is: time spans and boxes (VideoChat-R1, OpenGVLab/VideoChat-R1, src_eval and training).

Its division by a union of 0 is 0 here. Text of a model is read as JSON, never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from rlvid.config import AnswerPart, BoxIouPart, GlueIouPart
from rlvid.rewards.answers import MAX_ANSWER_CHARS, answer_text
from rlvid.rewards.part import Group, NoReward, Values, answers

_SPAN = re.compile(r"(\d+\.?\d*) (?:to|and) (\d+\.?\d*)")
T = TypeVar("T")
Interval = tuple[float, float]


def _in_order(span: Interval) -> Interval:
    if span[0] > span[1]:
        raise ValueError("it ends before it starts")
    return span


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
SPANS = TypeAdapter(Annotated[list[Annotated[tuple[Number, Number], AfterValidator(_in_order)]], Field(min_length=1)])
BOXES = TypeAdapter(Annotated[list[tuple[Number, Number, Number, Number]], Field(min_length=1)])


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
    spans = map(last_span, answers(part, group))
    return [interval_iou([span], [right]) if span else 0.0 for span in spans]


def glue_iou(part: GlueIouPart, group: Group) -> Values:
    right = _valid(SPANS, group.sample.extra.get(part.gold))
    if right is None:
        raise NoReward(f"the sample has no time spans [[start, end], ...] in {part.gold!r}")
    found = [_read(SPANS, answer_text(r.text, (part.tag,), group.opening) or "") for r in group.responses]
    return [interval_iou(spans, right) if spans else 0.0 for spans in found]


def box_iou(part: BoxIouPart, group: Group) -> Values:
    """Mean over the right boxes; a missing box counts 0, further ones are ignored."""
    right = _valid(BOXES, group.sample.extra.get(part.gold))
    if right is None:
        raise NoReward(f"the sample has no boxes [[x0, y0, x1, y1], ...] in {part.gold!r}")
    values = []
    for answer in answers(part, group):
        boxes = _read(BOXES, answer) or []
        ious = [_box_iou(one, other) for one, other in zip(boxes, right, strict=False)]
        values.append(sum(ious) / len(right))
    return values


def _box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    both = float(np.prod(np.clip(high - low, 0.0, None)))
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (one, other)]
    union = sum(areas) - both
    return both / union if union > 0 else 0.0


def _valid(kind: TypeAdapter[T], value: object) -> T | None:
    """`value`, or None if it is of another kind."""
    try:
        return kind.validate_python(value)
    except ValidationError:
        return None


def _read(kind: TypeAdapter[T], text: str) -> T | None:
    """A text such as [(1, 2), (3, 4)]; None if it is anything else."""
    try:
        return kind.validate_json(text.replace("(", "[").replace(")", "]")) if len(text) <= MAX_ANSWER_CHARS else None
    except ValidationError:
        return None
