"""Reward rules of Video-R1, R1-V and TinyLLaVA-Video-R1, as published.

Sources: tulerfeng/Video-R1 (src/r1-v/src/open_r1/grpo.py), Deep-Agent/R1-V (src/r1-v/src/open_r1/grpo.py),
ZhangXJ199/TinyLLaVA-Video-R1. Where a published rule gives 0 for a sample that it cannot score, ours has no value.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from functools import cache
from typing import Any

from rlvid.config import AnswerPart, TinyLlavaPart
from rlvid.rewards.answers import MAX_ANSWER_CHARS, answer_text
from rlvid.rewards.part import Group, NoReward, Values, answers, right_answer

FULL_REASONING = 1200  # characters, TinyLLaVA-Video-R1
_PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")


def verbatim(part: AnswerPart, group: Group) -> Values:
    right = right_answer(group)
    return [float(answer == right) for answer in answers(part, group)]


def plain_number(text: str) -> float | None:
    """A number as Python writes it, commas removed; None if the text is anything else."""
    text = text.replace(",", "").strip()
    if len(text) > 64 or not _PLAIN_NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _gold_number(group: Group) -> float:
    value = plain_number(right_answer(group))
    if value is None:
        raise NoReward(f"the sample's answer {group.sample.answer[:80]!r} is not a number")
    return value


def numerical(part: AnswerPart, group: Group) -> Values:
    """1 when `round(., 2)` of both is equal, and both or neither are written with a point or comma."""
    right, is_decimal = _gold_number(group), bool(re.search("[.,]", right_answer(group)))
    values = []
    for answer in answers(part, group):
        number = plain_number(answer)
        same_form = bool(re.search("[.,]", answer)) == is_decimal
        values.append(float(number is not None and same_form and round(number, 2) == round(right, 2)))
    return values


def regression(part: AnswerPart, group: Group) -> Values:
    """clip(1 - (|answer - gold| + 1e-9) / (|gold| + 1e-9), 0, 1); 1 where both are equal, which the formula misses by
    1e-9."""
    right, values = _gold_number(group), []
    for answer in answers(part, group):
        number = plain_number(answer)
        error = math.inf if number is None else (abs(number - right) + 1e-9) / (abs(right) + 1e-9)
        values.append(1.0 if number == right else min(max(1.0 - error, 0.0), 1.0))
    return values


def ocr(part: AnswerPart, group: Group) -> Values:
    """clip(1 - word error rate, 0, 1)."""
    import jiwer

    right = " ".join(right_answer(group).split())
    given = [" ".join(answer[:MAX_ANSWER_CHARS].split()) for answer in answers(part, group)]
    return [min(max(1.0 - float(jiwer.wer(right, answer)), 0.0), 1.0) for answer in given]


def free_form(part: AnswerPart, group: Group) -> Values:
    """The mean F-score of ROUGE-1, ROUGE-2 and ROUGE-L with Porter's stemmer."""
    right = right_answer(group)
    scored = [_rouge().score(right, answer[:MAX_ANSWER_CHARS]) for answer in answers(part, group)]
    return [min(max(sum(s.fmeasure for s in scores.values()) / len(scores), 0.0), 1.0) for scores in scored]


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def math_equal(part: AnswerPart, group: Group) -> Values:
    """1 when math-verify finds the answer equal to the sample's, or when they are the same text."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # math-verify's own time-outs use a signal, which only the main thread may set.
    limit_s = 5 if threading.current_thread() is threading.main_thread() else None
    right = right_answer(group)
    parsed = parse(right, parsing_timeout=limit_s)
    values = []
    for answer in answers(part, group):
        is_equal = answer == right
        if not is_equal and len(answer) <= 256:
            is_equal = verify(parsed, parse(answer, parsing_timeout=limit_s), timeout_seconds=limit_s)
        values.append(float(is_equal))
    return values


def tiny_llava(part: TinyLlavaPart, group: Group) -> Values:
    """accuracy + (2 accuracy - 1) format, and -2 where that is 0."""
    right, values = right_answer(group), []
    for response in group.responses:
        text, form, accuracy = group.opening + response.text, 0.0, 0.0
        match = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
        if match is not None and all(answer_text(text, (tag,)) is not None for tag in ("think", "answer")):
            form = 0.5 + 0.5 * min(len(match[1]) / FULL_REASONING, 1.0)
            accuracy = float(match[2].strip() == right)
        values.append(accuracy + (2 * accuracy - 1) * form or -2.0)
    return values
