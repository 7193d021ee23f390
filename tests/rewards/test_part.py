"""How values of parts become rewards, and what is checked before a run. A rule from outside the package joins in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from rlvid.config import (
    AnswerPart,
    ChoicePart,
    ExactPart,
    FormatPart,
    GrpoJobConfig,
    LengthPart,
    NumberPart,
    RewardPart,
    RewardPartConfig,
)
from rlvid.config.load import load_config
from rlvid.errors import UserError
from rlvid.rewards.part import (
    Group,
    Kind,
    NoReward,
    Part,
    Response,
    Values,
    answers,
    check_samples,
    combine,
    score_rules,
)
from rlvid.rewards.rules import KINDS, make_parts
from rlvid.types import Reward, Sample
from tests.prompts import sample_of

COLOURS = ("red", "blue", "dark green")
TAGGED = ("think", "answer")
# A set with three types of questions. Only one part that measures accuracy fits each row.
CHOICE = replace(sample_of(sample_id="c"), choices=COLOURS, answer="blue", problem_type="multiple choice")
NUMBER = replace(sample_of(sample_id="n"), answer="3", problem_type="counting")
FREE = replace(sample_of(sample_id="f"), answer="a ball", problem_type="free")
MIXED = [
    LengthPart(kind="length", max_tokens=9, weight=0.5),
    ChoicePart(kind="choice", problem_types=("multiple choice",)),
    NumberPart(kind="number", problem_types=("counting", "distance")),
]


def score(parts: Sequence[RewardPart], sample: Sample, *texts: str, n_tokens: int = 1) -> list[Reward]:
    made = make_parts(parts)
    group = Group(sample, tuple(Response(text, n_tokens) for text in texts))
    return combine(made, group, score_rules(made, group))


def test_parts_are_named_and_the_total_is_their_weighted_sum() -> None:
    parts = [
        ChoicePart(kind="choice", tags=TAGGED),
        FormatPart(kind="format", tags=TAGGED, weight=0.5),
        LengthPart(kind="length", max_tokens=10, weight=-0.25, name="short"),
        ExactPart(kind="exact", tags=("answer",), weight=2.0),
    ]
    sample = replace(sample_of(), choices=COLOURS, answer="red")
    right, wrong = score(parts, sample, "<think>hm</think><answer>(A)</answer>", "<think>hm</think>B", n_tokens=8)
    assert right.is_valid and right.is_right is True
    assert right.parts == {"choice": 1.0, "format": 1.0, "short": 1.0, "exact": 0.0}
    assert right.total == 1.0 + 0.5 - 0.25 + 0.0
    assert wrong.is_right is False and wrong.total == -0.25


@pytest.mark.parametrize(
    ("part", "sample", "reason"),
    [
        (ChoicePart(kind="choice"), FREE, "choice: the sample has no choices"),
        (ChoicePart(kind="choice"), replace(CHOICE, answer="pink"), "'pink' does not name one of its choices"),
        (ChoicePart(kind="choice"), replace(CHOICE, choices=("B", "A"), answer="B"), "'B' does not name one of its"),
        (NumberPart(kind="number"), replace(FREE, answer="three"), "the sample's answer 'three' is not a number"),
        (ExactPart(kind="exact"), replace(FREE, answer=" "), "exact: the sample has no answer"),
    ],
)
def test_a_sample_that_cannot_be_scored_is_invalid_and_not_zero(part: RewardPart, sample: Sample, reason: str) -> None:
    rewards = score([LengthPart(kind="length"), part], sample, "red", "no answer")  # whatever the response
    for reward in rewards:
        assert reason in str(reward.invalid_reason) and reward.is_right is None
        assert not reward.parts and math.isnan(reward.total)


def test_length_is_inside_the_window_with_its_bounds() -> None:
    window = [LengthPart(kind="length", min_tokens=3, max_tokens=5)]
    assert [score(window, FREE, "x", n_tokens=n)[0].total for n in (2, 3, 5, 6)] == [0.0, 1.0, 1.0, 0.0]
    assert score([LengthPart(kind="length", min_tokens=3)], FREE, "x", n_tokens=10**9)[0].total == 1.0


def test_a_number_counts_within_the_tolerance() -> None:
    near = [NumberPart(kind="number", tolerance=0.25)]
    assert [r.total for r in score(near, NUMBER, "3.25", "3.26", "three")] == [1.0, 0.0, 0.0]  # the bound counts


# --- problem types ----------------------------------------------------------------------------------------------------


def test_one_config_scores_a_set_of_choices_and_numbers() -> None:
    """Fault 15: no configuration of rules fitted both, and the run stopped at step 1."""
    check_samples(make_parts(MIXED), [CHOICE, NUMBER], "data.train", needs_accuracy=True)
    (right, wrong), (three,) = score(MIXED, CHOICE, "B", "A"), score(MIXED, NUMBER, "3")
    assert right.parts == {"length": 1.0, "choice": 1.0} and right.total == 1.5 and right.is_right is True
    assert wrong.total == 0.5 and wrong.is_right is False
    assert three.parts == {"length": 1.0, "number": 1.0} and three.is_right is True


def test_accuracy_is_none_where_no_part_that_measures_it_covers_the_sample() -> None:
    (reward,) = score(MIXED, FREE, "x")
    assert reward.is_valid and reward.parts == {"length": 1.0} and reward.is_right is None


def test_a_sample_that_no_part_covers_is_an_error_before_the_run() -> None:
    with pytest.raises(UserError, match="data.train: sample 'f': no reward part covers problem_type 'free': add"):
        check_samples(make_parts(MIXED[1:]), [CHOICE, NUMBER, FREE], "data.train")
    (reward,) = score(MIXED[1:], FREE, "x")
    assert reward.invalid_reason == "no reward part covers problem_type 'free'"


def test_evaluation_needs_a_part_that_measures_accuracy_for_every_sample() -> None:
    check_samples(make_parts(MIXED), [CHOICE, FREE], "data.train")
    with pytest.raises(UserError, match=r"data.eval: sample 'f' \(problem_type 'free'\): evaluation needs"):
        check_samples(make_parts(MIXED), [CHOICE, FREE], "data.eval", needs_accuracy=True)


def test_a_part_that_cannot_score_what_it_covers_is_an_error_before_the_run() -> None:
    parts = make_parts([NumberPart(kind="number")])
    with pytest.raises(UserError, match=r"sample 'f' \(problem_type 'free'\): reward part number: the sample's answer"):
        check_samples(parts, [NUMBER, FREE], "data.train")


# --- a rule from outside the package ----------------------------------------------------------------------------------


class StartPart(AnswerPart):
    """What share of the first letters is right."""

    kind: Literal["start"]
    """start."""
    letters: int = 3
    """Letters that are compared."""


def start(part: StartPart, group: Group) -> Values:
    gold = group.sample.answer[: part.letters]
    return [
        2.0 * sum(a == b for a, b in zip(answer, gold, strict=False)) / part.letters
        if answer
        else NoReward("it is empty")
        for answer in answers(part, group)
    ]


class OutsideJobConfig(GrpoJobConfig):
    """A job that knows the outside kind too."""

    rewards: tuple[Annotated[RewardPartConfig | StartPart, Field(discriminator="kind")], ...] = ()  # type: ignore[assignment]
    """Parts of the reward."""


def test_a_rule_from_outside_is_a_function_and_a_line_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "start", Kind(start, range=(0.0, 2.0), measures_accuracy=True))
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {tiny: {}}\ndata: {synthetic: {}}\nrewards:\n- {kind: start, letters: 4, weight: 0.5}\n"
        "- {kind: length}\n"
    )
    cfg = load_config(OutsideJobConfig, file, [])
    whole, half, empty = score(cfg.rewards, replace(FREE, answer="ball"), "balloon", "bank", "")
    assert whole.parts == {"start": 2.0, "length": 1.0} and whole.total == 2.0 and whole.is_right is True
    assert half.parts["start"] == 1.0 and half.is_right is False  # 1.0 is not the top of this part's range
    assert empty.invalid_reason == "start: it is empty"
    check_samples(make_parts(cfg.rewards[1:]), [FREE], "data.train")
    with pytest.raises(UserError, match="unknown key rewards.0.leters; did you mean rewards.0.letters"):
        load_config(OutsideJobConfig, file, ["rewards.0.leters=2"])


@pytest.mark.parametrize("value", [1.5, -0.1, math.nan, math.inf])
def test_a_value_outside_the_declared_range_is_invalid(value: float) -> None:
    part = Part(LengthPart(kind="length"), Kind(lambda cfg, group: [value]))
    group = Group(FREE, (Response("x", 1),))
    (reward,) = combine([part], group, score_rules([part], group))
    assert "is outside the range from 0 to 1" in str(reward.invalid_reason)
