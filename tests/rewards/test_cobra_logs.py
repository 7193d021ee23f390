"""What the published outputs of Thinking-Cobra come to by our own reading."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import ChoicePart, FormatPart
from rlvid.rewards.part import Group, Response, score_rules
from rlvid.rewards.rules import make_parts
from rlvid.types import Message, Sample

LOGS = Path(__file__).parents[3] / "shared" / "data" / "llava_cot"
TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")

pytestmark = pytest.mark.skipif(not LOGS.is_dir(), reason="the outputs of Thinking-Cobra are not here")


def rows(name: str) -> list[dict[str, Any]]:
    return list(json.loads(gzip.decompress((LOGS / f"{name}.json.gz").read_bytes()))["results"])


def value(part: ChoicePart | FormatPart, sample: Sample, text: str) -> float:
    (own,) = score_rules(make_parts([part]), Group(sample, (Response(text, 1),))).values()
    assert isinstance(own[0], float)
    return own[0]


@pytest.mark.parametrize(("method", "right"), [("baseline", 366), ("scratchpad", 338)])
def test_mmstar_accuracies_are_those_of_the_first_letter(method: str, right: int) -> None:
    """Each row has the verdict that is stored for it."""
    part, total = ChoicePart(kind="choice", reading="first_letter"), 0.0
    for row in rows(f"cobra_mmstar1000_{method}"):
        sample = Sample(
            str(row["image_id"]), (), (Message("user", (row["question"],)),), row["reference_answer"], tuple("ABCD")
        )
        own = value(part, sample, row["generated_answer"])
        assert own == row["metrics"]["MMStar-Correct"], row["generated_answer"]
        total += own
    assert total == right


def test_no_prompted_output_has_all_four_tags() -> None:
    sample = Sample("0", (), (Message("user", ("Describe it.",)),), "")
    part = FormatPart(kind="format", tags=TAGS)
    traces = [row["reasoning_trace"] for row in rows("cobra_coco100_llavacot_prompted")]
    assert len(traces) == 100 and not sum(value(part, sample, text) for text in traces)
    assert sum(bool(re.search("|".join(f"<{tag}>" for tag in TAGS), text)) for text in traces) < 10
    assert value(part, sample, " ".join(f"<{tag}>x</{tag}>" for tag in TAGS)) == 1.0
