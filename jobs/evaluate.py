"""`rlvid eval`: greedy answers to the held-out manifest; also the evaluations inside other jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from actors.clip_store import ClipStore
from actors.generator_fleet import GeneratorFleet
from actors.roles import Roles
from jobs.cli import job_main
from jobs.inputs import Inputs, open_job
from jobs.run import Run
from rlvid.config import EvalJobConfig
from rlvid.errors import UserError
from rlvid.evaluation.benchmarks.held_out import HeldOut
from rlvid.evaluation.predictions import Batches, Prediction
from rlvid.evaluation.predictions import evaluate as evaluate_benchmark
from rlvid.files import RowFile
from rlvid.rewards.rules import make_parts
from rlvid.rollout.engine import Sampling


@contextmanager
def generators(run: Run, model: Path) -> Iterator[Roles]:
    """Generators that serve a checkpoint. They end with the block, so that what follows has their CPUs and GPUs."""
    with Roles(model, run.cfg, ("generator",), run.folder.logs_dir, run.console.message) as roles:
        roles.wait_ready()
        roles.fleet.serve_checkpoint()
        yield roles


def evaluate(run: Run, inputs: Inputs, roles: Roles, step: int) -> dict[str, float]:
    """Greedy answers of the engines' weights to the held-out samples; logged and shown. Nothing without any.

    Returns:
        Share of right answers (sample-weighted, with n), overall and by problem type, and the mean length in tokens.
    """
    if not inputs.held_out:
        return {}
    cfg = inputs.cfg
    parts = [part for part in make_parts(cfg.rewards) if part.measures_accuracy]
    benchmark = HeldOut(inputs.held_out[: cfg.evaluate.max_samples], parts, inputs.family.opening)
    with run.stage("evaluation"):
        answer = partial(fleet_answers, roles.fleet, inputs.clips, cfg.rollout.max_tokens)
        file = RowFile(run.folder.predictions_file(step))
        found = evaluate_benchmark(benchmark, answer, file, cfg.evaluate.batch_size)
    metrics = {f"eval/{name}": value for name, value in found.items()}
    run.log(step, metrics | run.take_times())
    run.console.evaluation(step, metrics)
    return metrics


def fleet_answers(
    fleet: GeneratorFleet, clips: ClipStore, max_tokens: int, batches: Batches
) -> Iterator[Mapping[str, Prediction]]:
    """Greedy answers of a fleet. While it answers one batch, the clips of the next are read."""
    coming = (clips.submit(batch) for batch in batches)
    pending = next(coming, None)
    while pending is not None:
        following = next(coming, None)
        prompts = clips.collect(pending)
        prompts, answers = clips.answered(prompts, fleet.generate(prompts, Sampling(1, 0.0, max_tokens)))
        yield {
            p.sample.id: Prediction(r.text, len(r.token_ids), r.finish_reason)
            for p, (r,) in zip(prompts, answers, strict=True)
        }
        pending = following


def run(cfg: EvalJobConfig) -> dict[str, Any]:
    """Evaluate `model.path` on `data.eval`."""
    with open_job(cfg, "eval") as (run, inputs):
        if not inputs.held_out:
            raise UserError("data.eval is empty: give a manifest of held-out samples")
        with generators(run, inputs.model) as roles:
            metrics = evaluate(run, inputs, roles, 0)
        return {"accuracy": metrics["eval/accuracy"], "n": int(metrics["eval/n"]), **run.ending()}


if __name__ == "__main__":
    job_main("eval")
