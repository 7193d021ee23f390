from __future__ import annotations

import os
import time

import numpy as np
import pytest

from actors.rewards import Rewards
from rlvid.config import ExactPart, FormatPart
from rlvid.rewards.part import Group, Kind, Part, Values
from rlvid.rewards.rules import make_parts
from rlvid.types import Rollout
from tests.prompts import sample_of

PARTS = make_parts([ExactPart(kind="exact")])


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout("s", np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ()) for text in texts]


@pytest.mark.usefixtures("local_ray")
def test_rewards_come_in_the_order_given_from_any_number_of_workers() -> None:
    samples = [sample_of(sample_id=str(i)) for i in range(5)]  # the answer is "square"
    groups = [rollouts("square", "circle") if i % 2 else rollouts("circle") for i in range(5)]
    for workers in (1, 3):
        rewards = Rewards(PARTS, workers, cpus=0.1)
        assert [[r.total for r in g] for g in rewards(samples, groups)] == [[0], [1, 0], [0], [1, 0], [0]]
        rewards.stop()


def exit_at_once(part: ExactPart, group: Group) -> Values:
    os._exit(1)


def sleep_long(part: ExactPart, group: Group) -> Values:
    time.sleep(60)
    return []


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("rule", [exit_at_once, sleep_long])
def test_a_worker_that_fails_twice_gives_invalid_rewards_not_zero(
    rule: object,
) -> None:
    rewards = Rewards([Part(ExactPart(kind="exact"), Kind(rule))], 1, cpus=0.1, timeout_s=5.0)  # type: ignore[arg-type]
    ((reward,),) = rewards([sample_of()], [rollouts("square")])
    rewards.stop()
    assert not reward.is_valid and "reward worker" in str(reward.invalid_reason)


@pytest.mark.usefixtures("local_ray")
def test_what_the_prompt_has_begun_counts_as_part_of_the_response() -> None:
    """Fault 14: `format` was always 0 with chat templates that open <think> themselves."""
    parts = make_parts([FormatPart(kind="format", tags=("think", "answer"))])
    for opening, value in (("<think>\n", 1.0), ("", 0.0)):
        rewards = Rewards(parts, 1, cpus=0.1, opening=opening)
        ((reward,),) = rewards([sample_of()], [rollouts("it moves</think><answer>left</answer>")])
        rewards.stop()
        assert reward.total == value


def sleep_at_one(part: ExactPart, group: Group) -> Values:
    if group.sample.id == "1":
        time.sleep(60)
    return [1.0] * len(group.responses)


@pytest.mark.usefixtures("local_ray")
def test_a_group_that_hangs_takes_no_other_along() -> None:
    rewards = Rewards([Part(ExactPart(kind="exact"), Kind(sleep_at_one))], 1, cpus=0.1, timeout_s=4.0)
    samples = [sample_of(sample_id=str(i)) for i in range(4)]
    found = rewards(samples, [rollouts("a")] * 4)
    rewards.stop()
    assert [group[0].is_valid for group in found] == [True, False, True, True]
    assert "no values within deadlines.reward_s=4" in str(found[1][0].invalid_reason)
