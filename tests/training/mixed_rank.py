"""A rank of `test_learner.py`: of two ranks one has no video and long responses, the other short ones to videos.

Logits are cut into small chunks, so one rank has many and the other one; and under ZeRO-3 every parameter is sharded,
also those as small as a tiny model's, which DeepSpeed would keep whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

WORDS = ("square", "two", "left", "red", "circle")
LOGITS = 2000  # at a time: those of a few tokens


def run(rank: int, world_size: int, stage: int, model: Path, folder: Path) -> dict[str, Any]:
    from rlvid.config import ModelConfig, TrainConfig
    from rlvid.models.families import load_family
    from rlvid.training import learner as module
    from rlvid.training import packing
    from rlvid.training.objectives import Supervised
    from tests.prompts import group_of, prompt_of

    family = load_family(model)
    side = 2 * family.frame_multiple
    cfg = TrainConfig(zero_stage=stage, lr=1e-3, max_grad_norm=1.0, micro_batch_tokens=200)
    settings = module.deepspeed_config(cfg, "float32", world_size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with mock.patch.object(module, "deepspeed_config", return_value=settings):
        learner = module.Learner(model, family, ModelConfig(path=model), cfg)
    answers = [np.tile(family.encode_answer(word), 1 if i % 2 else 9) for i, word in enumerate(WORDS)]
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
    with mock.patch.object(packing, "LOGITS_AT_A_TIME", LOGITS):
        stats = [learner.step(mine, Supervised(), lr=1e-3) for _ in range(3)]
        logprobs = [values.tolist() for values in learner.outputs(mine)]
    losses, norms = [s["loss"] for s in stats], [s["grad_norm"] for s in stats]
    return {"losses": losses, "grad_norms": norms, "logprobs": logprobs}
