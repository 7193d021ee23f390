import math
import time
from collections.abc import Callable

import pytest

from rlvid.config import RewardPartConfig
from rlvid.errors import UserError
from rlvid.rewards.rules import (
    NoReward,
    RuleRewards,
    answer_text,
    choice,
    exact,
    length,
    normalise,
    number,
    read_choice,
    read_number,
    tag_format,
)
from rlvid.types import Message, Sample

COLOURS = ("red", "blue", "dark green")
KELVIN, FULL_WIDTH_B, ARABIC_3 = "\u212a", "\uff22", "\u0663"


def sample(answer: str, choices: tuple[str, ...] | None = None) -> Sample:
    return Sample(id="1", media=(), messages=(Message("user", ("?",)),), answer=answer, choices=choices)


@pytest.mark.parametrize(
    "text", ["Red", " red\n", "RED.", '"red"', "**red**", "'Red'!", "`red`", "red ."], ids=lambda text: repr(text)
)
def test_exact_ignores_case_space_quotes_and_the_full_stop(text: str) -> None:
    assert exact(text, sample("red")) == 1.0


@pytest.mark.parametrize("text", ["", " ", "redd", "dark red", "re d", "r.e.d", "-red", "red or blue"])
def test_exact_is_zero_for_anything_else(text: str) -> None:
    assert exact(text, sample("red")) == 0.0


def test_normalising_does_not_make_different_answers_equal() -> None:
    assert normalise("5\u00b2") != normalise("52")
    assert normalise("-5") != normalise("5") != normalise(".5")
    assert normalise("Caf\u00e9") == normalise("cafe\u0301") == "caf\u00e9"
    assert normalise("  Dark \n green ") == "dark green"
    assert normalise("?") == "?"  # nothing but marks is kept, so that it does not equal an empty answer
    assert exact("", sample("?")) == 0.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>B</answer>", "B"),
        ("<think>x</think><answer> B\n</answer> bye", " B\n"),
        ("<answer></answer>", ""),
        ("B", None),
        ("<answer>B", None),
        ("B</answer>", None),
        ("</answer>B<answer>", None),
        ("<answer>A</answer><answer>B</answer>", None),
        ("<answer><answer>B</answer></answer>", None),
        ("<answer>A<answer>B</answer>", None),
        ("<ANSWER>B</ANSWER>", None),
        ("<answer >B</answer>", None),
        ("", None),
    ],
)
def test_the_answer_is_the_one_pair_of_the_last_tag(text: str, answer: str | None) -> None:
    assert answer_text(text, ("think", "answer")) == answer


def test_without_tags_the_answer_is_the_whole_response() -> None:
    assert answer_text("<answer>B</answer>", ()) == "<answer>B</answer>"


def test_no_answer_is_a_legitimate_zero() -> None:
    tags = ("answer",)
    assert exact("red", sample("red"), tags) == 0.0
    assert choice("A", sample("red", COLOURS), tags) == 0.0
    assert number("3", sample("3"), tags) == 0.0
    assert exact("<answer>red</answer>", sample("red"), tags) == 1.0
    assert choice("<answer>A</answer>", sample("red", COLOURS), tags) == 1.0
    assert number("<answer>3</answer>", sample("3"), tags) == 1.0


BLUE = [
    "B", "b", "(B)", "(b)", "B.", "b)", "B:", "(B).", " B ", "**B**", '"B"', "B. blue", "B) Blue.", "B blue",
    "(B) blue", "b. BLUE", "B.\nblue", "blue", "Blue.", "BLUE", "'blue'", "Answer: B", "The answer is B.",
    "the correct answer is (B)", "Option B", "The answer is: B. blue", "B. It turns left.", "B. The answer is B.",
    "B) because a dog's tail is", "(B) I think so",
]  # fmt: skip
NOT_BLUE = [
    "", " ", "A", "C", "D", "E.", "red", "A. red", "A. blue", "B. red", "B red", "A or B", "A. B.", "(A)(B)", "A, B",
    "B. or C.", "B. or c", "(b) or (c)", "B) no, (a)", "AB", "BB", "B lue", "B it is", "bluee", "red blue", "blue, red",
    "I see blue", "BC.", "(B", "()", ".", "\u0392", FULL_WIDTH_B, KELVIN, "B" * 10_000, "<answer>B</answer>",
]  # fmt: skip


