"""The warm start: supervised steps on given answers, which any RL job may put first. Same trainer, same optimizer."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from actors.ranks import GroupRef
from actors.trainer import TrainerGroup
from jobs.inputs import Inputs
from jobs.run import Run
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import WarmStartConfig
from rlvid.models.families.chat import ChatFamily
from rlvid.training.batch import Group
from rlvid.training.objectives import Supervised
from rlvid.types import Encoded

PHASE = "warm_start"


def warm_start(run: Run, inputs: Inputs, trainer: TrainerGroup, cfg: WarmStartConfig) -> None:
    """Run the steps that are not done yet. Their checkpoints are those of the job's step 0.

    Raises:
        Interrupted: Ctrl-C, after a checkpoint.
    """
    start = run.state.get(f"{PHASE}_steps", 0)
    if start >= cfg.steps:
        run.state.pop("phase", None)  # of a checkpoint of its last step
        return
    run.console.phase("warm start", cfg.steps, start)
    for step in run.steps(start, cfg.steps):
        begin = time.monotonic()
        with run.stage("encode"):
            prompts = inputs.warm_up_prompts.take(cfg.batch_size)
        done = step + 1
        if len(prompts) < run.cfg.placement.trainer_workers:
            run.console.message(f"step {done} is left out: {len(prompts)} of its samples have readable clips")
        else:
            with run.stage("train"):
                lr = cfg.lr * lr_multiplier(step, cfg.steps, cfg.warmup_steps, cfg.schedule)
                stats = trainer.step(answer_batch(prompts, inputs.family), Supervised(), lr)
            metrics = {"warm_start/loss": stats["loss"], "train/lr": lr, "train/grad_norm": stats["grad_norm"]}
            metrics |= {"train/skipped": stats["skipped"]}
            metrics |= run.take_times() | {"time/step": time.monotonic() - begin}
            run.log(done, metrics, PHASE)
            if done % 10 == 0 or done == cfg.steps:
                run.console.step(done, metrics)
        run.state |= {"phase": PHASE, f"{PHASE}_steps": done}
        if run.interrupted or done % run.cfg.run.checkpoint_every == 0:
            run.checkpoint(0, trainer)
    run.end_if_interrupted()
    del run.state["phase"]  # the job's own steps follow


def answer_batch(prompts: Sequence[Encoded], family: ChatFamily) -> list[GroupRef]:
    """Each prompt with its answer; every token of the batch has the same weight."""
    answers = [family.encode_answer(p.sample.answer) for p in prompts]
    weight = 1.0 / sum(len(a) for a in answers)
    return [
        Group(p.prompt, p.cost, (a,), {"weights": np.full(len(a), weight, dtype=np.float32)})
        for p, a in zip(prompts, answers, strict=True)
    ]
