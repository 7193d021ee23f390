"""`rlvid grpo`: group relative policy optimisation on videos, after an optional supervised warm start.

DeepSeekMath, arXiv 2402.03300; without the standard deviation: Dr. GRPO, arXiv 2503.20783.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.parity_check import check_parity
from actors.ranks import GroupRef, LogProbs
from actors.roles import Roles
from actors.trainer import TrainerGroup
from jobs.cli import job_main
from jobs.evaluate import evaluate
from jobs.inputs import Inputs, distinct, open_job
from jobs.run import Run
from jobs.specs import JOBS
from jobs.warm_start import warm_start
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import GrpoJobConfig
from rlvid.errors import UserError
from rlvid.reporting import rollout_tables
from rlvid.rollout.engine import Sampling
from rlvid.training.batch import Group
from rlvid.training.grpo_batch import (
    advantages_of,
    make_minibatch,
    rollout_rows,
    sampled_groups,
    summarize,
    with_advantages,
)
from rlvid.training.objectives import Grpo
from rlvid.types import Encoded, Reward, Rollout

N_REPORTED = 8  # prompts of a step whose rollouts the report shows


def run(cfg: GrpoJobConfig) -> dict[str, Any]:
    """Run or resume the job."""
    with open_job(cfg, "grpo") as (run, inputs):
        inputs.require_training_data()
        with Roles(
            inputs.model, cfg, JOBS["grpo"].roles(cfg), run.folder.logs_dir, cfg.seed, run.console.message
        ) as roles:
            roles.trainer.wait_ready()
            start = run.resume(roles.trainer)
            with run.saving_on_error(roles.trainer):
                return train(cfg, run, inputs, roles, start)


def train(cfg: GrpoJobConfig, run: Run, inputs: Inputs, roles: Roles, start: int) -> dict[str, Any]:
    """Run the job from step `start` to its end."""
    begin_training(cfg, run, inputs, roles, start)
    run.console.phase("GRPO", cfg.train.steps, start)
    sampling = Sampling(cfg.grpo.group_size, cfg.rollout.temperature, cfg.rollout.max_tokens)
    for step in run.steps(start, cfg.train.steps):
        begin, done = time.monotonic(), step + 1
        with run.stage("encode"):
            prompts = inputs.prompts.take(cfg.train.batch_size)
        with run.stage("rollout"):
            prompts, groups = inputs.clips.answered(prompts, roles.fleet.generate(prompts, sampling))
        if len(prompts) < cfg.placement.trainer_workers:
            run.console.message(f"step {done} is left out: only {len(prompts)} of its prompts can be used")
            run.checkpoint_if_due(done, roles.trainer)
            continue
        batch = sampled_groups(prompts, groups, cfg.rollout.temperature)
        reference = roles.begin_reference_logprobs(batch) if cfg.grpo.kl_coef else None  # while rewards are computed
        with run.stage("reward"):
            rewards = roles.rewards([p.sample for p in prompts], groups)
            require_valid(rewards)
            advantages = advantages_of(rewards, cfg.grpo)
        with run.stage("train"):
            stats = optimize(cfg, roles.trainer, step, with_advantages(batch, advantages), reference)
        with run.stage("sync"):
            roles.fleet.sync(roles.trainer, done)
        seconds = time.monotonic() - begin
        metrics = summarize(groups, rewards) | stats | inputs.clip_metrics() | roles.fleet.metrics()
        metrics |= run.take_times() | {"time/step": seconds, "samples_per_s": len(prompts) * sampling.n / seconds}
        run.log(done, metrics)
        run.console.step(done, metrics)
        if done % cfg.run.log_rollouts_every == 0 or done == cfg.train.steps:
            log_rollouts(run, inputs, done, prompts, groups, rewards, advantages)
        if done % cfg.evaluate.every == 0 and done < cfg.train.steps:
            evaluate(run, inputs, roles, done)
        run.checkpoint_if_due(done, roles.trainer)
    run.end_if_interrupted()
    run.checkpoint_last(roles.trainer)
    after = evaluate(run, inputs, roles, cfg.train.steps).get("eval/accuracy")
    return run.finish(roles.trainer, {"accuracy_before": run.state.get("accuracy_before"), "accuracy_after": after})


def begin_training(cfg: GrpoJobConfig, run: Run, inputs: Inputs, roles: Roles, start: int) -> None:
    """Warm start, reference, weights of the engines, parity check and first evaluation.

    A resumed run has done the warm start and the evaluation and does not repeat them.
    """
    is_resumed = "accuracy_before" in run.state  # by then the warm start and the evaluation are done
    if not is_resumed:
        warm_start(run, inputs, roles.trainer, cfg.warm_start)
    roles.wait_ready()
    if cfg.grpo.kl_coef:
        roles.freeze_reference(run.folder.dir / "reference", is_resumed)
    roles.fleet.sync(roles.trainer, start)
    run.console.message(str(check_parity(roles.fleet, roles.trainer, inputs.clips, distinct(inputs.train, 16), cfg)))
    if not is_resumed:
        run.state["accuracy_before"] = evaluate(run, inputs, roles, 0).get("eval/accuracy")
        run.checkpoint(0, roles.trainer)


def log_rollouts(
    run: Run,
    inputs: Inputs,
    step: int,
    prompts: Sequence[Encoded],
    groups: Sequence[Sequence[Rollout]],
    rewards: Sequence[Sequence[Reward]],
    advantages: npt.NDArray[np.float32],
) -> None:
    """Write some of the step's rollouts with their frames, for the report."""
    shown = prompts[:N_REPORTED]
    rows = rollout_rows(step, shown, groups[:N_REPORTED], rewards[:N_REPORTED], advantages)
    strips = inputs.clips.strips(distinct([p.sample for p in shown], N_REPORTED))
    rollout_tables.write(run.folder.dir, step, rows, strips)


