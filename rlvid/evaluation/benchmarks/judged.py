"""Answers to open questions, rated by a judge: Video-ChatGPT's "official" protocol and LLaVA-Hound's own.

Both are published with a judge that is not theirs: another version of it moved accuracy by more than ten points, so
judge and template are recorded. A rating that cannot be read is counted, and never becomes a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlvid.evaluation.metrics import mean
from rlvid.evaluation.predictions import Confusion, Prediction
from rlvid.rewards.judge_prompts import Template, about_video, question_of
from rlvid.types import Sample

WORDS = 256  # of a prediction that LLaVA-Hound's judge sees
RIGHT_FROM = 3  # its score that counts as right

_DATA = (
    "<question> {question} </question>\n<right_answer> {answer} </right_answer>\n"
    "<prediction> {prediction} </prediction>\n"
)
OFFICIAL = Template(
    _DATA + "Does the prediction mean the same as the right answer to this question about a video? Synonyms and "
    "paraphrases count. Answer with one line of the form {{'pred': 'yes', 'score': 4}}: yes or no, and how well they "
    "match, a whole number from 0 to 5."
)
HOUND = Template(
    "<caption> {caption} </caption>\n" + _DATA + "Rate the prediction by its relevance, accuracy, clarity and "
    "completeness, given the caption of the video and the right answer. Answer in two lines: Explanation: ..., then "
    "Score: and a whole number from 1 to 5."
)
_OFFICIAL = re.compile(
    r"\{\s*['\"]pred['\"]\s*:\s*['\"](yes|no)['\"]\s*,\s*['\"]score['\"]\s*:\s*([0-5])\s*\}", re.IGNORECASE
)
_HOUND = re.compile(r"^\W*score\W*:\W*([1-5])(?![0-9.])", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Rating:
    """What a judge says of an answer."""

    is_right: bool
    score: float


def read_official(text: str) -> Rating | None:
    """The only `{'pred': 'yes', 'score': 4}` of a judge's answer."""
    found = _OFFICIAL.findall(text)
    return Rating(found[0][0].lower() == "yes", float(found[0][1])) if len(found) == 1 else None


def read_hound(text: str) -> Rating | None:
    """The only `Score: 4` of a judge's answer."""
    found = _HOUND.findall(text)
    return Rating(int(found[0]) >= RIGHT_FROM, float(found[0])) if len(found) == 1 else None


Rate = Callable[[Sequence[tuple[Template, Sample]], Callable[[str], Rating | None]], list[Any]]


@dataclass
class Judged:
    """Share of right answers and mean score, over those with a rating; the others are counted in `n_invalid`.

    Args:
        rate: asks the judge (`actors.judge.Judge.rate`); anything but a `Rating` is why there is none.
    """

    samples: Sequence[Sample]
    rate: Rate
    protocol: Literal["hound", "official"] = "official"
    caption: str = "caption"
    headline = ("accuracy", "score", "n", "n_invalid")
    ratings: dict[str, Rating] = field(default_factory=dict)  # by sample id, after `score`

    @property
    def template(self) -> Template:
        return HOUND if self.protocol == "hound" else OFFICIAL

    def prompt(self, sample: Sample) -> Sample:
        return sample

    def parse(self, sample: Sample, prediction: Prediction) -> str:
        return " ".join(prediction.text.split()[:WORDS]) if self.protocol == "hound" else prediction.text

    def score(self, parsed: Mapping[str, str]) -> dict[str, float]:
        answered = [sample for sample in self.samples if sample.id in parsed]
        prompts = []
        for sample in answered:
            fields = {"question": question_of(sample), "answer": sample.answer, "prediction": parsed[sample.id]}
            if self.protocol == "hound":
                fields["caption"] = str(sample.extra.get(self.caption, ""))
            prompts.append((self.template, about_video(sample, f"{sample.id}#rating", self.template.fill(**fields))))
        rated = self.rate(prompts, read_hound if self.protocol == "hound" else read_official)
        self.ratings = {s.id: r for s, r in zip(answered, rated, strict=True) if isinstance(r, Rating)}
        return {
            "accuracy": mean(rating.is_right for rating in self.ratings.values()),
            "score": mean(rating.score for rating in self.ratings.values()),
            "n": len(self.ratings),
            "n_invalid": len(self.samples) - len(self.ratings),
        }

    def value(self, sample: Sample, parsed: str | None) -> float | None:
        rating = self.ratings.get(sample.id)
        return None if rating is None else float(rating.is_right)

    def confusions(self, parsed: Mapping[str, str]) -> list[Confusion]:
        return []
