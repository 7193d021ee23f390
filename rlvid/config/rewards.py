"""Parts of a reward: one class per kind, each with its own keys. How a kind scores is in `rlvid/rewards`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rlvid.config.algorithms import RewardJudgeConfig, is_web_address
from rlvid.config.section import Checkpoint, Section, changeable

TAG_NAME = re.compile(r"[A-Za-z][\w-]*")


def _check_tags(tags: tuple[str, ...]) -> tuple[str, ...]:
    for tag in tags:
        if not TAG_NAME.fullmatch(tag):
            raise ValueError(f"tags are names without brackets, for example answer; got {tag!r}")
    if len(set(tags)) < len(tags):
        raise ValueError(f"tags names a tag twice, but a response has each tag once: {list(tags)}")
    return tags


Tags = Annotated[tuple[str, ...], AfterValidator(_check_tags)]


class RewardPart(Section):
    """What all kinds of parts share."""

    kind: str
    """What the part scores."""
    weight: float = 1.0
    """Factor in the total."""
    name: str | None = None
    """Name in metrics and report; default is the kind."""
    problem_types: tuple[str, ...] = ()
    """The part scores samples of these `problem_type` only. Empty: all samples. So one config serves a set of
    multiple-choice and numeric questions."""

    @property
    def label(self) -> str:
        """The part's name in metrics and report."""
        return self.name or self.kind


class AnswerPart(RewardPart):
    """A part that reads the answer out of the response."""

    tags: Tags = ()
    """The answer is the content of the last of these tags, for example [answer]. Empty: the whole response."""


class ExactPart(AnswerPart):
    """1 when the answer equals the sample's answer after normalisation, else 0."""

    kind: Literal["exact"]
    """exact: the answer equals the sample's answer after normalisation (docs/rewards.md)."""


class ChoicePart(AnswerPart):
    """1 when the answer names the right choice and no other one, else 0."""

    kind: Literal["choice"]
    """choice: the answer is the letter or the text of the right choice (docs/rewards.md)."""
    reading: Literal["strict", "first_letter"] = "strict"
    """first_letter: the answer names the choice whose letter it begins with, whatever follows, or the first whose
    letter a colon follows: for figures that were published so, since "Apples" names A."""


class NumberPart(AnswerPart):
    """1 when the answer is the sample's number, else 0."""

    kind: Literal["number"]
    """number: the answer is a number equal to the sample's answer (docs/rewards.md)."""
    tolerance: float = Field(1e-6, ge=0)
    """Absolute difference that still counts as equal."""


class VerbatimPart(AnswerPart):
    """1 when the answer equals the sample's, spaces around them aside, else 0 (Video-R1, multiple choice)."""

    kind: Literal["verbatim"]
    """verbatim: the answer equals the sample's character by character (Video-R1's multiple choice)."""


class NumericalPart(AnswerPart):
    """1 when both numbers are equal to two decimals, and both or neither have decimals, else 0 (Video-R1)."""

    kind: Literal["numerical"]
    """numerical: both numbers are equal to two decimals, and both or neither have decimals (Video-R1)."""


class MathPart(AnswerPart):
    """1 when the answer is mathematically equal to the sample's (math-verify, as R1-V), else 0."""

    kind: Literal["math"]
    """math: the answer is mathematically equal to the sample's, by math-verify, or equal as text (R1-V)."""


class OcrPart(AnswerPart):
    """1 minus the word error rate of the answer, at least 0 (Video-R1)."""

    kind: Literal["ocr"]
    """ocr: 1 minus the word error rate, at least 0 (Video-R1)."""


class FreeFormPart(AnswerPart):
    """The mean of ROUGE-1, ROUGE-2 and ROUGE-L F-scores with stemming (Video-R1)."""

    kind: Literal["free_form"]
    """free_form: the mean of ROUGE-1, ROUGE-2 and ROUGE-L, F-scores with stemming (Video-R1)."""


class RegressionPart(AnswerPart):
    """1 minus the relative error of a number, at least 0 (Video-R1)."""

    kind: Literal["regression"]
    """regression: 1 minus the relative error of the number, at least 0 (Video-R1)."""


class TemporalIouPart(AnswerPart):
    """Overlap of the time span that the answer names with the sample's (VideoChat-R1)."""

    kind: Literal["temporal_iou"]
    """temporal_iou: intersection over union of the time span that the answer names last, as in "3.5 to 7", with the one
    in the sample's answer (VideoChat-R1)."""


class GlueIouPart(RewardPart):
    """Overlap of the time spans in the tag with the sample's (VideoChat-R1, grounded questions)."""

    kind: Literal["glue_iou"]
    """glue_iou: intersection over union of the time spans [[start, end], ...] in a tag with those of a manifest field
    (VideoChat-R1)."""
    tag: str = "glue"
    """Tag of the response that holds its time spans."""
    gold: str = "glue"
    """Manifest field with the right time spans: [[start, end], ...]."""


class BoxIouPart(AnswerPart):
    """Mean overlap of the boxes of the answer with the sample's (VideoChat-R1, tracking)."""

    kind: Literal["box_iou"]
    """box_iou: mean intersection over union of the boxes [[x0, y0, x1, y1], ...] of the answer with those of a manifest
    field (VideoChat-R1)."""
    gold: str = "boxes"
    """Manifest field with the right boxes: [[x0, y0, x1, y1], ...]."""


