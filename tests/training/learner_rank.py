"""A rank of `test_learner.py`: steps, log-probs, buckets, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path) -> dict[str, Any]:
    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.rollout.weights.buckets import to_buckets
    from rlvid.training import activations
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(model)
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=400)
    learner = Learner(model, family, ModelConfig(path=model), cfg)
    answers = [family.encode_answer(word) for word in ("square", "two", "left", "red", "circle")]
    total = sum(map(len, answers))
    groups = [
        group_of(
            prompt_of(family, (4 + 4 * (i % 2), 56, 56), seed=i), a, weights=np.full(len(a), 1 / total, np.float32)
        )
        for i, a in enumerate(answers)
    ]
    mine = groups[rank::world_size]  # 3 and 2 groups: the ranks do not have as many micro-batches
    stats = [learner.step(mine, Supervised(), lr=1e-3) for _ in range(3)]
    checkpoint = folder / f"checkpoint-{stage}-{world_size}"
    learner.save(checkpoint)
    before = [b.digest() for b in to_buckets(learner.weight_parts(2**19))]
    stats.append(learner.step(mine, Supervised(), lr=1e-3))
    learner.load(checkpoint)
    again = learner.step(mine, Supervised(), lr=1e-3)
    learner.load(checkpoint)
    after = [b.digest() for b in to_buckets(learner.weight_parts(2**19))]
    logprobs = np.concatenate(learner.outputs(mine)).tolist()
    learner.export(folder / f"export-{stage}-{world_size}", model)
    offloaded = []
    if stage > 1:
        activations.LEAST_BYTES = 1  # none of a tiny model is large
        away = cfg.model_copy(update={"offload_optimizer": True, "offload_activations": True})
        elsewhere = Learner(model, family, ModelConfig(path=model), away)
        offloaded = [elsewhere.step(mine, Supervised(), lr=1e-3) for _ in range(2)]
    return {
        "offloaded": [s["loss"] for s in offloaded],
        "losses": [s["loss"] for s in stats],
        "grad_norms": [s["grad_norm"] for s in stats],
        "again": again["loss"],
        "buckets": [before, after],
        "logprobs": logprobs,
    }
