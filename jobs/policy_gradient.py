"""The loop that GRPO and PPO share: experience, update, new weights for the engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.judge_reward import judged_rewards
from actors.parity_check import check_parity
from actors.ranks import GroupRef, RanksLost
from actors.roles import Roles
from jobs.evaluate import evaluate
from jobs.experience import ExperienceStream
from jobs.inputs import Inputs, distinct, open_job
from jobs.run import Run
from jobs.specs import JOBS
from jobs.update import UPDATES, RolloutsOnly, Update
from jobs.warm_start import warm_start
from rlvid.config import PolicyGradientJobConfig
from rlvid.errors import UserError
from rlvid.reporting import rollout_tables
from rlvid.rewards.rules import make_parts
from rlvid.training.dumps import save_dump
from rlvid.training.policy_batch import Experience, mean_advantages, rollout_rows, staleness, summarize

N_REPORTED = 8  # prompts of a step whose rollouts the report shows


def run_policy_gradient(cfg: PolicyGradientJobConfig, job: str, only_rollouts: bool) -> dict[str, Any]:
    """Run or resume a job. Where a rank of the trainer is lost, all are started again from the last checkpoint.

    Raises:
        UserError: a rank was lost more than `train.max_failures` times.
    """
    update = RolloutsOnly if only_rollouts else UPDATES[job]
    with open_job(cfg, job) as (run, inputs):
        inputs.require_training_data()
        check_mode(run, only_rollouts)
        if cfg.policy_gradient.temporal_rule and not any(sample.has_video for sample in inputs.train):
            raise UserError("grpo.temporal compares with shuffled frames, and no sample of data.train has a video")
        if cfg.policy_gradient.temporal_rule and not any(p.measures_accuracy for p in make_parts(cfg.rewards)):
            raise UserError("grpo.temporal rewards right answers, and no part of rewards says which are right")
        names = JOBS[job].roles(cfg)
        logs, tell = run.folder.logs_dir, run.console.message
        with (
            Roles(inputs.model, cfg, names, logs, tell) as roles,
            judged_rewards(roles, inputs.clips, run.folder.dir / "judge_cache.jsonl"),
        ):
            for failures in range(cfg.train.max_failures + 1):
                try:
                    if failures:
                        roles.trainer.restart()
                    roles.trainer.wait_ready()
                    start = run.resume(roles.trainer)
                    with run.saving_on_error(roles.trainer):
                        return train(cfg, run, inputs, roles, update(cfg, roles.trainer), start)
                except RanksLost as e:
                    lost = e
                    tell(f"{e} ({failures + 1}; the run ends after train.max_failures={cfg.train.max_failures})")
            raise UserError(f"{lost}, too often: see {logs}. The same command resumes the run") from lost


def train(
    cfg: PolicyGradientJobConfig, run: Run, inputs: Inputs, roles: Roles, update: Update, start: int
) -> dict[str, Any]:
    """Run the job from step `start` to its end."""
    begin_training(cfg, run, inputs, roles, start)
    run.console.phase(run.job.upper(), cfg.train.steps, start)
    with ExperienceStream(cfg, run, inputs, roles) as stream:
        for step in run.steps(start, cfg.train.steps):
            begin, done = time.monotonic(), step + 1
            experience = stream.take(step)
            if (n := len(experience.prompts)) < cfg.placement.trainer_workers:
                run.console.message(f"step {done} is left out: only {n} of its prompts can be used")
                run.checkpoint_if_due(done, roles.trainer)
                continue
            roles.fleet.sleep()
            with run.stage("train"):
                groups, stats = update(step, experience)
            ages = staleness(experience.rollouts, roles.fleet.version) if cfg.policy_gradient.async_steps else {}
            with run.stage("sync"):
                roles.fleet.sync(roles.trainer, done)
            seconds = time.monotonic() - begin
            metrics = summarize(experience.rollouts, experience.rewards) | experience.metrics | stats | ages
            metrics |= inputs.clip_metrics() | roles.fleet.metrics()
            speed = n * cfg.policy_gradient.group_size / seconds
            metrics |= run.take_times() | {"time/step": seconds, "samples_per_s": speed}
            run.log(done, metrics)
            run.console.step(done, metrics)
            if done % cfg.run.log_rollouts_every == 0 or done == cfg.train.steps:
                log_rollouts(run, inputs, done, experience, mean_advantages(groups))
            if cfg.run.dump_every and done % cfg.run.dump_every == 0:
                dump(run, done, experience, groups)
            if done % cfg.evaluate.every == 0 and done < cfg.train.steps:
                evaluate(run, inputs, roles, done)
            run.checkpoint_if_due(done, roles.trainer)
    run.end_if_interrupted()
    run.checkpoint_last(roles.trainer)
    after = evaluate(run, inputs, roles, cfg.train.steps).get("eval/accuracy")
    return run.finish(roles.trainer, {"accuracy_before": run.state.get("accuracy_before"), "accuracy_after": after})


def check_mode(run: Run, only_rollouts: bool) -> None:
    """
    Raises:
        UserError: the run folder has a run that trains, and this one only generates; or the other way round.
    """
    if run.folder.manifest().setdefault("only_rollouts", only_rollouts) != only_rollouts:
        raise UserError(
            f"{run.folder.dir} has a run {'without' if only_rollouts else 'with'} --only-rollouts: give another run.dir"
        )
    run.folder.record(only_rollouts=only_rollouts)


def begin_training(cfg: PolicyGradientJobConfig, run: Run, inputs: Inputs, roles: Roles, start: int) -> None:
    """Warm start, reference, weights of the engines, parity check and first evaluation.

    A resumed run has done the warm start and the evaluation and does not repeat them.
    """
    is_resumed = "accuracy_before" in run.state  # by then the warm start and the evaluation are done
    if not is_resumed:
        warm_start(run, inputs, roles.trainer, cfg.warm_start)
    roles.wait_ready()
    if cfg.policy_gradient.kl_coef:
        roles.freeze_reference(run.folder.dir / "reference", is_resumed)
    roles.fleet.sync(roles.trainer, start)
    run.console.message(str(check_parity(roles.fleet, roles.trainer, inputs.clips, distinct(inputs.train, 16), cfg)))
    if not is_resumed:
        run.state["accuracy_before"] = evaluate(run, inputs, roles, 0).get("eval/accuracy")
        run.checkpoint(0, roles.trainer)


def dump(run: Run, step: int, experience: Experience, groups: Sequence[GroupRef]) -> None:
    """Write what the step was trained on."""
    prompts = ray.get([p.prompt for p in experience.prompts])
    reference = [group.tokens["ref_logprobs"] for group in groups if "ref_logprobs" in group.tokens]
    save_dump(run.folder.dump_dir(step), experience, prompts, reference or None)


def log_rollouts(run: Run, inputs: Inputs, step: int, experience: Experience, advantages: list[list[float]]) -> None:
    """Write some of the step's rollouts with their frames, for the report."""
    prompts = experience.prompts[:N_REPORTED]
    rows = rollout_rows(step, prompts, experience.rollouts[:N_REPORTED], experience.rewards[:N_REPORTED], advantages)
    strips = inputs.clips.strips(distinct([p.sample for p in prompts], N_REPORTED))
    rollout_tables.write(run.folder.dir, step, rows, strips)
