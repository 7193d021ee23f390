"""One rank of `test_learner_lora.py`, run as a program: steps with adapters, the reference, export; prints JSON."""

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

    from rlvid.config import LoraConfig, ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(Path(model))
    cfg = TrainConfig(zero_stage=stage, micro_batch_tokens=400)
    config = ModelConfig(path=Path(model), lora=LoraConfig(rank=4, alpha=16))
    learner = Learner(Path(model), family, config, cfg)
    answers = [family.encode_answer(word) for word in ("square", "two", "left", "red")]
    total = sum(map(len, answers))
    groups = [
        group_of(prompt_of(family, (4, 56, 56), seed=i), a, weights=np.full(len(a), 1 / total, np.float32))
        for i, a in enumerate(answers)
    ]
    mine = groups[rank::world_size]

    def first(values: list[np.ndarray]) -> list[float]:
        return [float(x) for x in values[0]]  # of the group that rank 0 has in any case

    base = first(learner.logprobs(mine))
    learner.freeze_reference()  # the adapters change nothing yet: the reference is the base model
    stats = [learner.step(mine, Supervised(), lr=1e-2) for _ in range(3)]
    moved, off = first(learner.logprobs(mine)), first(learner.reference_logprobs(mine))
    checkpoint = Path(folder) / f"checkpoint-{stage}-{world_size}"
    learner.save(checkpoint)
    learner.freeze_reference()
    learner.save_reference(Path(folder) / f"reference-{stage}-{world_size}.safetensors")
    dist.barrier()
    stats.append(learner.step(mine, Supervised(), lr=1e-2))
    learner.load_reference(Path(folder) / f"reference-{stage}-{world_size}.safetensors")
    frozen, after = first(learner.reference_logprobs(mine)), first(learner.logprobs(mine))
    learner.load(checkpoint)
    again = learner.step(mine, Supervised(), lr=1e-2)
    sent = [name for part, _ in learner.weight_parts(2**26) for name, _ in part]
    learner.export(Path(folder) / f"export-{stage}-{world_size}", Path(model))
    if rank == 0:
        result = {
            "losses": [s["loss"] for s in stats],
            "again": again["loss"],
            "logprobs": {"base": base, "moved": moved, "off": off, "frozen": frozen, "after": after},
            "sent": sent,
            "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    rank, world_size, stage = map(int, sys.argv[1:4])
    main(rank, world_size, stage, *sys.argv[4:])
