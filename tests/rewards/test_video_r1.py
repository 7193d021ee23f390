"""The published rules on cases worked out by hand, and on the logs of R1-V."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlvid.config import (
    FormatPart,
    FreeFormPart,
    LengthPart,
    MathPart,
    NumberPart,
    NumericalPart,
    OcrPart,
    RegressionPart,
    TinyLlavaPart,
    VerbatimPart,
)
from rlvid.rewards.part import Group, Response, combine, score_rules
from rlvid.rewards.rules import make_parts
from tests.prompts import sample_of

R1V = Path(__file__).parents[3] / "shared" / "data" / "r1v"


def values(part: Any, gold: str, *responses: str, opening: str = "") -> list[Any]:
    (made,) = make_parts([part])
    sample = replace(sample_of(), answer=gold)
    return list(made(Group(sample, tuple(Response(r, len(r)) for r in responses), opening)))


def test_multiple_choice_is_the_same_text() -> None:
    part = VerbatimPart(kind="verbatim", tags=("answer",))
    assert values(part, "B", "<answer> B </answer>", "<answer>b</answer>", "B") == [1, 0, 0]


def test_numerical_compares_two_decimals_of_numbers_in_one_form() -> None:
    part = NumericalPart(kind="numerical")
    assert values(part, "3.14", "3.141", "3.15", "3", "3,14") == [1, 0, 0, 0]  # 3,14 is 314
    assert values(part, "1,200", "1200", "1,200", "1200.0") == [0, 1, 1]
    assert values(part, "5", "5", "5.0", "five", "inf") == [1, 0, 0, 0]
    assert "not a number" in str(values(part, "many", "5")[0])


def test_regression_is_one_minus_the_relative_error() -> None:
    part = RegressionPart(kind="regression")
    assert values(part, "10", "10", "9", "25", "x") == pytest.approx([1, 0.9, 0, 0], abs=1e-6)


def test_ocr_is_one_minus_the_word_error_rate() -> None:
    part = OcrPart(kind="ocr")
    # 1 of 4 words differs; 2 are missing; more errors than words
    assert values(part, "no entry after six", "no entry after ten", "no entry", "", "a b c d e f") == [0.75, 0.5, 0, 0]


def test_free_form_is_the_mean_of_three_rouge_scores() -> None:
    part = FreeFormPart(kind="free_form")
    same, other, half = values(part, "the dog runs", "The dog running", "a cat", "the dog sleeps")
    assert same == 1.0  # case and endings do not count
    assert other == 0.0
    # ROUGE-1: 2 of 3; ROUGE-2: 1 of 2; ROUGE-L: 2 of 3
    assert half == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_math_is_equal_as_mathematics_or_as_text() -> None:
    part = MathPart(kind="math", tags=("answer",))
    given = ["<answer>0.5</answer>", r"<answer>$\frac{2}{4}$</answer>", "<answer>0.6</answer>", "0.5"]
    assert values(part, "$\\frac{1}{2}$", *given) == [1, 1, 0, 0]
    assert values(part, "a red car", "<answer>a red car</answer>") == [1]


def test_tiny_llava_weighs_accuracy_by_the_form_of_the_response() -> None:
    part = TinyLlavaPart(kind="tiny_llava")
    think = "x" * 600  # half of 1,200 characters: a format score of 0.75
    right, wrong = f"<think>{think}</think><answer>B</answer>", f"<think>{think}</think> <answer>A</answer>"
    assert values(part, "B", right, wrong, "B") == [1.75, -0.75, -2]
    assert values(part, "B", right.removeprefix("<think>"), opening="<think>") == [1.75]


def test_the_published_format_rule_passes_what_the_strict_one_does_not() -> None:
    odd = "<think>a</think><answer>b</answer><answer>c</answer>"
    loose = FormatPart(kind="format", tags=("think", "answer"), is_strict=False)
    assert values(loose, "b", odd, "<think></think>\n<answer></answer>", "<answer>b</answer>") == [1, 1, 0]
    assert values(FormatPart(kind="format", tags=("think", "answer")), "b", odd) == [0]


@pytest.mark.parametrize(
    ("texts", "bonus"),
    [
        (("square", "square", "no"), [0.2, 0.2, 0]),
        (("square", "no", "no"), [0, 0, 0]),  # a single right answer gets none
    ],
)
def test_length_counts_for_right_answers_where_the_group_has_several(
    texts: tuple[str, ...], bonus: list[float]
) -> None:
    parts = make_parts(
        [
            VerbatimPart(kind="verbatim"),
            LengthPart(kind="length", min_tokens=1, max_tokens=9, weight=0.2, right_only=True),
        ]
    )
    group = Group(sample_of(), tuple(Response(text, 5) for text in texts))
    rewards = combine(parts, group, score_rules(parts, group))
    assert [r.total - r.parts["verbatim"] for r in rewards] == pytest.approx(bonus)


@pytest.mark.skipif(not R1V.is_dir(), reason="the logs of R1-V are not here")
@pytest.mark.parametrize(("log", "accuracy"), [("_grpo100", 82.5), ("", 48.0)])
def test_accuracies_of_r1v_follow_from_the_rows_of_its_logs(log: str, accuracy: float) -> None:
    file = R1V / f"r1v_counting_results_superclevr_200_qwen2vl_2b_instruct{log}_legacy.json.gz"
    stored = json.loads(gzip.decompress(file.read_bytes()))
    part = NumberPart(kind="number", tags=("answer",))
    right = [values(part, str(row["ground_truth"]), row["model_output"])[0] for row in stored["results"]]
    assert 100 * sum(right) / len(right) == stored["accuracy"] == accuracy
