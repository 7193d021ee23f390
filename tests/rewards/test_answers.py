"""Answers are read as docs/rewards.md says: the tables there are the cases here."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlvid.config import ChoicePart, ExactPart, FormatPart, NumberPart, RewardPart
from rlvid.rewards.answers import answer_text, normalise, read_choice, read_number
from rlvid.rewards.part import Group, Response
from rlvid.rewards.rules import make_parts
from tests.prompts import sample_of

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
COLOURS = ("red", "blue", "dark green")
PARTS: dict[str, RewardPart] = {
    "choice": ChoicePart(kind="choice"),
    "exact": ExactPart(kind="exact"),
    "number": NumberPart(kind="number"),
    "format": FormatPart(kind="format", tags=("think", "answer")),
}


def table(kind: str) -> list[tuple[str, str, float]]:
    """(text before the response, response, reward) by row of the table of a kind."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## `{kind}`\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if re.fullmatch(r"\|.* [01] \|", line)]
    return [(row[0].strip("`"), row[-2][1:-1], float(row[-1])) for row in rows]


def value(kind: str, first: str, response: str) -> float:
    if kind == "choice":
        sample, opening = replace(sample_of(), choices=COLOURS, answer="blue"), ""
    elif kind == "format":
        sample, opening = sample_of(), first
    else:
        sample, opening = replace(sample_of(), answer=first), ""
    (part,) = make_parts([PARTS[kind]])
    (scored,) = part(Group(sample, (Response(response, 1),), opening))
    assert isinstance(scored, float)
    return scored


@pytest.mark.parametrize("kind", PARTS)
def test_every_row_of_the_documented_table_holds(kind: str) -> None:
    rows = table(kind)
    wrong = [(first, response, reward) for first, response, reward in rows if value(kind, first, response) != reward]
    assert len(rows) > 10 and {reward for *_, reward in rows} == {0.0, 1.0} and not wrong


def test_no_form_of_another_choice_is_right() -> None:
    """Each accepted form, rewritten to name the wrong choice, is worth 0."""
    for _, response, reward in table("choice"):
        other = re.sub(r"(?<![A-Za-z\\])[Bb](?![A-Za-z])", "A", response).translate({ord("Ｂ"): "Ａ"})
        other = other.replace("blue", "red").replace("BLUE", "RED").replace("Blue", "Red")
        if reward and other != response:
            assert value("choice", "", other) == 0.0, other


@pytest.mark.parametrize("text", [" B ", "B.\nblue", "\n**B**\n", "The answer is\nB"])
def test_spaces_and_lines_around_a_choice_do_not_matter(text: str) -> None:
    assert read_choice(text, COLOURS) == "blue"


@pytest.mark.parametrize(
    "text", ["", " ", ".", "()", "(B", "bluee", "\u0392", "\u212a", "B" * 10_000, "``", "$$", "E.g. x"]
)
def test_odd_texts_name_no_choice(text: str) -> None:
    assert read_choice(text, (*COLOURS, "x", "y")) is None


def test_the_article_is_not_the_letter_a() -> None:
    assert read_choice("A dog runs", ("cat", "bird")) is None
    assert read_choice("A dog", ("cat", "a dog", "dog")) == "a dog"
    assert read_choice("A. cat", ("cat", "a dog", "dog")) == "cat"
    assert read_choice("A dog", ("dog", "a dog")) is None  # the first with its letter, or the second


def test_a_letter_that_is_another_choices_text_needs_both() -> None:
    swapped = ("B", "A")
    assert read_choice("B", swapped) is None
    assert read_choice("B. A", swapped) == "A"


def test_a_choice_inside_the_named_one_is_not_another_choice() -> None:
    assert (
        read_choice("C. dark green, since it is so dark", ("green", "dark", "dark green")) is None
    )  # names "dark" too
    assert read_choice("C. dark green, as leaves are", ("green", "dark", "dark green")) == "dark green"


