"""One rank of `test_learner.py`, run as a program: steps, log-probs, buckets, save and load; prints one JSON line."""

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
    from rlvid.rollout.weights.buckets import to_buckets
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(Path(model))
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=400)
    learner = Learner(Path(model), family, ModelConfig(path=Path(model)), cfg)
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
    checkpoint = Path(folder) / f"checkpoint-{stage}-{world_size}"
    learner.save(checkpoint)
    before = [b.digest() for b in to_buckets(learner.weight_parts(2**19))]
    stats.append(learner.step(mine, Supervised(), lr=1e-3))
    learner.load(checkpoint)
    again = learner.step(mine, Supervised(), lr=1e-3)
    learner.load(checkpoint)
    after = [b.digest() for b in to_buckets(learner.weight_parts(2**19))]
    logprobs = np.concatenate(learner.logprobs(mine)).tolist()
    learner.export(Path(folder) / f"export-{stage}-{world_size}", Path(model))
    if rank == 0:
        result = {
            "losses": [s["loss"] for s in stats],
            "grad_norms": [s["grad_norm"] for s in stats],
            "again": again["loss"],
            "buckets": [before, after],
            "logprobs": logprobs,
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    rank, world_size, stage = map(int, sys.argv[1:4])
    main(rank, world_size, stage, *sys.argv[4:])
