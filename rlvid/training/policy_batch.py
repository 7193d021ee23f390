"""From rollouts and rewards to the batch of a policy-gradient step, and to the step's metrics. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from rlvid.algorithms import advantages as adv
from rlvid.algorithms.kl import ESTIMATORS
from rlvid.algorithms.policy_loss import token_weights
from rlvid.config import GrpoConfig, PolicyGradientConfig, PpoConfig
from rlvid.training.batch import Group
from rlvid.types import Encoded, Reward, Rollout

Rollouts = Sequence[Sequence[Rollout]]  # [n, G]
Rewards = Sequence[Sequence[Reward]]  # [n, G]
Floats = npt.NDArray[np.float32]
Floats64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Experience:
    """What one step learns from: answered prompts, and what their answers were worth."""

    prompts: Sequence[Encoded]
    rollouts: Rollouts
    rewards: Rewards
    baselines: Floats64 | None = None  # [n] rewards of the greedy responses, where they are asked for
    metrics: dict[str, float] = field(default_factory=dict)
    cursor: int = 0  # of the data, after the batch was drawn
    reference: Callable[[], Sequence[Floats]] | None = None  # waits for the log-probs under the reference


def totals(rewards: Rewards) -> Floats64:
    """Total rewards [n, G], nan where invalid."""
    return np.array([[r.total if r.is_valid else np.nan for r in group] for group in rewards])


def shaped(rewards: Rewards, rollouts: Rollouts, cfg: PolicyGradientConfig, max_tokens: int) -> Floats64:
    """Total rewards [n, G] with what the config adds for length and a missing end."""
    lengths = np.array([[len(r.token_ids) for r in group] for group in rollouts], dtype=np.float64)
    is_cut = np.array([[r.finish_reason == "length" for r in group] for group in rollouts])
    values = totals(rewards) - cfg.missing_eos_penalty * is_cut + cfg.length_coef * lengths / max_tokens
    if cfg.overlong_buffer:
        buffer = cfg.overlong_buffer * max_tokens
        over = np.clip((lengths - (max_tokens - buffer)) / buffer, 0.0, 1.0)
        values = values - cfg.overlong_penalty * over
    return values


def temporal_bonus(
    rewards: Sequence[Reward], shuffled: Sequence[Reward], rule: Literal["code", "paper"], bonus: float
) -> tuple[list[Reward], float]:
    """Rewards of a group with T-GRPO's bonus (Video-R1, arXiv 2503.21776, eq. 1 and 2).

    "paper": right responses get the bonus where the share of right responses is at least that of the group which
    answered from shuffled frames. "code": where the mean accuracy is at least 0.8 of that group's, responses with an
    accuracy above 0.1 get it (src/r1-v/src/open_r1/trainer/grpo_trainer.py of the authors' repository).

    Returns:
        The rewards, with the bonus as part "temporal" where it applies, and whether the order of the frames helped: 1,
        0, or nan where one group has no valid reward with an accuracy.
    """
    own, other = ([r.accuracy for r in group if r.is_valid and r.accuracy is not None] for group in (rewards, shuffled))
    if not own or not other:
        return list(rewards), float("nan")
    factor, least = (0.8, 0.1) if rule == "code" else (1.0, np.nextafter(1.0, 0.0))
    if np.mean(own) < factor * np.mean(other):
        return list(rewards), 0.0
    return [
        replace(r, parts={**r.parts, "temporal": bonus}, total=r.total + bonus)
        if r.is_valid and r.accuracy is not None and r.accuracy > least
        else r
        for r in rewards
    ], 1.0


def sampled_group(prompt: Encoded, rollouts: Sequence[Rollout], temperature: float) -> Group[Any]:
    """The rollouts of one prompt as a group without arrays: enough to compute log-probs."""
    ids = tuple(r.token_ids for r in rollouts)
    return Group(prompt.prompt, prompt.cost, ids, temperature=temperature)


def sampled_groups(prompts: Sequence[Encoded], rollouts: Rollouts, temperature: float) -> list[Group[Any]]:
    """The groups of a step, with the log-probs at which the engine sampled them."""
    return [
        sampled_group(prompt, own, temperature).with_tokens(rollout_logprobs=np.concatenate([r.logprobs for r in own]))
        for prompt, own in zip(prompts, rollouts, strict=True)
    ]


def response_advantages(values: Floats64, cfg: GrpoConfig, baselines: Floats64 | None = None) -> Floats:
    """Advantages [n, G] of whole responses, from their rewards, before any normalisation over the batch. nan where a
    reward is invalid and the batch is normalised later."""
    if cfg.advantage == "leave_one_out":
        return adv.leave_one_out(values, cfg.normalise_std)
    if cfg.advantage == "greedy":
        assert baselines is not None
        return adv.relative_to(values, baselines)
    if cfg.advantage == "group_batch":
        centred = adv.group_advantages(values, normalise_std=False)
        return np.where(np.isnan(values), np.nan, centred).astype(np.float32)
    if cfg.advantage == "batch":
        return values.astype(np.float32)
    return adv.group_advantages(values, cfg.normalise_std)


def with_advantages(
    groups: Sequence[Group[Any]],
    values: Floats64,
    cfg: GrpoConfig,
    baselines: Floats64 | None = None,
) -> list[Group[Any]]:
    """The groups with the advantages of their tokens.

    Args:
        groups: with `ref_logprobs` where the KL divergence is part of the reward.
        values: total rewards [n, G], nan where invalid.
        baselines: [n], for advantage=greedy.
    """
    of_response = response_advantages(values, cfg, baselines)
    tokens = [np.repeat(own, _lengths(group)) for group, own in zip(groups, of_response, strict=True)]
    if cfg.kl_in == "reward" and cfg.kl_coef:
        tokens = [
            a - cfg.kl_coef * _each(group, adv.returns_to_go, _kl(group, cfg))
            for group, a in zip(groups, tokens, strict=True)
        ]
    if cfg.advantage in ("batch", "group_batch"):
        tokens = adv.whitened(tokens)
    return [
        group.with_tokens(advantages=np.nan_to_num(a, nan=0.0).astype(np.float32))
        for group, a in zip(groups, tokens, strict=True)
    ]


def with_returns(groups: Sequence[Group[Any]], values: Floats64, cfg: PpoConfig) -> list[Group[Any]]:
    """The groups with the advantages and returns of their tokens, from the critic's `values` and the rewards.

    A response without a valid reward has advantage 0, and its returns are the predicted values.
    """
    rewards = [_token_rewards(group, own, cfg) for group, own in zip(groups, values, strict=True)]
    if cfg.whiten_rewards:
        rewards = adv.whitened(rewards, shift=False)

    def estimates(lam: float) -> list[Floats]:
        one = partial(adv.gae, gamma=cfg.gamma, lam=lam)
        return [_each(group, one, r, group.tokens["values"]) for group, r in zip(groups, rewards, strict=True)]

    advantages = estimates(cfg.lam)
    of_critic = advantages if cfg.critic_lam is None else estimates(cfg.critic_lam)
    returns = [group.tokens["values"] + np.nan_to_num(a, nan=0.0) for group, a in zip(groups, of_critic, strict=True)]
    advantages = [np.nan_to_num(a, nan=0.0) for a in (adv.whitened(advantages) if cfg.whiten else advantages)]
    return [group.with_tokens(advantages=a, returns=r) for group, a, r in zip(groups, advantages, returns, strict=True)]


def _lengths(group: Group[Any]) -> list[int]:
    return [len(ids) for ids in group.responses]


def _each(group: Group[Any], function: Callable[..., Floats], *arrays: Floats) -> Floats:
    """`function` of each response's part of arrays [sum R], as one array again."""
    ends = np.cumsum(_lengths(group))[:-1]
    return np.concatenate([function(*parts) for parts in zip(*(np.split(a, ends) for a in arrays), strict=True)])


def mean_kl(groups: Sequence[Group[Any]], cfg: PolicyGradientConfig) -> float:
    """The mean over the tokens of the estimated KL divergence to the reference, before the update."""
    return float(np.concatenate([_kl(group, cfg) for group in groups]).mean())


def _kl(group: Group[Any], cfg: PolicyGradientConfig) -> Floats:
    """Estimated KL divergence [sum R] of the policy that sampled the tokens, or scored them, to the reference."""
    old = group.tokens.get("old_logprobs", group.tokens["rollout_logprobs"])
    estimate = ESTIMATORS[cfg.kl_estimator](torch.from_numpy(old), torch.from_numpy(group.tokens["ref_logprobs"]))
    return np.asarray(estimate.numpy(), dtype=np.float32)


def _token_rewards(group: Group[Any], values: Floats64, cfg: PolicyGradientConfig) -> Floats:
    """Rewards [sum R]: that of a response at its last token, minus the KL divergence of each if it is part of it."""
    rewards = np.zeros(group.n_tokens, dtype=np.float32)
    if cfg.kl_in == "reward" and cfg.kl_coef:
        rewards -= cfg.kl_coef * _kl(group, cfg)
    rewards[np.cumsum(_lengths(group)) - 1] += values.astype(np.float32)
    return np.where(np.repeat(np.isnan(values), _lengths(group)), np.nan, rewards).astype(np.float32)


def mean_advantages(groups: Sequence[Group[Any]]) -> list[list[float]]:
    """The mean advantage of each response's tokens [n, G]."""
    return [
        [float(a.mean()) for a in np.split(group.tokens["advantages"], np.cumsum(_lengths(group))[:-1])]
        for group in groups
    ]


def make_minibatch(
    groups: Sequence[Group[Any]],
    cfg: PolicyGradientConfig,
    max_tokens: int,
    truncated: Sequence[Sequence[bool]] = (),
    keep: int = 1,
) -> list[Group[Any]]:
    """The groups of one optimizer step, with the weights of their tokens.

    A group without advantages, without returns and without a KL term has no gradient. It is left out, while its tokens
    still count in the average, so the step is exactly the same.

    Args:
        truncated: whether each response was cut off; those have no weight with `mask_truncated`.
        keep: leave at least this many groups (one per trainer rank).
    """
    lengths = np.array([len(ids) for group in groups for ids in group.responses])
    cut = np.array([c for group in truncated for c in group]) if cfg.mask_truncated else np.zeros(len(lengths), bool)
    counted = np.where(cut, 0, lengths)
    weights = np.repeat(token_weights(counted, cfg.loss_average, max_tokens), lengths)
    shares = np.split(weights, np.cumsum([group.n_tokens for group in groups])[:-1])
    weighted = [group.with_tokens(weights=share) for group, share in zip(groups, shares, strict=True)]
    always = cfg.kl_coef > 0 and cfg.kl_in == "loss"
    has_gradient = [always or "returns" in g.tokens or bool(g.tokens["advantages"].any()) for g in weighted]
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
        "groups/samples": float(len(rollouts)),
        "groups/invalid_rewards": float(len(flat) - len(valid)),
        "response/length": float(np.mean([len(r.token_ids) for r in responses])),
        "response/cut_off": float(np.mean([r.finish_reason == "length" for r in responses])),
        # -log p of sampled tokens is an unbiased estimate of the entropy, over all groups, those without gradient too
        "policy/entropy": float(-np.concatenate([r.logprobs for r in responses]).mean()),
        "groups/zero_variance": adv.zero_variance_share(total),
    }
    for name in dict.fromkeys(name for r in valid for name in r.parts):
        metrics[f"reward/{name}"] = float(np.mean([r.parts[name] for r in valid if name in r.parts]))
    if verdicts := [r.is_right for r in valid if r.is_right is not None]:
        metrics["train/accuracy"] = float(np.mean(verdicts))
    return metrics


def staleness(rollouts: Rollouts, version: int) -> dict[str, float]:
    """How many updates old the weights were that sampled the tokens, when weights `version` were trained on them."""
    spans = [span for group in rollouts for rollout in group for span in rollout.versions]
    ages, counts = [version - span.version for span in spans], [span.end - span.start for span in spans]
    return {"policy/staleness": float(np.average(ages, weights=counts)), "policy/max_staleness": float(max(ages))}


def rollout_rows(
    step: int,
    prompts: Sequence[Encoded],
    rollouts: Rollouts,
    rewards: Rewards,
    advantages: Sequence[Sequence[float]],
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
            "advantage": advantages[i][j],
            "n_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_versions": json.dumps([[v.version, v.start, v.end] for v in rollout.versions]),
            "logprob_mean": float(rollout.logprobs.mean()),
        }
        for i, (prompt, group, group_rewards) in enumerate(zip(prompts, rollouts, rewards, strict=True))
        for j, (rollout, reward) in enumerate(zip(group, group_rewards, strict=True))
    ]
