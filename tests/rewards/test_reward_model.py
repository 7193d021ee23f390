"""What a reward model that answers in text needs beside the engine: the place of a score among its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlvid.models.families import load_family
from rlvid.rewards.reward_model import ask, extended, token_at
from rlvid.rewards.videoscore import DIMS, Rubric
from rlvid.types import MediumRef
from tests.prompts import prompt_of

RUBRIC = Rubric("generation", DIMS, 1, 4, "integer")


def test_token_that_writes_a_score_is_found(tiny_model: Path) -> None:
    family = load_family(tiny_model)
    text = "\n".join(f"{name}: {i % 4 + 1}" for i, name in enumerate(DIMS))
    ids = family.encode_answer(text).tolist()
    for name, offset in RUBRIC.digit_offsets(text).items():
        at = token_at(family, ids, offset)
        assert family.decode(ids[at : at + 1]).strip() == text[offset], name
        assert family.decode(ids[:at]).strip() == text[:offset].strip()


def test_extended_prompt_continues_with_the_tokens_of_a_response(tiny_model: Path) -> None:
    prompt = prompt_of(load_family(tiny_model), (12, 56, 56))
    longer = extended(prompt, [5, 6])
    assert longer.token_ids[-2:].tolist() == [5, 6] and longer.length == prompt.length + 2
    assert (longer.positions[:, -2:] == prompt.next_position + np.arange(2)).all()


def test_model_is_asked_with_the_prompt_it_was_trained_on() -> None:
    sample = ask(RUBRIC, "s", ["/a.mp4"], 'a "cat"')
    assert sample.messages[-1].content == (MediumRef(0), RUBRIC.question("a 'cat'"))
