"""One rank of a policy whose weights do not change: a reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from rlvid.config import ModelConfig, TrainConfig
from rlvid.models.families.chat import ChatFamily
from rlvid.models.loading import load_model
from rlvid.training.batch import Group
from rlvid.training.collectives import most_of
from rlvid.training.learner import deepspeed_config
from rlvid.training.micro_batches import score
from rlvid.training.packing import PackedPolicy
from rlvid.types import Prompt


class FrozenPolicy:
    """Whole on every rank, or under ZeRO-3 a share on each, without an optimizer. All ranks make the same calls."""

    def __init__(self, folder: Path, family: ChatFamily, model: ModelConfig, cfg: TrainConfig):
        self._cfg, self._device = cfg, get_accelerator().current_device_name()
        self._is_sharded = cfg.zero_stage == 3 and dist.get_world_size() > 1
        if self._is_sharded:
            settings = deepspeed_config(
                cfg.model_copy(update={"offload_optimizer": False}), model.dtype, dist.get_world_size()
            )
            policy = PackedPolicy(load_model(folder, model.dtype, settings), family)
            self._model: Any = deepspeed.initialize(model=policy, config=settings)[0]
            policy.prediction.shard()
            policy.most = most_of(self._device)
        else:
            self._model = PackedPolicy(load_model(folder, model.dtype), family).to(self._device)
        self._model.eval()

    def logprobs(self, groups: Sequence[Group[Prompt]]) -> list[npt.NDArray[np.float32]]:
        """Log-probs [sum R] of each group's response tokens."""
        most = most_of(self._device) if self._is_sharded else lambda n: n
        return score(self._model, groups, self._cfg.micro_batch_tokens, self._cfg.shared_prefix, most)
