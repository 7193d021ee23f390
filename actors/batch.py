"""From rollouts and rewards to what the trainer learns, and to the numbers of a step. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.clip_store import Encoded
from actors.trainer import GroupRef
from rlvid.algorithms.advantages import group_advantages, zero_variance_share
from rlvid.algorithms.policy_loss import token_weights
from rlvid.config import GrpoConfig, RewardPartConfig
from rlvid.training.packing import Responses
from rlvid.types import Reward, Rollout

ACCURACY_KINDS = ("exact", "choice", "number")

Groups = Sequence[Sequence[Rollout]]
Marks = Sequence[Sequence[Reward]]


def advantages_of(marks: Marks, cfg: GrpoConfig) -> npt.NDArray[np.float32]:
    """Advantages [n, G]; an invalid reward has 0 and takes no part in its group's mean and std."""
    return group_advantages(totals(marks), cfg.normalise_std)


def totals(marks: Marks) -> npt.NDArray[np.float64]:
    """Total rewards [n, G], nan where invalid."""
    return np.array([[m.total if m.is_valid else np.nan for m in group] for group in marks])


def make_minibatch(
    prompts: Sequence[Encoded],
    groups: Groups,
    advantages: npt.NDArray[np.float32],
    cfg: GrpoConfig,
    old: Sequence[npt.NDArray[np.float32]] | None = None,
    reference: Sequence[npt.NDArray[np.float32]] | None = None,
    keep: int = 1,
) -> list[GroupRef]:
    """The groups of one optimizer step.

    A group without advantages and without a KL term has no gradient: it is left out, while its tokens still count in
    the average, so the step is exactly the same.

    Args:
        advantages: [n, G].
        old: [sum R] per group, log-probs the ratio is taken to; by default the rollouts' own.
        reference: [sum R] per group.
        keep: leave at least so many groups (one per trainer rank).
    """
    lengths = [[len(r.token_ids) for r in rollouts] for rollouts in groups]
    weights = iter(token_weights([n for group in lengths for n in group], cfg.loss_average).tolist())
    batch: list[GroupRef] = []
    silent: list[GroupRef] = []
    for i, (prompt, rollouts, counts) in enumerate(zip(prompts, groups, lengths, strict=True)):
        responses = Responses(
            token_ids=tuple(r.token_ids for r in rollouts),
            weights=np.repeat([next(weights) for _ in counts], counts).astype(np.float32),
            advantages=np.repeat(advantages[i], counts).astype(np.float32),
            old_logprobs=np.concatenate([r.logprobs for r in rollouts]) if old is None else old[i],
            ref_logprobs=None if reference is None else reference[i],
        )
        learns = advantages[i].any() or cfg.kl_coef > 0
        (batch if learns else silent).append(GroupRef(prompt.prompt, prompt.cost, responses))
    return batch + silent[: max(0, keep - len(batch))]


def accuracy_part(parts: Sequence[RewardPartConfig]) -> str | None:
    """Name of the first reward part that says whether the answer is right."""
    return next((p.name or p.kind for p in parts if p.kind in ACCURACY_KINDS), None)


def summarize(groups: Groups, marks: Marks, parts: Sequence[RewardPartConfig]) -> dict[str, float]:
    """The rollouts' side of a step's metrics: means over valid rewards, response lengths, dead groups."""
    flat = [m for group in marks for m in group]
    valid = [m for m in flat if m.is_valid]
    rollouts = [r for group in groups for r in group]
    rewards = totals(marks)
    metrics = {
        "reward/mean": float(np.nanmean(rewards)) if valid else float("nan"),
        "groups/invalid_rewards": float(len(flat) - len(valid)),
        "response/length": float(np.mean([len(r.token_ids) for r in rollouts])),
        "response/cut_off": float(np.mean([r.finish_reason == "length" for r in rollouts])),
        # -log p of sampled tokens is an unbiased estimate of the entropy, over all groups, the silent ones too
        "policy/entropy": float(-np.concatenate([r.logprobs for r in rollouts]).mean()),
        "groups/zero_variance": zero_variance_share(rewards),
    }
    for part in parts:
        name = part.name or part.kind
        metrics[f"reward/{name}"] = float(np.mean([m.parts[name] for m in valid])) if valid else float("nan")
    if (right := accuracy_part(parts)) is not None:
        metrics["train/accuracy"] = float(np.mean([m.parts[right] == 1.0 for m in valid])) if valid else float("nan")
    return metrics


def rollout_rows(
    step: int, prompts: Sequence[Encoded], groups: Groups, marks: Marks, advantages: npt.NDArray[np.float32]
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
            "reward_total": mark.total if mark.is_valid else None,
            "reward_parts": json.dumps(dict(mark.parts)),
            "invalid_reason": mark.invalid_reason,
            "advantage": float(advantages[i, j]),
            "n_tokens": len(rollout.token_ids),
            "finish_reason": rollout.finish_reason,
            "weight_versions": json.dumps([[v.version, v.start, v.end] for v in rollout.versions]),
            "logprob_mean": float(rollout.logprobs.mean()),
        }
        for i, (prompt, rollouts, group) in enumerate(zip(prompts, groups, marks, strict=True))
        for j, (rollout, mark) in enumerate(zip(rollouts, group, strict=True))
    ]
