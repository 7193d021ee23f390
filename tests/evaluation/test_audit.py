from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from rlvid.evaluation.audit import duplicates, mark_of, near_copies, same_question, signature
from rlvid.types import Message, Sample


@pytest.mark.parametrize(
    ("shares", "mark"),
    [  # blank, one_frame, first_frame, shuffled, reversed, video
        ((0.75, 1.0, 1.0, 1.0, 1.0, 1.0), "blind"),
        ((0.5, 0.75, 1.0, 0.0, 0.0, 1.0), "still"),
        ((0.0, 1.0, 0.0, 1.0, 1.0, 1.0), "order_free"),
        ((0.0, 0.5, 0.0, 1.0, 0.0, 1.0), "needs_order"),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.5), "not_answered"),
    ],
)
def test_a_row_has_the_first_mark_of_the_ladder(shares: tuple[float, ...], mark: str) -> None:
    views = ("blank", "one_frame", "first_frame", "shuffled", "reversed", "video")
    assert mark_of(dict(zip(views, shares, strict=True)), 0.75) == mark
    assert mark_of({"video": 1.0}, 0.75) == "needs_order"  # no other view has a verdict


def test_what_is_said_to_most_questions_without_a_video_does_not_make_a_row_blind() -> None:
    shares = {"blank": 1.0, "video": 1.0}
    assert [mark_of(shares, 0.75, usual) for usual in (0.25, 0.5, 0.6)] == ["blind", "blind", "needs_order"]


def jpegs(seed: int, n: int = 6, quality: int = 90) -> list[bytes]:
    rng, files = np.random.default_rng(seed), []
    for pixels in rng.integers(0, 255, (n, 8, 8, 3)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((64, 64)).save(buffer, format="JPEG", quality=quality)
        files.append(buffer.getvalue())
    return files


def test_another_encoding_is_a_near_copy_and_another_clip_is_none() -> None:
    found = [signature(jpegs(seed, quality=quality)) for seed, quality in ((0, 90), (1, 90), (0, 60), (2, 90), (1, 70))]
    assert near_copies(found) == [0, 1, 0, 3, 1]
    assert near_copies([]) == [] and near_copies(found * 600)[-1] == 1  # in more than one block
    assert signature(jpegs(0, n=1)).shape == signature(jpegs(0, n=6)).shape


def test_questions_in_nearly_the_same_words() -> None:
    assert same_question("What colour is the moving shape?", "Say: what colour is the moving shape?")
    assert not same_question("What colour is it?", "Which shape is it?")


def test_a_duplicate_is_a_near_copy_of_which_the_same_is_asked() -> None:
    questions = {
        "a": "What colour is it?",
        "b": "What colour is it now?",
        "c": "How many are there?",
        "d": "What colour is it?",
    }
    samples = [Sample(name, (), (Message("user", (text,)),), "x") for name, text in questions.items()]
    clips = {"a": signature(jpegs(0)), "b": signature(jpegs(0)), "c": signature(jpegs(0)), "d": signature(jpegs(1))}
    assert duplicates(samples, clips) == {"b": "a"}
    del clips["a"]  # its clip cannot be read
    assert duplicates(samples, clips) == {}
