from __future__ import annotations

import os

import numpy as np
import pytest

from actors.rewards import Rewards
from rlvid.config import RewardPartConfig
from rlvid.errors import UserError
from rlvid.rewards.rules import RuleRewards
from rlvid.types import Reward, Rollout
from tests.prompts import sample_of

PARTS = (RewardPartConfig(kind="exact"),)


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout("s", np.zeros(1, np.int32), np.zeros(1, np.float32), text, "stop", ()) for text in texts]


@pytest.mark.usefixtures("local_ray")
def test_rewards_come_in_the_order_given_from_any_number_of_workers() -> None:
    samples = [sample_of(sample_id=str(i)) for i in range(5)]  # the answer is "square"
    groups = [rollouts("square", "circle") if i % 2 else rollouts("circle") for i in range(5)]
    for workers in (1, 3):
        rewards = Rewards(PARTS, workers, cpus=0.1)
        assert [[m.total for m in g] for g in rewards(samples, groups)] == [[0], [1, 0], [0], [1, 0], [0]]
        rewards.stop()


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_twice_gives_invalid_rewards_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fatal(RuleRewards):
        def __call__(self, *args: object) -> Reward:
            os._exit(1)

    rewards = Rewards(PARTS, 1, cpus=0.1)
    monkeypatch.setattr(
        "actors.rewards.RewardWorker.__init__", lambda self, parts: setattr(self, "_rewards", Fatal(parts))
    )
    rewards.stop()
    rewards = Rewards(PARTS, 1, cpus=0.1)
    ((mark,),) = rewards([sample_of()], [rollouts("square")])
    assert not mark.is_valid and "reward worker" in str(mark.invalid_reason)


def test_wrong_parts_are_an_error_on_the_driver() -> None:
    with pytest.raises(UserError):
        Rewards((*PARTS, *PARTS), 1, cpus=0.1)
