"""Parts of a reward: one class per kind, each with its own keys. How a kind scores is in `rlvid/rewards/rules.py`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from rlvid.config.sections import Checkpoint, Section

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


class NumberPart(AnswerPart):
    """1 when the answer is the sample's number, else 0."""

    kind: Literal["number"]
    """number: the answer is a number equal to the sample's answer (docs/rewards.md)."""
    tolerance: float = Field(1e-6, ge=0)
    """Absolute difference that still counts as equal."""


class FormatPart(RewardPart):
    """1 when the response is made of the tags in their order, else 0."""

    kind: Literal["format"]
    """format: the response is the tags in their order, each once and not empty, and nothing else."""
    tags: Annotated[Tags, Field(min_length=1)]
    """Tags in their order, for example [think, answer]."""


class LengthPart(RewardPart):
    """1 when the number of tokens is inside the window, else 0."""

    kind: Literal["length"]
    """length: the response's number of tokens is inside the window."""
    min_tokens: int = Field(0, ge=0)
    """Shortest response that is rewarded."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest response that is rewarded. Empty: no limit."""

    @model_validator(mode="after")
    def _window_is_not_empty(self) -> LengthPart:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        return self


class ModelPart(RewardPart):
    """The score that a reward model gives to the response. The model has an actor of its own."""

    kind: Literal["model"]
    """model: the score of a reward model."""
    path: Checkpoint
    """Folder `policy` of a run of `rlvid reward-model` of kind bradley_terry."""


def _check_parts(parts: tuple[RewardPart, ...]) -> tuple[RewardPart, ...]:
    if not parts:
        raise ValueError("rewards is empty: give at least one part, for example [{kind: exact}]")
    labels = [part.label for part in parts]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise ValueError(
                f"rewards.{index}: the name {label!r} is taken by an earlier part: set rewards.{index}.name"
            )
    return parts


RewardPartConfig = Annotated[
    ExactPart | ChoicePart | NumberPart | FormatPart | LengthPart | ModelPart, Field(discriminator="kind")
]
RewardPartsConfig = Annotated[tuple[RewardPartConfig, ...], AfterValidator(_check_parts)]
