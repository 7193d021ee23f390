"""`rlvid eval`: greedy answers to the held-out manifest; also the evaluations inside other jobs."""

from __future__ import annotations

from typing import Any

from actors.roles import Roles
from jobs.cli import job_main
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from jobs.specs import JOBS
from rlvid.config import EvalJobConfig
from rlvid.errors import UserError
from rlvid.evaluation.metrics import accuracy_report
from rlvid.rollout.vllm_engine import Sampling


def evaluate(run: Run, inputs: Inputs, roles: Roles, step: int) -> dict[str, float]:
    """Greedy answers of the engines' weights to the held-out samples; logged and shown. Nothing without any.

    Returns:
        Share of right answers (sample-weighted, with n), overall and by problem type, and the mean length in tokens.
    """
    if not inputs.held_out:
        return {}
    with run.stage("evaluation"):
        metrics = _accuracy(inputs, roles)
    run.log(step, metrics | run.take_times())
    run.console.evaluation(step, metrics)
    return metrics


def _accuracy(inputs: Inputs, roles: Roles) -> dict[str, float]:
    cfg, clips = inputs.cfg, inputs.clips
    samples = inputs.held_out[: cfg.evaluate.max_samples]
    verdicts: list[bool | None] = []
    types: list[str | None] = []
    lengths: list[int] = []
    size = cfg.evaluate.batch_size
    pending = clips.submit(samples[:size])
    for at in range(0, len(samples), size):
        prompts = clips.collect(pending)
        pending = clips.submit(samples[at + size : at + 2 * size])
        answers = roles.fleet.generate(prompts, Sampling(1, 0.0, cfg.rollout.max_tokens))
        rewards = roles.rewards([p.sample for p in prompts], answers)
        verdicts += [reward.is_right for (reward,) in rewards]
        types += [p.sample.problem_type for p in prompts]
        lengths += [len(a[0].token_ids) for a in answers]
    missing = len(samples) - len(verdicts)  # bad clips: no verdict
    verdicts += [None] * missing
    types += [None] * missing
    if all(v is None for v in verdicts):
        raise UserError(f"none of the {len(samples)} held-out samples could be scored; see bad_clips.jsonl and rewards")
    metrics = accuracy_report(verdicts, types).as_metrics() | {"length": sum(lengths) / len(lengths)}
    return {f"eval/{key}": value for key, value in metrics.items()}


def run(cfg: EvalJobConfig) -> dict[str, Any]:
    """Evaluate `model.path` on `data.eval`."""
    with open_job(cfg, "eval") as (run, inputs):
        if not inputs.held_out:
            raise UserError("data.eval is empty: give a manifest of held-out samples")
        with Roles(inputs.model, cfg, JOBS["eval"].roles(cfg), run.folder.logs_dir, cfg.seed) as roles:
            roles.wait_ready()
            roles.fleet.serve_checkpoint()
            metrics = evaluate(run, inputs, roles, 0)
        return {"accuracy": metrics["eval/accuracy"], "n": int(metrics["eval/n"]), **run.ending()}


if __name__ == "__main__":
    job_main("eval")
