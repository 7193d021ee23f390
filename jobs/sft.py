"""`rlvid sft`: supervised fine-tuning on the manifest's answers."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from typing import Any

from actors.roles import Roles
from jobs.cli import job_main
from jobs.inputs import open_job
from jobs.specs import JOBS
from jobs.warm_start import answer_batch
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import SftJobConfig
from rlvid.training.objectives import Supervised


def run(cfg: SftJobConfig) -> dict[str, Any]:
    """Run or resume the job."""
    with open_job(cfg, "sft") as (run, inputs):
        inputs.require_training_data()
        with Roles(inputs.model, cfg, JOBS["sft"].roles(cfg), run.folder.logs_dir, cfg.seed) as roles:
            roles.wait_ready()
            start = run.resume(roles.trainer)
            run.console.phase("supervised fine-tuning", cfg.train.steps, start)
            # Closed while Ray still runs: what ends Ray Data's execution would start another Ray.
            with closing(inputs.clips.stream(inputs.train, cfg.seed, start * cfg.train.batch_size)) as stream:
                for step in run.steps(start, cfg.train.steps):
                    begin = time.monotonic()
                    with run.stage("encode"):
                        prompts = inputs.clips.encode(list(itertools.islice(stream, cfg.train.batch_size)))
                    lr = cfg.train.lr * lr_multiplier(step, cfg.train.steps, cfg.train.warmup_steps, cfg.train.schedule)
                    with run.stage("train"):
                        stats = roles.trainer.step(answer_batch(prompts, inputs.family), Supervised(), lr)
                    metrics = {"loss": stats["loss"], "train/lr": stats["lr"], "train/grad_norm": stats["grad_norm"]}
                    metrics |= inputs.clip_metrics() | run.take_times() | {"time/step": time.monotonic() - begin}
                    run.log(step + 1, metrics)
                    run.console.step(step + 1, metrics)
                    run.checkpoint_if_due(step + 1, roles.trainer)
            run.end_if_interrupted()
            run.checkpoint_last(roles.trainer)
            return run.finish(roles.trainer, {})


if __name__ == "__main__":
    job_main("sft")
