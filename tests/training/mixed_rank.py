"""One rank of `test_learner.py`: of two ranks one has no video, the other nothing else; prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

WORDS = ("square", "two", "left", "red", "circle")


def main(rank: int, world_size: int, stage: int, model: str, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/meet-mixed-{stage}-{world_size}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)

    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(Path(model))
    side = 2 * family.frame_multiple
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=200)
    learner = Learner(Path(model), family, ModelConfig(path=Path(model)), cfg)
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
    logprobs = [values.tolist() for values in learner.logprobs(mine)]
    if rank == 0:
        result = {"losses": [s["loss"] for s in stats], "grad_norms": [s["grad_norm"] for s in stats]}
        print(json.dumps(result | {"logprobs": logprobs}), flush=True)


if __name__ == "__main__":
    rank, world_size, stage = map(int, sys.argv[1:4])
    main(rank, world_size, stage, *sys.argv[4:])
