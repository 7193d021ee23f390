from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlvid.config import BoxIouPart, GlueIouPart, TemporalIouPart
from rlvid.rewards.grounding import interval_iou, last_span
from rlvid.rewards.part import Group, NoReward, Response
from rlvid.rewards.rules import make_parts
from tests.prompts import sample_of


def values(part: Any, gold: str, extra: dict[str, Any], *responses: str) -> list[Any]:
    (made,) = make_parts([part])
    sample = replace(sample_of(), answer=gold, extra=extra)
    return list(made(Group(sample, tuple(Response(r, 1) for r in responses))))


def test_the_last_span_counts_and_may_not_end_before_it_starts() -> None:
    assert last_span("from 1 to 2, no: 3.5 to 7 s") == (3.5, 7.0)
    assert last_span("between 4 and 2") is None and last_span("at 5") is None


def test_interval_iou() -> None:
    assert interval_iou([(0, 4)], [(2, 6)]) == pytest.approx(2 / 6)
    assert interval_iou([(0, 1), (0.5, 2)], [(0, 2)]) == 1.0  # overlapping intervals count once
    assert interval_iou([(0, 1)], [(2, 3)]) == 0.0
    assert interval_iou([(1, 1)], [(1, 1)]) == 0.0  # VideoChat-R1 divides by 0 here


def test_temporal_iou() -> None:
    part = TemporalIouPart(kind="temporal_iou", tags=("answer",))
    given = ["<answer>2 to 6</answer>", "<answer>6 to 2</answer>", "2 to 6"]
    assert values(part, "0 to 4", {}, *given) == [pytest.approx(1 / 3), 0, 0]
    assert isinstance(values(part, "later", {}, given[0])[0], NoReward)


def test_glue_iou() -> None:
    part = GlueIouPart(kind="glue_iou")
    extra = {"glue": [[0, 2], [4, 6]]}
    given = ["<glue>[(0, 2), (4, 5)]</glue>", "<glue>[[0, 6]]</glue>", "<glue>__import__('os')</glue>", "none"]
    assert values(part, "B", extra, *given) == [pytest.approx(3 / 4), pytest.approx(4 / 6), 0, 0]
    assert isinstance(values(part, "B", {"glue": [[3, 1]]}, given[0])[0], NoReward)
    assert isinstance(values(part, "B", {}, given[0])[0], NoReward)


def test_box_iou_is_a_mean_over_the_right_boxes() -> None:
    part = BoxIouPart(kind="box_iou")
    extra = {"boxes": [[0, 0, 2, 2], [0, 0, 1, 1]]}
    given = ["[[1, 1, 3, 3], [0, 0, 1, 1]]", "[[0, 0, 2, 2]]", "[[0, 0, NaN, 2]]", "[" * 2000]
    assert values(part, "", extra, *given) == [pytest.approx((1 / 7 + 1) / 2), 0.5, 0, 0]
