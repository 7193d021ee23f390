"""`rlvid sft`: supervised fine-tuning on the manifest's answers; also the warm start of `rlvid grpo`."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from typing import Any

import numpy as np

from actors.clip_store import Encoded
from actors.placement import roles_of
from actors.roles import Team
from actors.trainer import GroupRef
from jobs.cli import job_main
from jobs.session import WARM_START_STEP, Session
from rlvid.algorithms.schedule import lr_multiplier
from rlvid.config import SftJobConfig, TrainConfig, WarmStartConfig
from rlvid.models.families.chat import ChatFamily
from rlvid.reporting.tracker import Tracker
from rlvid.training.objectives import Supervised
from rlvid.training.packing import Responses


def supervised_batch(prompts: list[Encoded], family: ChatFamily) -> list[GroupRef]:
    """Each prompt with its right answer; every token of the batch counts alike."""
    answers = [family.encode_answer(p.sample.answer) for p in prompts]
    weight = 1.0 / sum(len(a) for a in answers)
    return [
        GroupRef(p.prompt, p.cost, Responses(token_ids=(a,), weights=np.full(len(a), weight, dtype=np.float32)))
        for p, a in zip(prompts, answers, strict=True)
    ]


def supervised_step(
    session: Session, team: Team, cfg: TrainConfig | WarmStartConfig, step: int, prompts: list[Encoded]
) -> dict[str, float]:
    """Optimizer step `step` of a supervised phase."""
    if len(prompts) < session.cfg.placement.trainer_workers:
        session.console.message(f"step {step + 1} is left out: {len(prompts)} of its samples have readable clips")
        return {"loss": float("nan"), "lr": 0.0, "grad_norm": 0.0}
    with session.stage("train"):
        lr = cfg.lr * lr_multiplier(step, cfg.steps, cfg.warmup_steps, cfg.schedule)
        return team.trainer.step(supervised_batch(prompts, session.family), Supervised(), lr)


def warm_start(session: Session, team: Team, tracker: Tracker, cfg: WarmStartConfig) -> None:
    """Supervised steps before reinforcement learning; their checkpoints are those of step 0."""
    start = session.state.get(WARM_START_STEP, 0)
    if start >= cfg.steps:
        return
    session.console.phase("warm start", cfg.steps, start)
    for step in session.steps(start, cfg.steps):
        begin = time.monotonic()
        with session.stage("encode"):
            prompts = session.next_batch(step, cfg.batch_size, is_warm_up=True)
        stats = supervised_step(session, team, cfg, step, prompts)
        metrics = {"warm_start/loss": stats["loss"], "train/lr": stats["lr"], "train/grad_norm": stats["grad_norm"]}
        metrics |= session.take_times() | {"time/step": time.monotonic() - begin}
        tracker.log(step + 1, metrics, phase="warm_start")
        if (step + 1) % 10 == 0 or step + 1 == cfg.steps:
            session.console.step(step + 1, metrics)
        session.state[WARM_START_STEP] = step + 1
        if session.interrupted or (step + 1) % session.cfg.run.checkpoint_every == 0:
            session.checkpoint(0, team)


def run(cfg: SftJobConfig) -> dict[str, Any]:
    """Run or take up the job; returns what the last line of stdout says."""
    with Session(cfg, "sft") as session:
        session.require_training_data()
        with Team(session.model, cfg, roles_of(cfg), session.folder.logs_dir, cfg.seed) as team:
            team.wait_ready()
            start = session.resume(team)
            tracker = session.open_tracker()
            session.console.phase("supervised fine-tuning", cfg.train.steps, start)
            # Closed while Ray still runs: what ends Ray Data's execution would start another Ray.
            with closing(session.clips.stream(session.train, cfg.seed, start * cfg.train.batch_size)) as stream:
                for step in session.steps(start, cfg.train.steps):
                    begin = time.monotonic()
                    with session.stage("encode"):
                        prompts = session.clips.encode(list(itertools.islice(stream, cfg.train.batch_size)))
                    stats = supervised_step(session, team, cfg.train, step, prompts)
                    metrics = {"loss": stats["loss"], "train/lr": stats["lr"], "train/grad_norm": stats["grad_norm"]}
                    metrics |= session.clip_metrics() | session.take_times() | {"time/step": time.monotonic() - begin}
                    tracker.log(step + 1, metrics)
                    session.console.step(step + 1, metrics)
                    session.checkpoint_if_due(step + 1, team)
            session.checkpoint_last(team)
            return session.finish(team, {})


if __name__ == "__main__":
    job_main("sft")
