from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actors.ranks import balance_indices
from actors.trainer import balance
from rlvid.config import GrpoConfig
from rlvid.errors import UserError
from rlvid.training.batch import Group
from rlvid.training.grpo_batch import (
    advantages_of,
    make_minibatch,
    rollout_rows,
    sampled_groups,
    summarize,
    totals,
    with_advantages,
)
from rlvid.types import Encoded, Reward, Rollout, WeightSpan
from tests.prompts import sample_of


def rollout(n: int, logprob: float = -0.5, reason: str = "stop") -> Rollout:
    ids = np.arange(n, dtype=np.int32)
    return Rollout("s", ids, np.full(n, logprob, np.float32), "text", reason, (WeightSpan(3, 0, n),))


def reward(form: float, right: float) -> Reward:
    return Reward({"format": form, "right": right}, form + 2 * right, is_right=right == 1)


def prompts(n: int) -> list[Encoded]:
    return [Encoded(sample_of(sample_id=str(i)), f"ref-{i}", 10, 50) for i in range(n)]  # type: ignore[arg-type]


GROUPS = [[rollout(2, -1.0), rollout(3, -2.0)], [rollout(1), rollout(4, reason="length")]]
REWARDS = [[reward(1, 1), reward(1, 0)], [reward(0, 1), Reward.invalid("judge is down")]]


def sampled(advantages: npt.NDArray[np.float32]) -> list[Group[Any]]:
    return with_advantages(sampled_groups(prompts(2), GROUPS, 0.7), advantages)


def test_an_invalid_reward_is_no_number_and_has_no_advantage() -> None:
    assert np.array_equal(totals(REWARDS), [[3, 1], [2, math.nan]], equal_nan=True)
    # group 1: mean 2, sample std sqrt(2); group 2 has one valid reward
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert np.allclose(advantages_of(REWARDS, GrpoConfig()), [[expected, -expected], [0, 0]])


def test_minibatch_weights_are_those_of_all_its_tokens() -> None:
    advantages = np.array([[1, -1], [0.5, -0.5]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig())
    assert [g.tokens["weights"].tolist() for g in batch] == [pytest.approx([0.1] * 5), pytest.approx([0.1] * 5)]
    assert batch[0].tokens["advantages"].tolist() == [1, 1, -1, -1, -1]
    assert batch[0].tokens["old_logprobs"].tolist() == [-1, -1, -2, -2, -2]
    assert [g.temperature for g in batch] == [0.7, 0.7]  # the trainer's log-probs are tempered alike
    by_sequence = make_minibatch(sampled(advantages), GrpoConfig(loss_average="sequence"))
    assert by_sequence[0].tokens["weights"].tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12])


def test_a_group_that_trains_nothing_is_left_out_but_counts_in_the_average() -> None:
    advantages = np.array([[1, -1], [0, 0]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig())
    assert [g.prompt for g in batch] == ["ref-0"]
    assert batch[0].tokens["weights"].tolist() == pytest.approx([0.1] * 5)  # of 10 tokens, not of 5


def test_a_kl_term_trains_every_group() -> None:
    advantages = np.array([[1, -1], [0, 0]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig(kl_coef=0.1))
    assert len(batch) == 2


def test_every_rank_keeps_something_to_do() -> None:
    batch = make_minibatch(sampled(np.zeros((2, 2), np.float32)), GrpoConfig(), keep=2)
    assert len(batch) == 2


def test_summary_counts_invalid_rewards_apart() -> None:
    metrics = summarize(GROUPS, REWARDS)
    assert metrics == {
        "reward/mean": 2.0,  # of 3, 1 and 2
        "groups/invalid_rewards": 1.0,
        "response/length": 2.5,  # of 2, 3, 1 and 4
        "response/cut_off": 0.25,
        "policy/entropy": pytest.approx((2 * 1.0 + 3 * 2.0 + 5 * 0.5) / 10),
        "groups/zero_variance": 0.5,
        "reward/format": pytest.approx(2 / 3),
        "reward/right": pytest.approx(2 / 3),
        "train/accuracy": pytest.approx(2 / 3),
    }


def test_a_part_is_averaged_over_the_samples_that_it_covers() -> None:
    number, choice = Reward({"number": 1.0}, 1.0, is_right=True), Reward({"choice": 0.0}, 0.0, is_right=False)
    metrics = summarize(GROUPS, [[number, number], [choice, Reward({"choice": 1.0}, 1.0)]])
    assert (metrics["reward/number"], metrics["reward/choice"]) == (1.0, 0.5)
    assert metrics["train/accuracy"] == pytest.approx(2 / 3)  # of the three rewards with a verdict
    assert "train/accuracy" not in summarize(GROUPS, [[Reward({"length": 1.0}, 1.0)] * 2] * 2)


def test_rows_hold_all_that_the_report_shows() -> None:
    from rlvid.reporting.rollout_tables import SCHEMA

    rows: list[dict[str, Any]] = rollout_rows(7, prompts(2), GROUPS, REWARDS, np.array([[1, -1], [0, 0]], np.float32))
    assert all(set(row) == set(SCHEMA.names) for row in rows)
    assert [(r["sample_id"], r["group_index"], r["reward_total"]) for r in rows] == [
        ("0", 0, 3),
        ("0", 1, 1),
        ("1", 0, 2),
        ("1", 1, None),
    ]
    assert rows[3]["invalid_reason"] == "judge is down"
    assert json.loads(rows[1]["weight_versions"]) == [[3, 0, 3]]


def test_ranks_get_shares_of_about_equal_cost() -> None:
    shares = balance_indices([10, 1, 1, 8, 1, 1], 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    loads = [sum([10, 1, 1, 8, 1, 1][i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= 1
    assert balance_indices([5], 1) == [[0]]


def test_too_few_groups_for_the_ranks_is_an_error() -> None:
    group = Group("ref", 1, (np.zeros(1, np.int32),))
    with pytest.raises(UserError, match="for 2 ranks"):
        balance([group], 2)
