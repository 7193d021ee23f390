"""Similarity by a real, small encoder with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlvid.config import SimilarityPart
from rlvid.rewards.part import Group, NoReward, Response
from rlvid.rewards.rules import make_parts
from tests.prompts import sample_of


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_same_text_has_similarity_1_in_any_company(tiny_encoder: Path, pooling: str) -> None:
    cfg = SimilarityPart.model_validate(
        {"kind": "similarity", "path": str(tiny_encoder), "pooling": pooling, "tags": ["answer"]}
    )
    (part,) = make_parts([cfg])
    sample = replace(sample_of(), answer="a red square")
    texts = ("<answer>a red square</answer>", "<answer>blue</answer>", "<answer>a blue square moves left left</answer>")
    same, other, long = part(Group(sample, tuple(Response(text, 1) for text in texts)))
    assert same == pytest.approx(1.0, abs=1e-5) and 0 <= other < 0.999 and 0 <= long < 0.999  # type: ignore[operator]
    (alone,) = part(Group(sample, (Response(texts[1], 1),)))  # padding beside longer texts changes nothing
    assert alone == pytest.approx(other, abs=1e-5)
    nothing = part(Group(replace(sample, answer=" "), (Response("x", 1),)))
    assert isinstance(nothing[0], NoReward)
