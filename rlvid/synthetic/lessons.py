"""Lessons on synthetic clips: what a tiny model is taught before it can judge itself.

Four kinds of row, on the training clips: describe the video, correct a wrong description, answer the question, and
choose between a right and a wrong answer. The last two come with and without the description, in the judge's own words
(`rlvid/rewards/judge_prompts.py`). Descriptions and choices are right. Answers are taught on few clips, and most of
those without a description are careless: the same for all clips, as a model answers that goes by its prior rather than
by what it sees. This is what self-judgement can correct.

A choice first says what is right, then compares each response with it. The second part is for models this small: with
it they compare two words after some hundred steps, without it not after a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.files import read_rows, write_rows
from rlvid.rewards.judge_prompts import describe_prompt, pair_prompts, with_context
from rlvid.synthetic.moving_shapes import possible_answers, wrong_answer
from rlvid.types import Medium, Message, Sample

ANSWERED = 4  # the question is answered on one clip in this many
CARELESS = 0.6  # share of these answers that are careless
CHOICES_WITH_CONTEXT = 3  # judgements on each clip
CHOICES_WITHOUT = 1


def make_lessons(manifest: Path) -> Path:
    """Write the lessons of a synthetic manifest beside it, as a manifest; a function of the manifest alone."""
    path = manifest.with_name(f"{manifest.stem}_lessons.jsonl")
    rows = read_rows(manifest)
    rng = np.random.default_rng(len(rows))
    lessons = [lesson for i, row in enumerate(rows) for lesson in _lessons_on(row, rows, i % ANSWERED == 0, rng)]
    write_rows(path, lessons)
    return path


def _lessons_on(
    row: dict[str, Any], rows: list[dict[str, Any]], is_answered: bool, rng: np.random.Generator
) -> Iterator[dict[str, str]]:
    media = (Medium(row["video"]),)
    sample = Sample(row["id"], media, (Message.about(media, row["question"]),), row["answer"])
    other = rows[int(rng.integers(len(rows)))]["description"]
    for name, prompt in (("describe", describe_prompt(sample, "")), ("correct", describe_prompt(sample, other))):
        yield _lesson(row, name, prompt.question, row["description"])
    if is_answered:
        answer = possible_answers(row["problem_type"], row["answer"])[0] if rng.random() < CARELESS else row["answer"]
        yield _lesson(row, "answer", row["question"], answer)
        yield _lesson(row, "answer-told", with_context(sample, row["description"]).question, row["answer"])
    for i in range(CHOICES_WITH_CONTEXT + CHOICES_WITHOUT):
        right = int(rng.integers(2))
        wrong = wrong_answer(row, rng)
        both = [(row["answer"], "right"), (wrong, "wrong")]
        (one, first), (two, second) = both[::-1] if right else both
        context = row["description"] if i < CHOICES_WITH_CONTEXT else None
        _, (prompt, _) = pair_prompts(sample, (one, two), context)
        choice = f"It is {row['answer']}. 1: {one}, {first}. 2: {two}, {second}. <choice>{right + 1}</choice>"
        yield _lesson(row, f"choose-{i}", prompt.question, choice)


def _lesson(row: Mapping[str, Any], name: str, question: str, answer: str) -> dict[str, str]:
    return {
        "id": f"{row['id']}#{name}",
        "video": row["video"],
        "question": question,
        "answer": answer,
        "problem_type": name.split("-")[0],
    }