def optimize(
    cfg: GrpoJobConfig,
    trainer: TrainerGroup,
    step: int,
    batch: Sequence[GroupRef],
    reference: Callable[[], LogProbs] | None = None,
) -> dict[str, float]:
    """`grpo.epochs` passes over the batch, each in `grpo.minibatches` optimizer steps; return their mean metrics.

    Args:
        reference: waits for the log-probs under the reference, where there is a KL term.
    """
    lr = cfg.train.lr * lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
    updates = cfg.grpo.epochs * cfg.grpo.minibatches
    by_trainer = cfg.grpo.old_logprobs == "trainer"
    gap = None
    if by_trainer and updates > 1:  # with a single update, its own forward gives the old log-probs
        old = trainer.logprobs(batch)
        gap = gap_to(batch, old)
        batch = [group.with_tokens(old_logprobs=own) for group, own in zip(batch, old, strict=True)]
    if reference is not None:
        batch = [group.with_tokens(ref_logprobs=own) for group, own in zip(batch, reference(), strict=True)]
    objective = Grpo(cfg.grpo, is_first=by_trainer and updates == 1)
    all_stats: list[dict[str, float]] = []
    most = len(batch) // cfg.placement.trainer_workers  # with bad clips there may be fewer prompts than mini-batches
    for _ in range(cfg.grpo.epochs):
        for part in np.array_split(np.arange(len(batch)), min(cfg.grpo.minibatches, most)):
            minibatch = make_minibatch([batch[i] for i in part], cfg.grpo, keep=cfg.placement.trainer_workers)
            all_stats.append(trainer.step(minibatch, objective, lr))
    mean = {name: float(np.mean([s[name] for s in all_stats])) for name in all_stats[0]}
    metrics = {
        "train/loss": mean["loss"],
        "train/lr": mean["lr"],
        "train/grad_norm": mean["grad_norm"],
        "train/skipped": sum(s["skipped"] for s in all_stats),
        "policy/entropy_trained": mean["entropy"],  # of the groups with a gradient; `policy/entropy` is of all rollouts
        "policy/ratio": mean["ratio"],
        "policy/kl_to_old": mean["kl_to_old"],
        "policy/clip_fraction": mean["clip_low"] + mean["clip_high"],
        # Before the first update both sides have the same weights: a gap is due to rounding, or to a wrong input.
        "policy/logprob_gap": all_stats[0]["logprob_gap"] if gap is None else gap,
    }
    if cfg.grpo.kl_coef > 0:
        metrics["policy/kl"] = mean["kl"]
    return metrics


def gap_to(batch: Sequence[Group[Any]], scored: Sequence[npt.NDArray[np.float32]]) -> float:
    """Mean absolute difference between the log-probs of the engine and those of the trainer."""
    by_engine = np.concatenate([group.tokens["old_logprobs"] for group in batch])
    return float(np.abs(by_engine - np.concatenate(scored)).mean())


def require_valid(rewards: Sequence[Sequence[Reward]]) -> None:
    """Check that the step has a valid reward.

    Raises:
        UserError: all rewards are invalid.
    """
    flat = [reward for group in rewards for reward in group]
    if not any(reward.is_valid for reward in flat):
        raise UserError(
            f"none of the step's {len(flat)} rewards is valid: {flat[0].invalid_reason}; see rewards in the config"
        )


if __name__ == "__main__":
    job_main("grpo")
