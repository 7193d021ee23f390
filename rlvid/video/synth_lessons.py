"""Lessons on synthetic clips: what a tiny model has to learn before it can judge itself.

Four kinds of row, on the training clips: describe the video, mend a wrong description, answer the question, and choose
between a right and a wrong answer, the last two with and without the description, in the judge's own words
(`rlvid/rewards/judging.py`). Answers are taught on few clips only: a model that describes and judges better than it
answers is what self-judgement can improve.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlvid.rewards.judging import describe_prompt, pair_prompts, with_context
from rlvid.types import Message, Sample, VideoRef
from rlvid.video.synth import wrong_answer

ANSWERED = 4  # the question is answered on one clip in so many
CHOICES_WITH_CONTEXT = 4  # judgements on each clip
CHOICES_WITHOUT = 1


def make_lessons(manifest: Path) -> Path:
    """Write the lessons of a synthetic manifest beside it, as a manifest; a function of the manifest alone."""
    path = manifest.with_name(f"{manifest.stem}_lessons.jsonl")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rng = np.random.default_rng(len(rows))
    lessons = [lesson for i, row in enumerate(rows) for lesson in _lessons_on(row, rows, i % ANSWERED == 0, rng)]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons))
    part.replace(path)
    return path


def _lessons_on(
    row: dict[str, Any], rows: list[dict[str, Any]], is_answered: bool, rng: np.random.Generator
) -> Iterator[dict[str, str]]:
    sample = Sample(row["id"], (row["video"],), (Message("user", (VideoRef(0), row["question"])),), row["answer"])
    other = rows[int(rng.integers(len(rows)))]["description"]
    for name, prompt in (("describe", describe_prompt(sample, "")), ("mend", describe_prompt(sample, other))):
        yield _lesson(row, name, prompt.question, row["description"])
    if is_answered:
        yield _lesson(row, "answer", row["question"], row["answer"])
        yield _lesson(row, "answer-told", with_context(sample, row["description"]).question, row["answer"])
    for i in range(CHOICES_WITH_CONTEXT + CHOICES_WITHOUT):
        right = int(rng.integers(2))
        answers = [row["answer"], wrong_answer(row, rng)]
        context = row["description"] if i < CHOICES_WITH_CONTEXT else None
        _, (prompt, _) = pair_prompts(sample, (answers[right], answers[1 - right]), context)
        yield _lesson(row, f"choose-{i}", prompt.question, f"It is {row['answer']}. <choice>{right + 1}</choice>")


def _lesson(row: Mapping[str, Any], name: str, question: str, answer: str) -> dict[str, str]:
    return {
        "id": f"{row['id']}#{name}",
        "video": row["video"],
        "question": question,
        "answer": answer,
        "problem_type": name.split("-")[0],
    }
