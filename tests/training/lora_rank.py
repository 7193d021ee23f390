"""A rank of `test_learner_lora.py`: steps with adapters, the reference, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path, quantize: Any = None) -> dict[str, Any]:
    from rlvid.config import LoraConfig, ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training.learner import Learner
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(model)
    cfg = TrainConfig(zero_stage=stage, micro_batch_tokens=400)
    config = ModelConfig(path=model, lora=LoraConfig(rank=4, alpha=16, quantize=quantize))
    learner = Learner(model, family, config, cfg)
    answers = [family.encode_answer(word) for word in ("square", "two", "left", "red")]
    total = sum(map(len, answers))
    groups = [
        group_of(prompt_of(family, (4, 56, 56), seed=i), a, weights=np.full(len(a), 1 / total, np.float32))
        for i, a in enumerate(answers)
    ]
    mine = groups[rank::world_size]

    def first(values: list[np.ndarray]) -> list[float]:
        return [float(x) for x in values[0]]  # of the group that rank 0 has in any case

    base = first(learner.outputs(mine))
    stats = [learner.step(mine, Supervised(), lr=1e-2) for _ in range(3)]
    moved, off = first(learner.outputs(mine)), first(learner.reference_logprobs(mine))
    checkpoint = folder / f"checkpoint-{stage}-{world_size}"
    learner.save(checkpoint)
    learner.reference.freeze(folder / f"reference-{stage}-{world_size}.safetensors")
    dist.barrier()
    stats.append(learner.step(mine, Supervised(), lr=1e-2))
    learner.reference.load(folder / f"reference-{stage}-{world_size}.safetensors")
    frozen, after = first(learner.reference_logprobs(mine)), first(learner.outputs(mine))
    learner.load(checkpoint)
    again = learner.step(mine, Supervised(), lr=1e-2)
    sent = [name for part, _ in learner.weight_parts(2**26) for name, _ in part]
    learner.export(folder / f"export-{stage}-{world_size}", model)
    return {
        "losses": [s["loss"] for s in stats],
        "again": again["loss"],
        "logprobs": {"base": base, "moved": moved, "off": off, "frozen": frozen, "after": after},
        "sent": sent,
        "dtypes": sorted({str(p.dtype) for p in learner.policy.network.parameters()}),
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()),
    }
