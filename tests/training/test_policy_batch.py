from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from actors.ranks import balance_indices
from actors.trainer import balance
from rlvid.config import GrpoConfig, PpoConfig
from rlvid.errors import UserError
from rlvid.training.batch import Group
from rlvid.training.policy_batch import (
    make_minibatch,
    mean_advantages,
    response_advantages,
    rollout_rows,
    sampled_groups,
    shaped,
    staleness,
    summarize,
    temporal_bonus,
    totals,
    with_advantages,
    with_returns,
)
from rlvid.types import Encoded, Reward, Rollout, WeightSpan
from tests.prompts import sample_of


def rollout(n: int, logprob: float = -0.5, reason: str = "stop") -> Rollout:
    ids = np.arange(n, dtype=np.int32)
    return Rollout("s", ids, np.full(n, logprob, np.float32), "text", reason, (WeightSpan(3, 0, n),))


def reward(form: float, right: float) -> Reward:
    return Reward({"format": form, "right": right}, form + 2 * right, accuracy=right)


def prompts(n: int) -> list[Encoded]:
    return [Encoded(sample_of(sample_id=str(i)), f"ref-{i}", 10, 50) for i in range(n)]  # type: ignore[arg-type]


GROUPS = [[rollout(2, -1.0), rollout(3, -2.0)], [rollout(1), rollout(4, reason="length")]]
REWARDS = [[reward(1, 1), reward(1, 0)], [reward(0, 1), Reward.invalid("judge is down")]]


def sampled(advantages: npt.NDArray[np.float32]) -> list[Group[Any]]:
    groups = sampled_groups(prompts(2), GROUPS, 0.7)
    lengths = [[len(r.token_ids) for r in group] for group in GROUPS]
    repeated = [np.repeat(own, n).astype(np.float32) for own, n in zip(advantages, lengths, strict=True)]
    return [group.with_tokens(advantages=own) for group, own in zip(groups, repeated, strict=True)]


def test_an_invalid_reward_is_no_number_and_has_no_advantage() -> None:
    assert np.array_equal(totals(REWARDS), [[3, 1], [2, math.nan]], equal_nan=True)
    # group 1: mean 2, sample std sqrt(2); group 2 has one valid reward
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert np.allclose(response_advantages(totals(REWARDS), GrpoConfig()), [[expected, -expected], [0, 0]])


def test_minibatch_weights_are_those_of_all_its_tokens() -> None:
    advantages = np.array([[1, -1], [0.5, -0.5]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig(), 10)
    assert [g.tokens["weights"].tolist() for g in batch] == [pytest.approx([0.1] * 5), pytest.approx([0.1] * 5)]
    assert batch[0].tokens["advantages"].tolist() == [1, 1, -1, -1, -1]
    assert batch[0].tokens["rollout_logprobs"].tolist() == [-1, -1, -2, -2, -2]
    assert [g.temperature for g in batch] == [0.7, 0.7]  # the trainer's log-probs are tempered alike
    by_sequence = make_minibatch(sampled(advantages), GrpoConfig(loss_average="sequence"), 10)
    assert by_sequence[0].tokens["weights"].tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12])