@pytest.mark.parametrize("text", BLUE)
def test_a_choice_is_named_by_letter_or_text(text: str) -> None:
    for key in ("blue", "B", "b"):
        assert choice(text, sample(key, COLOURS)) == 1.0


@pytest.mark.parametrize("text", NOT_BLUE)
def test_another_choice_two_choices_or_none_are_wrong(text: str) -> None:
    assert choice(text, sample("blue", COLOURS)) == 0.0


def test_the_article_is_not_the_letter_a() -> None:
    assert read_choice("A dog runs", ("cat", "bird")) is None
    assert read_choice("A dog", ("cat", "a dog", "dog")) == "a dog"
    assert read_choice("A. cat", ("cat", "a dog", "dog")) == "cat"
    assert read_choice("A dog", ("dog", "a dog")) is None  # the first with its letter, or the second


def test_a_letter_that_is_another_choices_text_needs_both() -> None:
    swapped = ("B", "A")
    assert read_choice("B", swapped) is None
    assert read_choice("B. A", swapped) == "A"


def test_choices_of_equal_text_are_equally_right() -> None:
    twice = sample("red", ("red", "blue", "Red"))
    assert choice("A", twice) == choice("C", twice) == choice("red", twice) == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3.0), ("-3", -3.0), ("+3", 3.0), ("\u22123", -3.0), ("3.", 3.0), ("3.50", 3.5), (".5", 0.5),
        ("-.5", -0.5), ("1,234", 1234.0), ("1,234,567.5", 1234567.5), ("12%", 0.12), ("12.5 %", 0.125), ("12%.", 0.12),
        ("1e3", 1000.0), ("2.5E-1", 0.25), (" 7\n", 7.0), ("007", 7.0),
    ],
)  # fmt: skip
def test_numbers(text: str, value: float) -> None:
    assert read_number(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "-", "+-3", "three", "3 cars", "3 4", "3/4", "1,5", "1,23,456", "12,34", ",123", "1e", "e3",
        "1e9999", "1e999", "inf", "nan", "0x10", "1_000", "3..", "%", "3%%", "$3", ARABIC_3, "\u00b2", "9" * 1_000,
        "9" * 1_000_000, "__import__('os')", "2**9999999",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_texts_that_are_no_numbers(text: str) -> None:
    assert read_number(text) is None


def test_a_number_counts_within_the_tolerance() -> None:
    assert number("0.5", sample("50%")) == 1.0
    assert number("50", sample("50%")) == 0.0
    assert number("1,000", sample("1000")) == 1.0
    assert number("3.1", sample("3")) == 0.0
    assert number("3.25", sample("3"), tolerance=0.25) == 1.0  # the bound counts
    assert number("three", sample("3"), tolerance=9.0) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>b</answer>",
        "\n<think>a\nb</think> \n <answer>c</answer>\n",
        "<think><b></think><answer>1<2</answer>",
    ],
)
def test_format_is_the_tags_in_order(text: str) -> None:
    assert tag_format(text, ("think", "answer")) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "b",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "so <think>a</think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b</answer> so",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a <answer>b</answer></think><answer>b</answer>",
        "<think>a<answer>b</think></answer>",
        "<think>a <answer>b</answer></think>",
        "<think></think><answer>b</answer>",
        "<think>a</think><answer> </answer>",
        "<think>a<answer>b</answer>",
    ],
)
def test_format_is_zero_for_missing_repeated_nested_or_empty_tags(text: str) -> None:
    assert tag_format(text, ("think", "answer")) == 0.0