class TinyLlavaPart(RewardPart):
    """Accuracy and the length of the reasoning (TinyLLaVA-Video-R1)."""

    kind: Literal["tiny_llava"]
    """tiny_llava: a right answer gets 1 plus its format score, a wrong one minus that score, and -2 where both are 0.
    The format score is 0.5 for tags think and answer, and up to 0.5 for 1,200 characters of reasoning
    (TinyLLaVA-Video-R1)."""


class FormatPart(RewardPart):
    """1 when the response is made of the tags in their order, else 0."""

    kind: Literal["format"]
    """format: the response is the tags in their order, each once and not empty, and nothing else."""
    tags: Annotated[Tags, Field(min_length=1)]
    """Tags in their order, for example [think, answer]."""
    is_strict: bool = True
    """Off: Video-R1's rule, which a repeated or an empty tag passes."""


class LengthPart(RewardPart):
    """1 when the number of tokens is inside the window, else 0."""

    kind: Literal["length"]
    """length: the response's number of tokens is inside the window."""
    min_tokens: int = Field(0, ge=0)
    """Shortest response that is rewarded."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest response that is rewarded. Empty: no limit."""
    right_only: bool = False
    """Only right answers are rewarded, and only where the group has more than one of them (Video-R1: weight 0.2, 320 to
    512 tokens)."""

    def faults(self) -> Iterator[str]:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            yield f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"


class ModelPart(RewardPart):
    """The score that a reward model gives to the response. The model has an actor of its own."""

    kind: Literal["model"]
    """model: the score of a reward model."""
    path: Checkpoint
    """Folder `policy` of a run of `rlvid reward-model` of kind bradley_terry."""


class SimilarityPart(AnswerPart):
    """Cosine similarity of the answer's embedding with that of the sample's answer, at least 0."""

    kind: Literal["similarity"]
    """similarity: cosine of the embeddings of both answers, at least 0 (MultiMood, with BGE-M3)."""
    path: Checkpoint
    """Folder of a text encoder that transformers loads."""
    pooling: Literal["cls", "mean"] = "cls"
    """The embedding of a text. cls: of its first token (BGE-M3). mean: of all its tokens."""
    max_tokens: int = Field(128, ge=1)
    """Longest text, tokens."""


class OwnPart(RewardPart):
    """What parts share whose values come from your code."""

    range: tuple[float, float] = (-1e9, 1e9)
    """Lowest and highest value; one outside is invalid."""
    accuracy: bool = False
    """Whether the highest value means that the answer is right."""

    def faults(self) -> Iterator[str]:
        if self.range[0] >= self.range[1]:
            yield f"range={list(self.range)}: the first number must be the lower one"
        if self.accuracy and self.range == type(self).model_fields["range"].get_default():
            yield "accuracy needs range: its highest value is that of a right answer"


def _check_function(path: str) -> str:
    file, _, function = path.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{path!r} does not name a file and a function, expected for example my_rewards.py:score")
    return path


class CustomPart(OwnPart):
    """Values from a Python function of yours."""

    kind: Literal["custom"]
    """custom: a Python function of yours (docs/rewards.md)."""
    path: Annotated[str, AfterValidator(_check_function)]
    """File and function, as my_rewards.py:score."""


def _check_address(url: str) -> str:
    if not is_web_address(url):
        raise ValueError(f"{url!r} is not a URL, expected for example http://localhost:9000/score")
    return url


class EndpointPart(OwnPart):
    """Values from a server of yours."""

    kind: Literal["endpoint"]
    """endpoint: a server of yours that answers JSON (docs/rewards.md)."""
    url: Annotated[str, AfterValidator(_check_address)]
    """Where each group is sent (POST)."""
    api_key_env: str = changeable("REWARD_API_KEY", "transport")
    """Environment variable that holds a key, sent as a bearer token if it is set."""
    timeout_s: float = changeable(30.0, "a deadline", gt=0)
    """Deadline of one request."""
    deadline_s: float = changeable(100.0, "a deadline", gt=0)
    """Deadline of a group with all its retries. After it its rewards are invalid."""


class JudgePart(RewardPart):
    """A judge's opinion of the response."""

    kind: Literal["judge"]
    """judge: a model's opinion of the response."""
    mode: Literal["score", "trust", "win_rate"] = "score"
    """score: from 1 to 10. trust: the mean of seven scores from 1 to 10: truthfulness, safety, fairness, privacy,
    empathy, reliability, ethical guidance (MultiMood). win_rate: share of the other responses of its group that it
    beats, each pair judged in both orders. All are scaled to 0 to 1."""
    judge: RewardJudgeConfig = RewardJudgeConfig()
    """Who judges."""


def _check_parts(parts: tuple[RewardPart, ...]) -> tuple[RewardPart, ...]:
    if not parts:
        raise ValueError("rewards is empty: give at least one part, for example [{kind: exact}]")
    labels = [part.label for part in parts]
    for i, label in enumerate(labels):
        if label in labels[:i]:
            raise ValueError(f"rewards.{i}: the name {label!r} is taken by an earlier part: set rewards.{i}.name")
    return parts


_Answers = ExactPart | ChoicePart | NumberPart | VerbatimPart | NumericalPart | MathPart | OcrPart | FreeFormPart
_Numbers = RegressionPart | TemporalIouPart | GlueIouPart | BoxIouPart
_Forms = TinyLlavaPart | FormatPart | LengthPart
_Models = ModelPart | SimilarityPart
_Others = CustomPart | EndpointPart | JudgePart
RewardPartConfig = Annotated[_Answers | _Numbers | _Forms | _Models | _Others, Field(discriminator="kind")]
RewardPartsConfig = Annotated[tuple[RewardPartConfig, ...], AfterValidator(_check_parts)]
