"""A rank of `test_learner.py`: of two ranks one has no video, the other nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("square", "two", "left", "red", "circle")


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path) -> dict[str, Any]:
    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(model)
    side = 2 * family.frame_multiple
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=200)
    learner = Learner(model, family, ModelConfig(path=model), cfg)
    answers = [family.encode_answer(word) for word in WORDS]
    total = sum(map(len, answers))
    groups = [
        group_of(
            prompt_of(family, *([(4, side, side)] if i % 2 else []), seed=i),
            a,
            weights=np.full(len(a), 1 / total, np.float32),
        )
        for i, a in enumerate(answers)
    ]
    mine = groups[rank::world_size]
    stats = [learner.step(mine, Supervised(), lr=1e-3) for _ in range(3)]
    logprobs = [values.tolist() for values in learner.outputs(mine)]
    losses, norms = [s["loss"] for s in stats], [s["grad_norm"] for s in stats]
    return {"losses": losses, "grad_norms": norms, "logprobs": logprobs}
