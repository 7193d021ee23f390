"""A rank of `test_nonfinite.py`: steps of which some are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path) -> dict[str, Any]:
    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.errors import UserError
    from rlvid.models.families import load_family
    from rlvid.rollout.weights.buckets import to_buckets
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(model)
    cfg = TrainConfig(zero_stage=stage, micro_batch_tokens=100)
    learner = Learner(model, family, ModelConfig(path=model), cfg)

    def step(weight: float, lr: float = 1e-3) -> dict[str, float]:
        """`weight` is that of the last rank's second micro-batch alone, which the first rank does not have."""
        group = group_of(prompt_of(family), family.encode_answer("square"))
        groups = [group.with_tokens(weights=np.full(group.n_tokens, 0.1, np.float32))]
        if rank == world_size - 1:
            groups.append(group.with_tokens(weights=np.full(group.n_tokens, weight, np.float32)))
        return learner.step(groups, Supervised(), lr)

    def digests() -> list[str]:
        return [bucket.digest() for bucket in to_buckets(learner.weight_parts(2**20))]

    step(0.1)
    before = digests()
    skipped = [step(math.nan)["skipped"], step(math.inf)["skipped"]]
    after = digests()
    fine = [step(0.1)["skipped"]]  # the count starts again
    moved = digests()
    for _ in range(cfg.max_skipped - 1):
        fine.append(step(math.nan)["skipped"])
    learner.save(folder / f"checkpoint-{stage}")  # of weights that are still finite
    errors = []
    for act in (lambda: step(math.nan), lambda: learner.save(folder / f"broken-{stage}")):
        try:
            act()
            errors.append("")
        except UserError as e:
            errors.append(str(e))
        learner._skipped_in_a_row = 0
        step(0.1, lr=math.inf)  # the weights are gone
    result = {"skipped": skipped, "kept": before == after, "fine": fine, "moved": moved != after, "errors": errors}
    gathered: list[object] = [None] * world_size
    dist.all_gather_object(gathered, result)
    return {"ranks": gathered}
