"""A rank of `test_learner_scorer.py`: steps of a regression, scores, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path) -> dict[str, Any]:
    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
    from rlvid.training.batch import Group
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Regression
    from tests.prompts import prompt_of

    family = load_family(model)
    rubric = Rubric("regression", ("a", "b"), 1, 4, "question")
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=400)
    learner = Learner(model, family, ModelConfig(path=model), cfg, rubric.head)
    prompts = [prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i) for i in range(5)]
    labels = [np.array([1 + i % 4, 4 - i % 3], dtype=np.float32) for i in range(5)]
    groups = [Group(p, p.cost, targets={"labels": x}) for p, x in zip(prompts, labels, strict=True)]
    mine = groups[rank::world_size]  # 3 and 2 groups: the ranks do not have as many micro-batches
    stats = [learner.step(mine, Regression(5), lr=1e-3) for _ in range(4)]
    scores = np.concatenate(learner.outputs(mine)).flatten().tolist()
    export = folder / f"export-{stage}-{world_size}"
    learner.export(export, model)
    if rank == 0:
        rubric.save(export / RUBRIC_FOLDER)
    return {"losses": [s["loss"] for s in stats], "scores": scores}
