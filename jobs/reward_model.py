"""`rlvid reward-model`: train a model that scores videos, or answers to questions about them.

VideoScore (arXiv 2406.15252) as regression or as text, VideoScore2 (arXiv 2509.22799) as text, Bradley-Terry on pairs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.clip_store import Encoded
from actors.roles import Roles
from actors.trainer import GroupRef
from jobs.cli import job_main
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from jobs.specs import JOBS
from jobs.warm_start import answer_batch
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import RewardModelJobConfig
from rlvid.evaluation.metrics import accuracy_report
from rlvid.evaluation.ranking import correlate
from rlvid.rewards.videoscore import RUBRIC_FOLDER, NoScore, Rubric
from rlvid.rollout.vllm_engine import Sampling
from rlvid.training.batch import Group
from rlvid.training.objectives import BradleyTerry, Objective, Regression, Supervised


def batch(prompts: Sequence[Encoded], inputs: Inputs, rubric: Rubric) -> tuple[list[GroupRef], Objective]:
    """What is learned of `prompts`, each of which counts alike; of text each token does."""
    if not rubric.has_head:
        return answer_batch(list(prompts), inputs.family), Supervised()
    if rubric.kind == "regression":
        labels = [np.array(rubric.scores(p.sample.extra["labels"]), dtype=np.float32) for p in prompts]
        groups = [Group(p.prompt, p.cost, targets={"labels": x}) for p, x in zip(prompts, labels, strict=True)]
        return groups, Regression(len(prompts))
    pairs = {pair.sample.id: pair for pair in (*inputs.pairs, *inputs.held_out_pairs)}
    sides = [(pairs[p.sample.id].chosen, pairs[p.sample.id].rejected) for p in prompts]
    encode = inputs.family.encode_answer
    answers = [(encode(chosen), encode(rejected)) for chosen, rejected in sides]
    groups = [Group(p.prompt, p.cost, a, unit_size=2) for p, a in zip(prompts, answers, strict=True)]
    return groups, BradleyTerry(len(prompts))


def predict(
    run: Run, inputs: Inputs, roles: Roles, cfg: RewardModelJobConfig, prompts: Sequence[Encoded]
) -> list[dict[str, float] | None]:
    """Scores by dimension of each prompt; None where a generated text is not exactly in the form of scores."""
    if Rubric.of(cfg).has_head:
        scores = roles.trainer.scores(batch(prompts, inputs, Rubric.of(cfg))[0])
        return [dict(zip(Rubric.of(cfg).dims, s.tolist(), strict=True)) for s in scores]
    if inputs.family.vllm_module is None:
        ids = roles.trainer.answers([Group(p.prompt, p.cost) for p in prompts], cfg.rollout.max_tokens)
        texts = [inputs.family.decode(answer.tolist()) for answer in ids]
    else:
        texts = [r[0].text for r in roles.fleet.generate(prompts, Sampling(1, 0.0, cfg.rollout.max_tokens))]
    parsed: list[dict[str, float] | None] = []
    for text in texts:
        try:
            parsed.append(Rubric.of(cfg).parse(text))
        except NoScore:
            parsed.append(None)
    return parsed


def evaluate(run: Run, inputs: Inputs, roles: Roles, cfg: RewardModelJobConfig) -> dict[str, float]:
    """Rank correlation with the held-out labels, dimension by dimension; of pairs, the share ranked right."""
    rubric, samples = Rubric.of(cfg), inputs.held_out[: cfg.evaluate.max_samples]
    prompts: list[Encoded] = []
    predicted: list[dict[str, float] | None] = []
    right: list[bool | None] = []
    for at in range(0, len(samples), cfg.evaluate.batch_size):
        part = inputs.clips.encode(samples[at : at + cfg.evaluate.batch_size])
        prompts += part
        if rubric.kind == "bradley_terry":
            groups, _ = batch(part, inputs, rubric)
            right += [bool(chosen > rejected) for chosen, rejected in roles.trainer.scores(groups)]
        else:
            predicted += predict(run, inputs, roles, cfg, part)
    if rubric.kind == "bradley_terry":
        report = accuracy_report(right, [p.sample.problem_type for p in prompts])
        return {f"eval/{name}": value for name, value in report.as_metrics().items()}
    kept = [(p, e.sample.extra["labels"]) for p, e in zip(predicted, prompts, strict=True) if p is not None]
    metrics = correlate([p for p, _ in kept], [t for _, t in kept], rubric.dims).as_metrics()
    metrics["unparsed"] = float(len(predicted) - len(kept))
    return {f"eval/{name}": value for name, value in metrics.items()}


def run(cfg: RewardModelJobConfig) -> dict[str, Any]:
    """Run or take up the job; returns what the last line of stdout says."""
    with open_job(cfg, "reward-model") as (run, inputs):
        inputs.require_training_data()
        has_engine = inputs.family.vllm_module is not None  # else the trainer answers
        names = [r for r in JOBS["reward-model"].roles(cfg) if has_engine or r != "generator"]
        with Roles(inputs.model, cfg, names, run.folder.logs_dir, cfg.seed) as roles:
            roles.wait_ready()
            start = run.resume(roles.trainer)
            run.console.phase(f"reward model ({cfg.reward_model.kind})", cfg.train.steps, start)
            measured: dict[str, float] = {}

            def measure(step: int) -> None:
                if not inputs.held_out:
                    return
                with run.stage("evaluation"):
                    if has_engine and not Rubric.of(cfg).has_head:
                        roles.fleet.sync(roles.trainer, step)
                    measured.update(evaluate(run, inputs, roles, cfg))
                run.log(step, measured | run.take_times())
                run.console.evaluation(step, measured)

            if start == 0:
                measure(0)
            for step in run.steps(start, cfg.train.steps):
                begin = time.monotonic()
                with run.stage("encode"):
                    prompts = inputs.prompts.take(cfg.train.batch_size)
                if len(prompts) < cfg.placement.trainer_workers:
                    run.console.message(f"step {step + 1} is left out: {len(prompts)} of its clips can be read")
                    continue
                with run.stage("train"):
                    lr = cfg.train.lr * lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
                    stats = roles.trainer.step(*batch(prompts, inputs, Rubric.of(cfg)), lr)
                metrics = {"train/lr": stats.pop("lr"), "train/grad_norm": stats.pop("grad_norm"), **stats}
                metrics |= inputs.clip_metrics() | run.take_times() | {"time/step": time.monotonic() - begin}
                run.log(step + 1, metrics)
                run.console.step(step + 1, metrics)
                run.checkpoint_if_due(step + 1, roles.trainer)
                if (step + 1) % cfg.evaluate.every == 0 and step + 1 < cfg.train.steps:
                    measure(step + 1)
            run.end_if_interrupted()
            run.checkpoint_last(roles.trainer)
            measure(cfg.train.steps)
            found = ("eval/spearman", "eval/accuracy", "eval/unparsed", "eval/n")
            result = run.finish(
                roles.trainer, {name.removeprefix("eval/"): measured[name] for name in found if name in measured}
            )
            Rubric.of(cfg).save(run.folder.dir / "policy" / RUBRIC_FOLDER)
            return result


if __name__ == "__main__":
    job_main("reward-model")
