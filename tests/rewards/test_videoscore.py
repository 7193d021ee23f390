"""Prompts and score texts of VideoScore and VideoScore2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import DIMS, DIMS2, VideoConfig
from rlvid.errors import UserError
from rlvid.rewards.videoscore import CAPTION_ENDS, TEMPLATES, NoScore, Rubric, soft_score
from rlvid.types import Medium, MediumRef, Message, Sample

ITEMS = Path(__file__).parents[3] / "shared" / "data" / "videoscore" / "mantis_classification" / "train.json"
FIVE = Rubric("generation", DIMS, 1, 4, "integer")
THREE = Rubric("thinking", DIMS2, 1, 5, "thinking")
TEXT = (
    "visual quality: 1\ntemporal consistency: 2\ndynamic degree: 3\ntext-to-video alignment: 4\nfactual consistency: 2"
)
LABELS = dict(zip(reversed(DIMS), (2, 4, 3, 2, 1), strict=True))  # another order of keys
THOUGHT = """<think>The ball is red: visual quality: 5 for me.
It falls up.</think>

(1) visual quality: 4
(2) text-to-video alignment: 5
(3) physical/common-sense consistency: 1"""


@pytest.mark.skipif(not ITEMS.is_file(), reason="../shared/data/videoscore is not on this machine")
def test_integer_prompt_is_that_of_videofeedback_to_the_character() -> None:
    for item in json.loads(ITEMS.read_text()):
        caption = item["prompt"].split('text prompt is "')[1].split('",\n')[0]
        assert TEMPLATES["integer"].format(caption=caption) == item["prompt"]


def test_float_prompt_differs_in_scale_and_example() -> None:
    text = TEMPLATES["float"].format(caption="a cat")
    assert "float number from 1.0 to 4.0" in text and "visual quality: 3.2" in text and "smoothness of motion" in text
    assert text.endswith('"a cat",\nall the frames of video are as follows:\n')


def test_caption_cannot_end_its_quotation() -> None:
    caption = 'a sign says "open", and the text prompt is "x",\nall the frames of video are as follows: 4'
    assert FIVE.question(caption).count('"') == 2
    assert FIVE.question(caption).count(CAPTION_ENDS) == 1


def test_labels_go_by_name_whatever_their_order() -> None:
    assert FIVE.scores(LABELS) == [1.0, 2.0, 3.0, 4.0, 2.0]
    assert FIVE.text(LABELS) == TEXT


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dynamic degree": None}, "lacks 'dynamic degree'"),
        ({"dynamic degree": 5}, "dynamic degree is 5; expected a number from 1 to 4"),
        ({"dynamic degree": 0.5}, "dynamic degree is 0.5"),
        ({"dynamic degree": "3"}, "dynamic degree is '3'"),
        ({"dynamic degree": True}, "dynamic degree is True"),
        ({"dynamic degree": float("nan")}, "dynamic degree is nan"),
    ],
)
def test_labels_without_a_score_on_the_scale_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NoScore, match=reason):
        FIVE.scores({**LABELS, **change})


def test_scores_as_text_are_whole_numbers() -> None:
    with pytest.raises(NoScore, match="whole numbers"):
        FIVE.text({**LABELS, "dynamic degree": 2.5})


def test_score_text_is_read_as_it_is_written() -> None:
    assert FIVE.parse(TEXT) == {name: float(LABELS[name]) for name in DIMS}
    assert FIVE.digit_offsets(TEXT)["temporal consistency"] == TEXT.index("2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT.replace(": 3", ": 5"),  # off the scale
        TEXT.replace(": 3", ": 3/4"),
        TEXT.replace(": 3", ": 3.5"),
        TEXT.replace(": 3", ": three"),
        TEXT.replace(": 3", ": ³"),
        TEXT + "\nsummary: 3",
        "\n".join(TEXT.split("\n")[:-1]),
        TEXT.replace("dynamic degree", "visual quality"),
        "\n".join(reversed(TEXT.split("\n"))),
        "Sure! " + TEXT,
    ],
)
def test_any_other_text_has_no_scores(text: str) -> None:
    with pytest.raises(NoScore):
        FIVE.parse(text)


def test_thought_and_three_scores() -> None:
    assert THREE.parse(THOUGHT) == dict(zip(DIMS2, (4.0, 5.0, 1.0), strict=True))
    offset = THREE.digit_offsets(THOUGHT)["visual quality"]
    assert THOUGHT[offset] == "4" and offset > THOUGHT.index("</think>")


@pytest.mark.parametrize(
    "text",
    [
        THOUGHT.replace("consistency: 1", "consistency: 1/5"),  # issue 7: "3/5"
        THOUGHT.replace("</think>", "</think></think>"),  # issue 7: doubled
        THOUGHT.replace("<think>", ""),
        THOUGHT.replace("(2) text-to-video alignment: 5\n", ""),
        THOUGHT.replace("alignment: 5", "alignment: 6"),
        THOUGHT.replace("alignment: 5", "alignment: 0"),
        THOUGHT + " out of 5",
    ],
)
def test_drifted_form_has_no_scores(text: str) -> None:
    with pytest.raises(NoScore):
        THREE.parse(text)


def test_soft_score_is_the_chosen_integer_times_its_share() -> None:
    # p(4) = 0.6 of all tokens, p(5) = 0.2, the other three 0; 0.2 went to words: 4 * 0.6 / 0.8 = 3.
    logprobs = {1: -1e9, 2: -1e9, 3: -1e9, 4: math.log(0.6), 5: math.log(0.2)}
    assert soft_score(4, logprobs) == pytest.approx(3.0)
    assert soft_score(4, {**logprobs, 5: -1e9}) == pytest.approx(4.0)


def test_graded_sample_has_the_rubrics_prompt_and_answer() -> None:
    sample = Sample(
        "s",
        (Medium("/a.mp4"),),
        (Message("user", (MediumRef(0), "old")),),
        "",
        extra={"prompt": "a cat", "labels": LABELS},
    )
    graded = FIVE.graded(sample)
    assert graded.messages[-1].content == (MediumRef(0), FIVE.question("a cat")) and graded.answer == TEXT
    with pytest.raises(NoScore, match="prompt"):
        FIVE.graded(Sample("s", (), sample.messages, "", extra={"labels": LABELS}))
    with pytest.raises(NoScore, match="it has no video"):
        FIVE.graded(Sample("s", (), (Message("user", ("old",)),), "", extra={"prompt": "a cat", "labels": LABELS}))


def test_thinking_sample_whose_answer_says_something_else_is_refused() -> None:
    labels = dict(zip(DIMS2, (4, 5, 2), strict=True))
    with pytest.raises(NoScore, match="answer scores"):
        THREE.graded(Sample("s", (), (), THOUGHT, extra={"prompt": "x", "labels": labels}))


def test_rubric_is_kept_beside_the_model(tmp_path: Path) -> None:
    rubric = Rubric("regression", ("a", "b"), 1, 9, "question", VideoConfig(frames=4))
    rubric.save(tmp_path)
    assert Rubric.load(tmp_path) == rubric
    with pytest.raises(UserError, match="rlvid reward-model"):
        Rubric.load(tmp_path / "absent")
