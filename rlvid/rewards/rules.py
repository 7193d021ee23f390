"""Rules: rewards computed from the response and the manifest's answer.

A wrong or missing answer is a legitimate 0. A sample that a rule cannot score has no reward (`NoReward`), never 0.
A new rule is a function here or elsewhere, and a line in KINDS (CONTRIBUTING.md, "Where to add things").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlvid.config import AnswerPart, ChoicePart, FormatPart, LengthPart, ModelPart, NumberPart, RewardPart
from rlvid.errors import UserError
from rlvid.rewards import custom, grounding, similarity, video_r1
from rlvid.rewards.answers import (
    MAX_ANSWER_CHARS,
    answer_text,
    choices_meant,
    normalise,
    read_choice,
    read_first_letter,
    read_number,
)
from rlvid.rewards.part import Group, Kind, NoReward, Part, Values, answers, right_answer
from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric


def exact(part: AnswerPart, group: Group) -> Values:
    """1.0 when the answer equals the sample's after `normalise`, else 0.0."""
    gold = right_answer(group)
    longest, right = max(MAX_ANSWER_CHARS, 2 * len(gold)), normalise(gold)
    return [float(len(answer) <= longest and normalise(answer) == right) for answer in answers(part, group)]


def choice(part: ChoicePart, group: Group) -> Values:
    """1.0 when the answer names the right choice by its letter, its text or both, else 0.0.

    Raises:
        NoReward: the sample has no choices, or its answer is not one of them.
    """
    sample = group.sample
    if not sample.choices:
        raise NoReward("the sample has no choices")
    right = choices_meant(sample.answer, sample.choices)
    if len(right) != 1:
        raise NoReward(f"the sample's answer {sample.answer!r} does not name one of its choices")
    read = read_choice if part.reading == "strict" else read_first_letter
    named = [read(answer, sample.choices) for answer in answers(part, group)]
    return [float(name is not None and normalise(name) == normalise(*right)) for name in named]


def number(part: NumberPart, group: Group) -> Values:
    """1.0 when the answer is a number within `tolerance` of the sample's, and not of another unit, else 0.0.

    Raises:
        NoReward: the sample's answer is not a number.
    """
    gold = read_number(group.sample.answer)
    if gold is None:
        raise NoReward(f"the sample's answer {group.sample.answer[:80]!r} is not a number")
    right, unit = gold
    found = [read_number(answer) for answer in answers(part, group)]
    return [
        float(n is not None and abs(n[0] - right) <= part.tolerance and len({n[1], unit} - {""}) <= 1) for n in found
    ]


def tag_format(part: FormatPart, group: Group) -> Values:
    """1.0 when the response is the tags in their order, each exactly once and not empty, with only space between.

    What the prompt has begun of the response counts.
    Stricter than Video-R1's `<think>.*?</think>\\s*<answer>.*?</answer>`, which a repeated or an empty tag passes: that
    is the rule if `is_strict` is off.
    """
    texts = [group.opening + response.text for response in group.responses]
    if part.is_strict:
        return [float(_is_tagged(text, part.tags)) for text in texts]
    form = r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in map(re.escape, part.tags))
    return [float(re.fullmatch(form, text, re.DOTALL) is not None) for text in texts]


def _is_tagged(response: str, tags: Sequence[str]) -> bool:
    if any(answer_text(response, (tag,)) is None for tag in tags):
        return False  # one pair of each in the whole response: none hides inside the body of another
    form = r"\s*".join(f"<{tag}>(.*)</{tag}>" for tag in map(re.escape, tags))
    match = re.fullmatch(rf"\s*{form}\s*", response, re.DOTALL)
    return match is not None and all(body.strip() for body in match.groups())


def length(part: LengthPart, group: Group) -> Values:
    """1.0 when min_tokens <= number of tokens <= max_tokens, else 0.0."""
    most = float("inf") if part.max_tokens is None else part.max_tokens
    return [float(part.min_tokens <= response.n_tokens <= most) for response in group.responses]


def check_reward_model(part: ModelPart) -> None:
    """
    Raises:
        UserError: no reward model that scores answers is in the part's folder.
    """
    kind = Rubric.load(part.path / RUBRIC_FOLDER).kind
    if kind != "bradley_terry":
        raise UserError(
            f"{part.path} is a {kind} model, which scores videos and not answers; give one of kind bradley_terry"
        )


UNLIMITED = (float("-inf"), float("inf"))
KINDS: dict[str, Kind] = {
    "exact": Kind(exact, measures_accuracy=True),
    "choice": Kind(choice, measures_accuracy=True),
    "number": Kind(number, measures_accuracy=True),
    "verbatim": Kind(video_r1.verbatim, measures_accuracy=True),
    "numerical": Kind(video_r1.numerical, measures_accuracy=True),
    "math": Kind(video_r1.math_equal, measures_accuracy=True),
    "ocr": Kind(video_r1.ocr, measures_accuracy=True),
    "free_form": Kind(video_r1.free_form, measures_accuracy=True),
    "regression": Kind(video_r1.regression, measures_accuracy=True),
    "temporal_iou": Kind(grounding.temporal_iou, measures_accuracy=True),
    "glue_iou": Kind(grounding.glue_iou),
    "box_iou": Kind(grounding.box_iou, measures_accuracy=True),
    "tiny_llava": Kind(video_r1.tiny_llava, range=(-2.0, 2.0)),
    "format": Kind(tag_format),
    "length": Kind(length),
    "model": Kind(None, range=UNLIMITED, check=check_reward_model),
    "similarity": Kind(similarity.similarity),
    "custom": Kind(custom.custom, check=lambda part: custom.load_function(part.path), is_rule=False),
    "endpoint": Kind(custom.endpoint, is_rule=False, waits=True),
    "judge": Kind(None),
}


def make_parts(rewards: Sequence[RewardPart]) -> list[Part]:
    """The configured parts, in their order."""
    return [Part(cfg, KINDS[cfg.kind]) for cfg in rewards]


def check_rewards(rewards: Sequence[RewardPart]) -> None:
    """
    Raises:
        UserError: a part cannot be used.
    """
    parts = make_parts(rewards)
    needing = [part.name for part in parts if part.needs_right]
    if needing and not any(part.measures_accuracy for part in parts):
        raise UserError(
            f"rewards: {needing[0]} rewards right answers only, and no part says which are right: add one, for example "
            f"of kind exact, choice or number"
        )
    for index, cfg in enumerate(rewards):
        try:
            KINDS[cfg.kind].check(cfg)
        except UserError as e:
            raise UserError(f"rewards.{index} ({cfg.label}): {e}") from e
