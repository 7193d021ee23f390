"""One rank of `test_supervised_tasks.py`, run as a program: the steps and the evaluation of each task with the real
learner, as a worker calls them; prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DIMS = ["light", "dark"]
TEXTS = {
    "kto": ("yes", "no idea"),
    "kto_adapters": ("yes", "no idea"),
    "answers": ("yes",),
    "regression": (),
    "bradley_terry": ("yes", "no idea"),
    "generation": ("light: 2\ndark: 3",),
}


def main(rank: int, world: int, folder: Path, model: Path) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    found = {kind: run(kind, rank, world, model) for kind in TEXTS}
    if rank == 0:
        print(json.dumps(found))


def run(kind: str, rank: int, world: int, model: Path) -> list[dict[str, float]]:
    """Metrics of three steps and of an evaluation."""
    from actors.supervised_plan import Plan
    from actors.supervised_tasks import REWARD_MODELS, Answers, Example, Preferred, Task
    from actors.supervised_worker import Worker
    from rlvid.config import DpoConfig, JobConfig, RewardModelJobConfig, SftConfig
    from rlvid.models.families import load_family
    from rlvid.rewards.videoscore import Rubric
    from rlvid.training.learner import Learner
    from rlvid.types import Message, Preference, Sample
    from tests.prompts import prompt_of

    lora = {"lora": {"rank": 4}} if kind == "kto_adapters" else {}
    shared = {"model": {"path": str(model), **lora}, "data": {"synthetic": {}}, "train": {"batch_size": 4, "steps": 3}}
    family = load_family(model)
    prompts = [replace(prompt_of(family, (4, 56, 56), seed=i), sample_id=f"s{i}") for i in range(5)]
    labels = [{"light": 1 + i % 4, "dark": 4 - i % 4} for i in range(5)]
    samples = [Sample(f"s{i}", (), (Message("user", (f"{i}?",)),), "", extra={"labels": labels[i]}) for i in range(5)]
    # Responses of different lengths: what a rank has must not change a mean over all.
    texts = TEXTS[kind]
    examples = tuple(
        Example(s, tuple(f"{t}{' yes' * i}" if "kto" in kind else t for t in texts)) for i, s in enumerate(samples)
    )
    cfg = JobConfig.model_validate(shared)
    task: Task = Answers(SftConfig())
    if "kto" in kind:
        task = Preferred(DpoConfig(loss="kto"), model, True, [Preference(e.sample, *e.responses) for e in examples])
    elif kind != "answers":
        dims: dict[str, Any] = {} if kind == "bradley_terry" else {"dims": DIMS}
        part = {"kind": kind, "template": "question", **dims}
        task = REWARD_MODELS[kind](Rubric.of(RewardModelJobConfig.model_validate(shared | {"reward_model": part})))
    worker = Worker.__new__(Worker)  # without Ray Train
    worker.rank, worker.world, worker.cfg, worker.family = rank, world, cfg, family
    worker.learner = Learner(model, family, cfg.model, cfg.train, task.head)
    worker.plan = Plan(cfg, task, model, examples, examples, model, model)
    task.start(worker)
    found = []
    for step in range(3):
        mine = [i for s, i in worker.plan.shares(rank, world, 0) if s == step]
        groups, objective, metrics = task.batch(step, [task.group(prompts[i], examples[i]) for i in mine])
        stats = worker.learner.step(groups, objective, 1e-3)
        found.append(metrics | {name: stats[key] for key, name in task.names.items()})
    mine = list(range(rank, 5, world))
    scored = task.score([task.group(prompts[i], examples[i]) for i in mine])
    parts = worker.gather(dict(zip(mine, scored, strict=True)))
    merged = {i: x for part in parts for i, x in part.items()}
    return [*found, task.summarize(examples, [merged[i] for i in range(5)])]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