def test_a_group_that_trains_nothing_is_left_out_but_counts_in_the_average() -> None:
    advantages = np.array([[1, -1], [0, 0]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig(), 10)
    assert [g.prompt for g in batch] == ["ref-0"]
    assert batch[0].tokens["weights"].tolist() == pytest.approx([0.1] * 5)  # of 10 tokens, not of 5


def test_a_kl_term_trains_every_group() -> None:
    advantages = np.array([[1, -1], [0, 0]], np.float32)
    batch = make_minibatch(sampled(advantages), GrpoConfig(kl_coef=0.1), 10)
    assert len(batch) == 2


def test_every_rank_keeps_something_to_do() -> None:
    batch = make_minibatch(sampled(np.zeros((2, 2), np.float32)), GrpoConfig(), 10, keep=2)
    assert len(batch) == 2


def test_summary_counts_invalid_rewards_apart() -> None:
    metrics = summarize(GROUPS, REWARDS)
    assert metrics == {
        "reward/mean": 2.0,  # of 3, 1 and 2
        "groups/samples": 2.0,
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
    number, choice = Reward({"number": 1.0}, 1.0, accuracy=1.0), Reward({"choice": 0.0}, 0.0, accuracy=0.0)
    metrics = summarize(GROUPS, [[number, number], [choice, Reward({"choice": 1.0}, 1.0)]])
    assert (metrics["reward/number"], metrics["reward/choice"]) == (1.0, 0.5)
    assert metrics["train/accuracy"] == pytest.approx(2 / 3)  # of the three rewards with a verdict
    assert "train/accuracy" not in summarize(GROUPS, [[Reward({"length": 1.0}, 1.0)] * 2] * 2)


def test_rows_hold_all_that_the_report_shows() -> None:
    from rlvid.reporting.rollout_tables import SCHEMA

    rows: list[dict[str, Any]] = rollout_rows(7, prompts(2), GROUPS, REWARDS, [[1, -1], [0, 0]])
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


def of_tokens(groups: list[Group[Any]], name: str = "advantages") -> list[list[float]]:
    return [pytest.approx(group.tokens[name].tolist(), abs=1e-6) for group in groups]


def test_a_kl_in_the_reward_is_subtracted_from_the_tokens_that_follow() -> None:
    """REINFORCE++ before its normalisation: reward minus the sum of the KL of this and all later tokens."""
    groups = [g.with_tokens(ref_logprobs=g.tokens["rollout_logprobs"] - 0.5) for g in sampled(np.zeros((2, 2)))]
    cfg = GrpoConfig(advantage="greedy", kl_coef=0.1, kl_in="reward", kl_estimator="k1")
    done = with_advantages(groups, np.array([[1.0, 0.0], [2.0, np.nan]]), cfg, np.array([1.0, 0.0]))
    # k1 is 0.5 for each token, the greedy baselines are 1 and 0
    assert of_tokens(done) == [[-0.1, -0.05, -1.15, -1.1, -1.05], [1.95, -0.2, -0.15, -0.1, -0.05]]


def test_batch_advantages_are_whitened_over_tokens_and_invalid_rewards_are_left_out() -> None:
    groups = sampled(np.zeros((2, 2)))  # of 2 + 3 and 1 + 4 tokens
    values = np.array([[1.0, 0.0], [1.0, np.nan]])
    done = with_advantages(groups, values, GrpoConfig(advantage="batch"))
    tokens = np.array([1, 1, 0, 0, 0, 1], dtype=float)
    expected = (tokens - tokens.mean()) / tokens.std()
    assert np.allclose(np.concatenate([g.tokens["advantages"] for g in done]), [*expected, 0, 0, 0, 0])
    assert mean_advantages(done)[0] == pytest.approx([expected[0], expected[2]])
    by_group = with_advantages(groups, values, GrpoConfig(advantage="group_batch"))
    centred = np.array([0.5, 0.5, -0.5, -0.5, -0.5, 0.0])
    expected = (centred - centred.mean()) / centred.std()
    assert np.allclose(np.concatenate([g.tokens["advantages"] for g in by_group]), [*expected, 0, 0, 0, 0])


def test_ppo_learns_returns_from_values_and_leaves_invalid_rewards_out() -> None:
    groups = [g.with_tokens(values=np.full(g.n_tokens, 0.5, np.float32)) for g in sampled(np.zeros((2, 2)))]
    cfg = PpoConfig(whiten=False, lam=0.0, critic_lam=1.0)
    done = with_returns(groups, np.array([[1.0, 0.0], [1.0, np.nan]]), cfg)
    # lambda 0: the next value minus this one, at the last token the reward minus it; lambda 1 for the critic
    assert of_tokens(done) == [[0, 0.5, 0, 0, -0.5], [0.5, 0, 0, 0, 0]]
    assert of_tokens(done, "returns") == [[1, 1, 0, 0, 0], [1, 0.5, 0.5, 0.5, 0.5]]
    whitened = np.concatenate(
        [g.tokens["advantages"] for g in with_returns(groups, np.array([[1.0, 0], [1, 0]]), PpoConfig())]
    )
    assert whitened.mean() == pytest.approx(0, abs=1e-6) and whitened.std() == pytest.approx(1, abs=1e-5)


def test_rewards_change_with_length_and_a_missing_end() -> None:
    cfg = GrpoConfig(missing_eos_penalty=1.0, length_coef=-10.0, overlong_buffer=0.5, overlong_penalty=2.0)
    # of 2, 3, 1 and 4 tokens, the last one cut off; the buffer is the last 2 of 4 tokens
    assert shaped(REWARDS, GROUPS, cfg, 4).tolist() == [
        [3 - 5, 1 - 7.5 - 1],
        [2 - 2.5, pytest.approx(math.nan, nan_ok=True)],
    ]


def test_responses_that_were_cut_off_may_have_no_weight() -> None:
    cut = [[r.finish_reason == "length" for r in group] for group in GROUPS]
    batch = make_minibatch(sampled(np.ones((2, 2))), GrpoConfig(mask_truncated=True), 10, cut)
    assert [g.tokens["weights"].tolist() for g in batch] == [
        pytest.approx([1 / 6] * 5),
        pytest.approx([1 / 6] + [0] * 4),
    ]


@pytest.mark.parametrize(
    ("rule", "own", "shuffled", "bonus", "helps"),
    [
        ("paper", [1, 0, 1, 0], [1, 0], [0.3, 0, 0.3, 0], 1.0),  # as many right as with shuffled frames
        ("paper", [1, 0, 0, 0], [1, 0], [0, 0, 0, 0], 0.0),
        ("code", [1, 0.2, 0.1, 0.3], [1, 0], [0.3, 0.3, 0, 0.3], 1.0),  # 0.4 is 0.8 of 0.5; more than 0.1 is right
        ("code", [1, 0.2, 0.1, 0.2], [1, 0], [0, 0, 0, 0], 0.0),
        ("code", [1, 1], [None, None], [0, 0], math.nan),
    ],
)
def test_temporal_bonus(
    rule: Any, own: list[float], shuffled: list[float | None], bonus: list[float], helps: float
) -> None:
    def rewards(values: list[Any]) -> list[Reward]:
        return [Reward({"a": v}, v, accuracy=v) if v is not None else Reward.invalid("no") for v in values]

    given, found = temporal_bonus(rewards(own), rewards(shuffled), rule, 0.3)
    assert [r.total - v for r, v in zip(given, own, strict=True)] == pytest.approx(bonus)
    assert [r.parts.get("temporal", 0) for r in given] == bonus
    assert found == pytest.approx(helps, nan_ok=True)


def test_staleness_is_a_mean_over_tokens() -> None:
    spans = (WeightSpan(3, 0, 1), WeightSpan(5, 1, 4))
    one = Rollout("s", np.zeros(4, np.int32), np.zeros(4, np.float32), "", "stop", spans)
    assert staleness([[one]], 5) == {"policy/staleness": 0.5, "policy/max_staleness": 2.0}
