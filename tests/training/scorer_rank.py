"""One rank of `test_learner_scorer.py`, run as a program: steps of a regression, scores, export; one JSON line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def main(rank: int, world_size: int, stage: int, model: str, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/meet-{stage}-{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)

    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
    from rlvid.training.batch import Group
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Regression
    from tests.prompts import prompt_of

    family = load_family(Path(model))
    rubric = Rubric("regression", ("a", "b"), 1, 4, "question", {})
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=400)
    learner = Learner(Path(model), family, ModelConfig(path=Path(model)), cfg, rubric.head)
    prompts = [prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i) for i in range(5)]
    labels = [np.array([1 + i % 4, 4 - i % 3], dtype=np.float32) for i in range(5)]
    groups = [Group(p, p.cost, targets={"labels": x}) for p, x in zip(prompts, labels, strict=True)]
    mine = groups[rank::world_size]  # 3 and 2 groups: the ranks do not have as many micro-batches
    stats = [learner.step(mine, Regression(5), lr=1e-3) for _ in range(4)]
    scores = np.concatenate(learner.scores(mine)).tolist()
    export = Path(folder) / f"export-{stage}-{world_size}"
    learner.export(export, Path(model))
    if rank == 0:
        rubric.save(export / RUBRIC_FOLDER)
        print(json.dumps({"losses": [s["loss"] for s in stats], "scores": scores}), flush=True)


if __name__ == "__main__":
    rank, world_size, stage = map(int, sys.argv[1:4])
    main(rank, world_size, stage, *sys.argv[4:])
