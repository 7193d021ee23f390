"""The contract of a reward part, and how the values of several parts become one `Reward`.

A part maps a group, which is one sample and all responses to it, to one value per response. Where it has none it says
why; a missing value is never 0. The part declares the range of its values. One that measures accuracy calls a response
right when its value is the highest of the range.

Rules are functions (`rlvid/rewards/rules.py`). A part whose model has an actor of its own has no function: its
values come from that actor (`actors/rewards.py`), and are combined with the others here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlvid.config import AnswerPart, LengthPart, OwnPart, RewardPart
from rlvid.errors import UserError
from rlvid.rewards.answers import answer_text
from rlvid.types import Reward, Sample


@dataclass(frozen=True)
class Response:
    """What a part sees of one response."""

    text: str
    n_tokens: int


@dataclass(frozen=True)
class Group:
    """A sample and the responses to it.

    `opening` is the text with which the prompt has begun the response, for example "<think>\\n": tags count whether the
    chat template or the model wrote them.
    """

    sample: Sample
    responses: tuple[Response, ...]
    opening: str = ""


class NoReward(Exception):
    """Why there is no value. A rule raises it for the whole group, or puts it in the place of one response's value."""


Values = Sequence[float | NoReward]  # one per response


def answers(part: AnswerPart, group: Group) -> list[str]:
    """The answer of each response, spaces around it removed; empty where there is none."""
    return [(answer_text(r.text, part.tags, group.opening) or "").strip() for r in group.responses]


def right_answer(group: Group) -> str:
    """
    Raises:
        NoReward: the sample has no answer.
    """
    text = group.sample.answer.strip()
    if not text:
        raise NoReward("the sample has no answer")
    return text


@dataclass(frozen=True)
class Kind:
    """How the parts of one kind score.

    Args:
        score: maps the part's config and a group to its values. None: a model in an actor of its own.
        range: lowest and highest value. A value outside is no value.
        measures_accuracy: the highest value means that the answer is right.
        check: finds before a run starts what is wrong with a config, for example its paths. Raises UserError.
        is_rule: can tell from a sample alone, without responses, whether it has values for it.
        waits: its groups are scored several at a time, since it waits for something else.
    """

    score: Callable[[Any, Group], Values] | None
    range: tuple[float, float] = (0.0, 1.0)
    measures_accuracy: bool = False
    check: Callable[[Any], object] = lambda cfg: None
    is_rule: bool = True
    waits: bool = False


@dataclass(frozen=True)
class Part:
    """One configured part. Picklable: reward workers get it whole."""

    cfg: RewardPart
    kind: Kind

    @property
    def name(self) -> str:
        return self.cfg.label

    @property
    def range(self) -> tuple[float, float]:
        return self.cfg.range if isinstance(self.cfg, OwnPart) else self.kind.range

    @property
    def measures_accuracy(self) -> bool:
        return self.kind.measures_accuracy or (isinstance(self.cfg, OwnPart) and self.cfg.accuracy)

    @property
    def needs_right(self) -> bool:
        """Whether only right answers get the part, where the group has more than one of them."""
        return isinstance(self.cfg, LengthPart) and self.cfg.right_only

    def covers(self, sample: Sample) -> bool:
        return not self.cfg.problem_types or sample.problem_type in self.cfg.problem_types

    def __call__(self, group: Group) -> Values:
        """One value per response; only of a part that has a function."""
        assert self.kind.score is not None
        try:
            return self.kind.score(self.cfg, group)
        except NoReward as reason:
            return [reason] * len(group.responses)


def score_rules(parts: Sequence[Part], group: Group) -> dict[str, Values]:
    """Values of the parts that have a function and cover the sample, by name."""
    return {part.name: part(group) for part in parts if part.kind.score is not None and part.covers(group.sample)}


def combine(parts: Sequence[Part], group: Group, values: Mapping[str, Values]) -> list[Reward]:
    """One reward per response: the weighted sum over the parts that cover the sample. Invalid where one has no value.

    `accuracy` is that of the first of them that measures it, as a share of its range.
    """
    covering = [part for part in parts if part.covers(group.sample)]
    if not covering:
        return [Reward.invalid(_not_covered(group.sample))] * len(group.responses)
    rewards = [_reward(covering, row) for row in zip(*(values[part.name] for part in covering), strict=True)]
    n_right = sum(reward.is_right is True for reward in rewards)
    gated = [part for part in covering if part.needs_right and part.name in values]
    return [_without(reward, gated) if reward.is_right is not True or n_right < 2 else reward for reward in rewards]


def _without(reward: Reward, parts: Sequence[Part]) -> Reward:
    """The reward where these parts are 0."""
    if not reward.is_valid or not parts:
        return reward
    lost = math.fsum(part.cfg.weight * reward.parts[part.name] for part in parts)
    zeros = {part.name: 0.0 for part in parts}
    return replace(reward, parts={**reward.parts, **zeros}, total=reward.total - lost)


def _reward(parts: Sequence[Part], values: Sequence[float | NoReward]) -> Reward:
    valid: dict[str, float] = {}
    for part, value in zip(parts, values, strict=True):
        low, high = part.range
        if isinstance(value, NoReward):
            return Reward.invalid(f"{part.name}: {value}")
        if not low <= value <= high:
            return Reward.invalid(f"{part.name}: {value} is outside the range from {low:g} to {high:g}")
        valid[part.name] = value
    total = math.fsum(part.cfg.weight * valid[part.name] for part in parts)
    measured = next((part for part in parts if part.measures_accuracy), None)
    if measured is None:
        return Reward(valid, total)
    low, high = measured.range
    return Reward(valid, total, accuracy=(valid[measured.name] - low) / (high - low))


def check_samples(parts: Sequence[Part], samples: Sequence[Sample], key: str, needs_accuracy: bool = False) -> None:
    """Check before a run starts that every sample can be scored: rules are called without responses.

    Args:
        key: of the samples' manifest, for the message.
        needs_accuracy: every sample needs a part that measures accuracy.

    Raises:
        UserError: no part covers a sample, or one that covers it has no value for it. Names the first such sample.
    """
    for sample in samples:
        where = f"{key}: sample {sample.id!r}"
        covering = [part for part in parts if part.covers(sample)]
        if not covering:
            raise UserError(f"{where}: {_not_covered(sample)}: add one, or add it to a part's problem_types")
        if needs_accuracy and not any(part.measures_accuracy for part in covering):
            raise UserError(
                f"{where} (problem_type {sample.problem_type!r}): evaluation needs a reward part that says whether an "
                "answer is right: add one, for example of kind exact, choice or number"
            )
        for part in covering:
            try:
                if part.kind.score is not None and part.kind.is_rule:
                    part.kind.score(part.cfg, Group(sample, ()))
            except NoReward as reason:
                raise UserError(
                    f"{where} (problem_type {sample.problem_type!r}): reward part {part.name}: {reason}; set "
                    "problem_types of each part to those that it can score, or fix the row"
                ) from reason


def _not_covered(sample: Sample) -> str:
    return f"no reward part covers problem_type {sample.problem_type!r}"