def test_length_is_inside_the_window_with_its_bounds() -> None:
    assert [length(n, min_tokens=3, max_tokens=5) for n in (2, 3, 5, 6)] == [0.0, 1.0, 1.0, 0.0]
    assert [length(n, min_tokens=3) for n in (2, 10**9)] == [0.0, 1.0]


HUGE = [
    "<answer>" * 200_000,
    "(" * 1_000_000,
    "A " * 500_000,
    "the answer is " * 100_000,
    " " * 1_000_000 + "B",
    "a" + "\u0301" * 200_000 + "\u0323" * 200_000,
]


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:14].strip())
def test_huge_responses_take_no_time(text: str) -> None:
    start = time.perf_counter()
    for tags in ((), ("answer",)):
        exact(text, sample("red"), tags)
        choice(text, sample("red", COLOURS), tags)
        number(text, sample("3"), tags)
    tag_format(text, ("think", "answer"))
    for crafted in (text[:4000], " ".join(text[:2000])):  # the longest that the expressions see
        read_choice(crafted, COLOURS)
        read_number(crafted)
    assert time.perf_counter() - start < 5.0  # a backtracking expression takes hours


def test_parts_are_named_and_the_total_is_their_weighted_sum() -> None:
    rewards = RuleRewards(
        [
            RewardPartConfig(kind="choice", tags=("think", "answer")),
            RewardPartConfig(kind="format", tags=("think", "answer"), weight=0.5),
            RewardPartConfig(kind="length", max_tokens=10, weight=-0.25, name="short"),
            RewardPartConfig(kind="exact", tags=("answer",), weight=2.0),
        ]
    )
    reward = rewards("<think>hm</think><answer>(A)</answer>", 8, sample("red", COLOURS))
    assert reward.is_valid
    assert reward.parts == {"choice": 1.0, "format": 1.0, "short": 1.0, "exact": 0.0}
    assert reward.total == 1.0 + 0.5 - 0.25 + 0.0


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("choice", sample("red"), "choice: the sample has no choices"),
        ("choice", sample("pink", COLOURS), "choice: the sample's answer 'pink' does not name one of its choices"),
        ("choice", sample("B", ("B", "A")), "choice: the sample's answer 'B' does not name one of its choices"),
        ("number", sample("three"), "number: the sample's answer 'three' is not a number"),
        ("exact", sample(""), "exact: the sample has no answer"),
    ],
)
def test_a_sample_that_cannot_be_marked_is_invalid_and_not_zero(kind: str, row: Sample, reason: str) -> None:
    parts = [RewardPartConfig(kind="length"), RewardPartConfig.model_validate({"kind": kind, "tags": ["answer"]})]
    for response in (
        "<answer>red</answer>",
        "no answer",
    ):  # invalid whatever the response, or the group's mean is skewed
        reward = RuleRewards(parts)(response, 1, row)
        assert reward.invalid_reason == reason
        assert not reward.parts and math.isnan(reward.total)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "rewards is empty"),
        ([RewardPartConfig(kind="exact"), RewardPartConfig(kind="exact")], r"rewards\[1\]: .* named 'exact' too"),
        ([RewardPartConfig(kind="exact"), RewardPartConfig(kind="length", name="exact")], "named 'exact' too"),
        ([RewardPartConfig(kind="format")], r"rewards\[0\] \(format\): format needs tags"),
        ([RewardPartConfig(kind="format", tags=("<answer>",))], "tags are names without brackets"),
        ([RewardPartConfig(kind="format", tags=("answer", "answer"))], "names one twice"),
        ([RewardPartConfig(kind="length", min_tokens=5, max_tokens=4)], "min_tokens=5 is more than max_tokens=4"),
        ([RewardPartConfig(kind="exact", weight=float("nan"))], "weight must be a finite number"),
    ],
)
def test_parts_that_could_never_be_given_are_refused(parts: list[RewardPartConfig], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RuleRewards(parts)


def test_pure_rules_raise_the_reason() -> None:
    rule: Callable[[str, Sample], float] = choice
    with pytest.raises(NoReward, match="no choices"):
        rule("A", sample("red"))