def test_choices_with_markup_are_compared_as_they_are() -> None:
    assert read_choice("a*b*c", ("abd", "a*b*c")) == "a*b*c"
    assert read_choice("a*b*c", ("abc", "a*b*c")) is None  # as Markdown it is the first
    assert read_choice("$5", ("$5", "$6")) == "$5"
    assert read_choice("ab", ("a*b", "cd")) is None


def test_normalising_does_not_make_different_answers_equal() -> None:
    assert normalise("5\u00b2") != normalise("52")
    assert normalise("-5") != normalise("5") != normalise(".5")
    assert normalise("Caf\u00e9") == normalise("cafe\u0301") == "caf\u00e9"
    assert normalise("  Dark \n green ") == "dark green"
    assert normalise("?") == "?"  # nothing but marks is kept, so that it does not equal an empty answer
    assert normalise("10") == "10" and normalise("10.0") == "10" and normalise("10.0.0") == "10.0.0"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3.0), ("-3", -3.0), ("+3", 3.0), ("\u22123", -3.0), ("3.", 3.0), ("3.50", 3.5), (".5", 0.5),
        ("-.5", -0.5), ("1,234", 1234.0), ("1,234,567.5", 1234567.5), ("12%", 0.12), ("12.5 %", 0.125), ("12%.", 0.12),
        ("1e3", 1000.0), ("2.5E-1", 0.25), (" 7\n", 7.0), ("007", 7.0), ("3/4", 0.75),
    ],
)  # fmt: skip
def test_numbers(text: str, number: float) -> None:
    assert read_number(text) == (pytest.approx(number, rel=1e-12), "")


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", "-", "+-3", "three", "3 4", "3/0", "1/2/3", "1,23,456", "12,34", ",123", "1e", "e3", "3 red cars",
        "1e9999", "1e999", "inf", "nan", "0x10", "1_000", "3..", "%", "3%%", "\u0663", "\u00b2", "\u00bd", "3\u4e94",
        "9" * 1_000, "9" * 1_000_000, "__import__('os')", "2**9999999", "2^3", "3!",
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_texts_that_are_no_numbers(text: str) -> None:
    assert read_number(text) is None


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


def test_tags_count_whether_the_template_or_the_model_wrote_them() -> None:
    assert answer_text("B</answer>", ("answer",), opening="<answer>") == "B"
    assert answer_text("<answer>B</answer>", ("answer",), opening="<answer>") is None
    assert answer_text("B", (), opening="<think>\n\n</think>\n\n") == "B"  # without tags the response alone


HUGE = [
    "<answer>" * 200_000,
    "(" * 1_000_000,
    "A " * 500_000,
    "the answer is " * 100_000,
    " " * 1_000_000 + "B",
    "a" + "\u0301" * 200_000 + "\u0323" * 200_000,
    "\\boxed{" * 200_000,
    "\\(" * 200_000,
    "$" * 200_001,
    "*" * 200_001,
    "_" * 200_001,
    "\\frac{1}{" * 200_000,
    "所以" * 200_000,
    "1," * 200_000,
    "1/" * 200_000,
    "1" * 4000 + "x",
]


@pytest.mark.parametrize("text", HUGE, ids=lambda text: text[:14].strip())
def test_huge_responses_take_no_time(text: str) -> None:
    start = time.perf_counter()
    for kind, part in PARTS.items():
        sample = replace(sample_of(), choices=COLOURS, answer="3" if kind == "number" else "blue")
        for cfg in (part, part.model_copy(update={"tags": ("answer",)})):
            (made,) = make_parts([cfg])
            made(Group(sample, (Response(text, 1),)))
    for crafted in (text[:4000], " ".join(text[:2000])):  # the longest that the expressions see
        read_choice(crafted, COLOURS)
        read_number(crafted)
    assert time.perf_counter() - start < 5.0  # a backtracking expression takes hours
