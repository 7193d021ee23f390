"""One rank of `test_nonfinite.py`, run as a program: steps of which some are not finite; prints one JSON line."""

from __future__ import annotations

import json
import math
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
    from rlvid.errors import UserError
    from rlvid.models.families import load_family
    from rlvid.rollout.weights.buckets import to_buckets
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(Path(model))
    cfg = TrainConfig(zero_stage=stage, micro_batch_tokens=100)
    learner = Learner(Path(model), family, ModelConfig(path=Path(model)), cfg)

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
    learner.save(Path(folder) / f"checkpoint-{stage}")  # of weights that are still finite
    errors = []
    for act in (lambda: step(math.nan), lambda: learner.save(Path(folder) / f"broken-{stage}")):
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
    if rank == 0:
        print(json.dumps({"ranks": gathered}), flush=True)


if __name__ == "__main__":
    rank, world_size, stage = map(int, sys.argv[1:4])
    main(rank, world_size, stage, *sys.argv[4:])
