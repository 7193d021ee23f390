"""`rlvid grpo`: group relative policy optimisation on videos, after an optional supervised warm start.

DeepSeekMath, arXiv 2402.03300; without the standard deviation: Dr. GRPO, arXiv 2503.20783.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from actors.batch import accuracy_part, advantages_of, make_minibatch, rollout_rows, summarize
from actors.clip_store import Encoded
from actors.parity_check import check_parity, group_of
from actors.placement import roles_of
from actors.rewards import check_parts
from actors.roles import Team
from jobs.cli import job_main
from jobs.evaluate import NO_ACCURACY_PART, evaluate
from jobs.session import WARM_START_STEP, Session, distinct
from jobs.sft import warm_start
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import GrpoJobConfig
from rlvid.errors import UserError
from rlvid.reporting.tracker import Tracker
from rlvid.rollout.vllm_engine import Sampling
from rlvid.training.objectives import Grpo
from rlvid.types import Reward, Rollout

N_REPORTED = 8  # prompts of a step whose rollouts the report shows


def run(cfg: GrpoJobConfig) -> dict[str, Any]:
    """Run or take up the job; returns what the last line of stdout says."""
    with Session(cfg, "grpo") as session:
        session.require_training_data()
        check_parts(cfg.rewards)  # a wrong configuration is an error before anything starts
        if session.held_out and accuracy_part(cfg.rewards) is None:
            raise UserError(NO_ACCURACY_PART)
        with Team(session.model, cfg, roles_of(cfg), session.folder.logs_dir, cfg.seed) as team:
            return train(cfg, session, team)


def train(cfg: GrpoJobConfig, session: Session, team: Team) -> dict[str, Any]:
    team.trainer.wait_ready()
    start = session.resume(team)
    tracker = session.open_tracker()
    has_begun = "accuracy_before" in session.state  # the warm start is done, the first evaluation too
    if not has_begun:
        warm_start(session, team, tracker, cfg.warm_start)
        if session.interrupted:
            return session.finish(team, {})
    team.wait_ready()
    if cfg.grpo.kl_coef:
        team.freeze_reference(session.folder.dir / "reference.safetensors", has_begun)
    team.fleet.sync(team.trainer, start)
    probed = distinct(session.train, 16)
    gap = check_parity(team.fleet, team.trainer, session.clips, probed, cfg)
    sees = " and see the video" if any(s.videos for s in probed) else ""
    session.console.message(f"parity: engine and trainer agree within {gap:.1e}{sees}")
    if not has_begun:
        session.state.pop(WARM_START_STEP, None)
        session.state["accuracy_before"] = evaluation(session, team, tracker, 0).get("eval/accuracy")
        session.checkpoint(0, team)

    session.console.phase("GRPO", cfg.train.steps, start)
    sampling = Sampling(cfg.grpo.group_size, cfg.rollout.temperature, cfg.rollout.max_tokens)
    offset = cfg.warm_start.steps * cfg.warm_start.batch_size  # go on in the data where the warm start ended
    for step in session.steps(start, cfg.train.steps):
        begin = time.monotonic()
        with session.stage("encode"):
            prompts = session.next_batch(step, cfg.train.batch_size, offset)
        if len(prompts) < cfg.placement.trainer_workers:
            session.console.message(f"step {step + 1} is left out: {len(prompts)} of its prompts have readable clips")
            session.checkpoint_if_due(step + 1, team)
            continue
        with session.stage("rollout"):
            groups = team.fleet.generate(prompts, sampling)
        with session.stage("reward"):
            marks = team.rewards([p.sample for p in prompts], groups)
            refuse_all_invalid(marks)
            advantages = advantages_of(marks, cfg.grpo)
        with session.stage("train"):
            stats = optimize(cfg, team, step, prompts, groups, advantages)
        with session.stage("sync"):
            team.fleet.sync(team.trainer, step + 1)
        seconds = time.monotonic() - begin
        metrics = summarize(groups, marks, cfg.rewards) | stats | session.clip_metrics() | team.fleet.metrics()
        metrics |= session.take_times() | {"time/step": seconds, "samples_per_s": len(prompts) * sampling.n / seconds}
        done = step + 1
        tracker.log(done, metrics)
        session.console.step(done, metrics)
        if done % cfg.run.log_rollouts_every == 0 or done == cfg.train.steps:
            shown = prompts[:N_REPORTED]
            rows = rollout_rows(done, shown, groups[:N_REPORTED], marks[:N_REPORTED], advantages)
            session.folder.write_rollouts(
                done, rows, session.clips.strips(distinct([p.sample for p in shown], N_REPORTED))
            )
        if done % cfg.evaluate.every == 0 and done < cfg.train.steps:
            evaluation(session, team, tracker, done)
        session.checkpoint_if_due(done, team)
    session.checkpoint_last(team)
    after = None if session.interrupted else evaluation(session, team, tracker, cfg.train.steps).get("eval/accuracy")
    return session.finish(team, {"accuracy_before": session.state.get("accuracy_before"), "accuracy_after": after})


def optimize(
    cfg: GrpoJobConfig,
    team: Team,
    step: int,
    prompts: Sequence[Encoded],
    groups: Sequence[Sequence[Rollout]],
    advantages: npt.NDArray[np.float32],
) -> dict[str, float]:
    """`grpo.epochs` passes over the batch, each in `grpo.minibatches` optimizer steps; means of their statistics."""
    lr = cfg.train.lr * lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
    updates = cfg.grpo.epochs * cfg.grpo.minibatches
    by_trainer = cfg.grpo.old_logprobs == "trainer"
    # With a single update the trainer's log-probs before it are those of the update's own forward.
    scores_old, scores_reference = by_trainer and updates > 1, cfg.grpo.kl_coef > 0
    scored = []
    if scores_old or scores_reference:
        scored = [group_of(p, rollouts) for p, rollouts in zip(prompts, groups, strict=True)]
    old = team.trainer.logprobs(scored) if scores_old else None
    reference = team.reference_logprobs(scored) if scores_reference else None
    objective = Grpo(cfg.grpo, is_first=by_trainer and updates == 1)
    all_stats: list[dict[str, float]] = []
    most = len(prompts) // cfg.placement.trainer_workers  # bad clips may leave fewer prompts than mini-batches
    for _ in range(cfg.grpo.epochs):
        for part in np.array_split(np.arange(len(prompts)), min(cfg.grpo.minibatches, most)):
            cut = slice(int(part[0]), int(part[-1]) + 1)
            minibatch = make_minibatch(
                prompts[cut],
                groups[cut],
                advantages[cut],
                cfg.grpo,
                old and old[cut],
                reference and reference[cut],
                keep=cfg.placement.trainer_workers,
            )
            all_stats.append(team.trainer.step(minibatch, objective, lr))
    mean = {name: float(np.mean([s[name] for s in all_stats])) for name in all_stats[0]}
    metrics = {
        "train/loss": mean["loss"],
        "train/lr": mean["lr"],
        "train/grad_norm": mean["grad_norm"],
        "policy/entropy_trained": mean["entropy"],  # of the groups that train; `policy/entropy` is of all rollouts
        "policy/ratio": mean["ratio"],
        "policy/kl_to_old": mean["kl_to_old"],
        "policy/clip_fraction": mean["clip_low"] + mean["clip_high"],
        # Before the first update both sides hold the same weights: what differs is arithmetic, or a wrong input.
        "policy/logprob_gap": all_stats[0]["logprob_gap"] if old is None else gap_to(groups, old),
    }
    if reference is not None:
        metrics["policy/kl"] = mean["kl"]
    return metrics


def gap_to(groups: Sequence[Sequence[Rollout]], scored: Sequence[npt.NDArray[np.float32]]) -> float:
    """Mean difference of log-probs between the rollouts and the trainer that scored them."""
    by_engine = np.concatenate([r.logprobs for rollouts in groups for r in rollouts])
    return float(np.abs(by_engine - np.concatenate(scored)).mean())


def refuse_all_invalid(marks: Sequence[Sequence[Reward]]) -> None:
    """A step without a single valid reward teaches nothing: stop and say why.

    Raises:
        UserError: all rewards are invalid.
    """
    flat = [m for group in marks for m in group]
    if not any(m.is_valid for m in flat):
        raise UserError(
            f"none of the step's {len(flat)} rewards is valid: {flat[0].invalid_reason}; see rewards in the config"
        )


def evaluation(session: Session, team: Team, tracker: Tracker, step: int) -> dict[str, float]:
    """Greedy accuracy on the held-out samples; nothing without any."""
    if not session.held_out:
        return {}
    with session.stage("evaluation"):
        metrics = evaluate(team, session.clips, session.held_out, session.cfg)
    tracker.log(step, metrics | session.take_times())
    session.console.evaluation(step, metrics)
    return metrics


if __name__ == "__main__":
    job_main("grpo")
