"""From rollouts and rewards to the batch of a GRPO step, and to the step's metrics. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlvid.algorithms.advantages import group_advantages, zero_variance_share
from rlvid.algorithms.policy_loss import token_weights
from rlvid.config import GrpoConfig
from rlvid.training.batch import Group
from rlvid.types import Encoded, Reward, Rollout

Rollouts = Sequence[Sequence[Rollout]]  # [n, G]
Rewards = Sequence[Sequence[Reward]]  # [n, G]


def advantages_of(rewards: Rewards, cfg: GrpoConfig) -> npt.NDArray[np.float32]:
    """Advantages [n, G]; that of an invalid reward is 0, and it is left out of its group's mean and std."""
    return group_advantages(totals(rewards), cfg.normalise_std)


def totals(rewards: Rewards) -> npt.NDArray[np.float64]:
    """Total rewards [n, G], nan where invalid."""
    return np.array([[r.total if r.is_valid else np.nan for r in group] for group in rewards])


def sampled_group(prompt: Encoded, rollouts: Sequence[Rollout], temperature: float) -> Group[Any]:
    """The rollouts of one prompt as a group without arrays: enough to compute log-probs."""
    ids = tuple(r.token_ids for r in rollouts)
    return Group(prompt.prompt, prompt.cost, ids, temperature=temperature)


def sampled_groups(prompts: Sequence[Encoded], rollouts: Rollouts, temperature: float) -> list[Group[Any]]:
    """The groups of a step, with the log-probs at which the engine sampled them."""
    return [
        sampled_group(prompt, own, temperature).with_tokens(old_logprobs=np.concatenate([r.logprobs for r in own]))
        for prompt, own in zip(prompts, rollouts, strict=True)
    ]


def with_advantages(groups: Sequence[Group[Any]], advantages: npt.NDArray[np.float32]) -> list[Group[Any]]:
    """The groups with the advantages [n, G] of their responses, for each token."""
    return [
        group.with_tokens(advantages=np.repeat(own, [len(ids) for ids in group.responses]).astype(np.float32))
        for group, own in zip(groups, advantages, strict=True)
    ]


def make_minibatch(groups: Sequence[Group[Any]], cfg: GrpoConfig, keep: int = 1) -> list[Group[Any]]:
    """The groups of one optimizer step, with the weights of their tokens.

    A group without advantages and without a KL term has no gradient. It is left out, while its tokens still count in
    the average, so the step is exactly the same.

    Args:
        keep: leave at least this many groups (one per trainer rank).
    """
    lengths = [len(ids) for group in groups for ids in group.responses]
    weights = np.repeat(token_weights(lengths, cfg.loss_average), lengths)
    shares = np.split(weights, np.cumsum([group.n_tokens for group in groups])[:-1])
    weighted = [group.with_tokens(weights=share) for group, share in zip(groups, shares, strict=True)]
    has_gradient = [cfg.kl_coef > 0 or bool(group.tokens["advantages"].any()) for group in weighted]
    first = np.argsort(np.logical_not(has_gradient), kind="stable")  # those with a gradient
    return [weighted[i] for i in first[: max(keep, sum(has_gradient))]]


def summarize(rollouts: Rollouts, rewards: Rewards) -> dict[str, float]:
    """The rollouts' side of a step's metrics: means over valid rewards, response lengths, groups without gradient."""
    flat = [r for group in rewards for r in group]
    valid = [r for r in flat if r.is_valid]
    responses = [r for group in rollouts for r in group]
    total = totals(rewards)
    metrics = {
        "reward/mean": float(np.nanmean(total)) if valid else float("nan"),
        "groups/invalid_rewards": float(len(flat) - len(valid)),
        "response/length": float(np.mean([len(r.token_ids) for r in responses])),
        "response/cut_off": float(np.mean([r.finish_reason == "length" for r in responses])),
        # -log p of sampled tokens is an unbiased estimate of the entropy, over all groups, those without gradient too
        "policy/entropy": float(-np.concatenate([r.logprobs for r in responses]).mean()),
        "groups/zero_variance": zero_variance_share(total),
    }
    for name in dict.fromkeys(name for r in valid for name in r.parts):
        metrics[f"reward/{name}"] = float(np.mean([r.parts[name] for r in valid if name in r.parts]))
    if verdicts := [r.is_right for r in valid if r.is_right is not None]:
        metrics["train/accuracy"] = float(np.mean(verdicts))
    return metrics


def rollout_rows(
    step: int,
    prompts: Sequence[Encoded],
    rollouts: Rollouts,
    rewards: Rewards,
    advantages: npt.NDArray[np.float32],
) -> list[dict[str, Any]]:
    """Rows of the rollout table (columns: rlvid/reporting/rollout_tables.py)."""
    return [
        {
            "step": step,
            "sample_id": prompt.sample.id,
            "group_index": j,
            "question": prompt.sample.question,
            "answer": prompt.sample.answer,
            "response": rollout.text,
            "reward_total": reward.total if reward.is_valid else None,
            "reward_parts": json.dumps(dict(reward.parts)),
            "invalid_reason": reward.invalid_reason,
            "advantage": float(advantages[i, j]),
            "n_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_versions": json.dumps([[v.version, v.start, v.end] for v in rollout.versions]),
            "logprob_mean": float(rollout.logprobs.mean()),
        }
        for i, (prompt, group, group_rewards) in enumerate(zip(prompts, rollouts, rewards, strict=True))
        for j, (rollout, reward) in enumerate(zip(group, group_rewards, strict=True))
    ]
