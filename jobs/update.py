"""The update of a step: from its experience to optimizer steps of the policy, and of the critic if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.ranks import GroupRef
from actors.trainer import LOGPROBS, VALUES, TrainerGroup
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import GrpoConfig, PolicyGradientJobConfig, PpoConfig
from rlvid.training.objectives import ActorCritic, PolicyGradient, Values
from rlvid.training.policy_batch import (
    Experience,
    Floats64,
    make_minibatch,
    mean_kl,
    sampled_groups,
    shaped,
    with_advantages,
    with_returns,
)

Stats = dict[str, float]


class Update:
    """`epochs` passes over a batch, each in `minibatches` optimizer steps. GRPO and PPO differ in three methods."""

    def __init__(self, cfg: PolicyGradientJobConfig, trainer: TrainerGroup):
        self._cfg, self._trainer, self._algorithm = cfg, trainer, cfg.policy_gradient
        by_trainer = self._algorithm.old_logprobs == "trainer"
        # With a single update, its own forward gives the old log-probs.
        is_scored = by_trainer and (self._algorithm.epochs * self._algorithm.minibatches > 1 or cfg.critic == "shared")
        self._scored: tuple[str, ...] = (LOGPROBS,) * is_scored + (VALUES,) * (cfg.critic is not None)
        self.policy = PolicyGradient(self._algorithm, "trainer" if is_scored else "own" if by_trainer else "rollout")

    def __call__(self, step: int, experience: Experience) -> tuple[list[GroupRef], Stats]:
        """Update the trainer.

        Returns:
            The groups with the arrays that they were trained on, and the mean metrics of the updates.
        """
        cfg, algorithm = self._cfg, self._algorithm
        groups = sampled_groups(experience.prompts, experience.rollouts, cfg.rollout.temperature)
        if self._scored:
            groups = self._trainer.scored(groups, *self._scored)
        if experience.reference is not None:
            found = experience.reference()
            groups = [group.with_tokens(ref_logprobs=own) for group, own in zip(groups, found, strict=True)]
        values = shaped(experience.rewards, experience.rollouts, algorithm, cfg.rollout.max_tokens)
        groups = self.with_advantages(groups, values, experience)
        truncated = [[r.finish_reason == "length" for r in group] for group in experience.rollouts]
        factor = lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
        n_ranks = cfg.placement.trainer_workers
        n_parts = min(algorithm.minibatches, len(groups) // n_ranks)  # bad clips may leave fewer prompts than parts
        all_stats = []
        for _ in range(algorithm.epochs):
            for part in np.array_split(np.arange(len(groups)), n_parts):
                own = [groups[i] for i in part], algorithm, cfg.rollout.max_tokens, [truncated[i] for i in part]
                all_stats.append(self.step(step, make_minibatch(*own, keep=n_ranks), factor))
        stats = {name: float(np.mean([s[name] for s in all_stats if name in s])) for s in all_stats for name in s}
        skipped = sum(s["skipped"] for s in all_stats)
        kl = {"policy/kl": mean_kl(groups, algorithm)} if algorithm.kl_in == "reward" and algorithm.kl_coef else {}
        return groups, {**self.metrics(stats), "train/skipped": skipped} | kl | self._gap(groups, all_stats)

    def with_advantages(self, groups: Sequence[GroupRef], values: Floats64, experience: Experience) -> list[GroupRef]:
        raise NotImplementedError

    def step(self, step: int, minibatch: Sequence[GroupRef], factor: float) -> Stats:
        """One optimizer step; the learning rates are multiplied by `factor`."""
        return self._trainer.step(minibatch, self.policy, self._cfg.train.lr * factor)

    def metrics(self, stats: Stats) -> Stats:
        """Metrics by their names in the report."""
        if "ratio" not in stats:  # the critic alone was trained
            return {}
        metrics = {
            "train/loss": stats["loss"],
            "train/lr": stats["lr"],
            "train/grad_norm": stats["grad_norm"],
            "policy/entropy_trained": stats["entropy"],  # of groups with a gradient; `policy/entropy` is of all
            "policy/ratio": stats["ratio"],
            "policy/kl_to_old": stats["kl_to_old"],
            "policy/clip_fraction": stats["clip_low"] + stats["clip_high"],
        }
        renamed = {"kl": "policy/kl", "correction": "policy/correction"}
        return metrics | {name: stats[key] for key, name in renamed.items() if key in stats}

    def _gap(self, groups: Sequence[GroupRef], all_stats: Sequence[Stats]) -> Stats:
        """Mean distance of the trainer's log-probs to the engine's, before the first update.

        Both sides have the same weights then, without `async_steps`: a gap is due to rounding, or to a wrong input.
        """
        if LOGPROBS in self._scored:
            engine, trainer = (
                np.concatenate([g.tokens[name] for g in groups]) for name in ("rollout_logprobs", LOGPROBS)
            )
            return {"policy/logprob_gap": float(np.abs(engine - trainer).mean())}
        return {"policy/logprob_gap": all_stats[0]["logprob_gap"]} if "logprob_gap" in all_stats[0] else {}


class GrpoUpdate(Update):
    """Advantages from the rewards of a group, or of the batch."""

    def with_advantages(self, groups: Sequence[GroupRef], values: Floats64, experience: Experience) -> list[GroupRef]:
        assert isinstance(self._algorithm, GrpoConfig)
        return with_advantages(groups, values, self._algorithm, experience.baselines)


class PpoUpdate(Update):
    """Advantages from rewards and a critic's values, which are trained too."""

    def __init__(self, cfg: Any, trainer: TrainerGroup):
        super().__init__(cfg, trainer)
        self._ppo: PpoConfig = cfg.ppo
        self._values = Values(self._ppo.value_clip)

    def with_advantages(self, groups: Sequence[GroupRef], values: Floats64, experience: Experience) -> list[GroupRef]:
        return with_returns(groups, values, self._ppo)

    def step(self, step: int, minibatch: Sequence[GroupRef], factor: float) -> Stats:
        lr, critic_lr = self._cfg.train.lr * factor, (self._ppo.critic_lr or self._cfg.train.lr) * factor
        if self._ppo.critic == "shared":
            both = ActorCritic(self.policy, self._values, self._ppo.value_coef)
            return self._trainer.step(minibatch, both, lr, critic_lr)
        critic = self._trainer.critic_step(minibatch, self._values, critic_lr)
        if step < self._ppo.critic_steps:
            return critic
        kept = {name: value for name, value in critic.items() if name not in ("loss", "lr", "grad_norm", "entropy")}
        policy = self._trainer.step(minibatch, self.policy, lr)
        return kept | policy | {"skipped": critic["skipped"] + policy["skipped"]}

    def metrics(self, stats: Stats) -> Stats:
        variance = stats["return_squared"] - stats["return"] ** 2
        error = stats["value_error_squared"] - stats["value_error"] ** 2
        return super().metrics(stats) | {
            "critic/loss": stats["value_loss"],
            "critic/clip_fraction": stats["value_clipped"],
            "critic/return": stats["return"],
            "critic/explained_variance": 1 - error / variance if variance > 1e-12 else 0.0,
        }


class RolloutsOnly(Update):
    """No update: for runs that only generate and score."""

    def __call__(self, step: int, experience: Experience) -> tuple[list[GroupRef], Stats]:
        groups = sampled_groups(experience.prompts, experience.rollouts, self._cfg.rollout.temperature)
        return [group.with_tokens(advantages=np.zeros(group.n_tokens, np.float32)) for group in groups], {}


UPDATES: dict[str, type[Update]] = {"grpo": GrpoUpdate, "ppo": PpoUpdate}
"""By job."""
