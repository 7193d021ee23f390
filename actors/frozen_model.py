"""The reference model: a frozen copy of the policy in an actor of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray

from actors.actor_process import enter_process
from actors.generator import SentWeights
from actors.trainer import GroupRef, fetch
from rlvid.config import JobConfig


class Reference:
    """Log-probs of responses under weights that do not move."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool) -> None:
        from rlvid.models.families import load_family
        from rlvid.models.loading import load_model
        from rlvid.training.packing import PackedPolicy

        network = load_model(folder, cfg.model.dtype)
        self._policy = PackedPolicy(network, load_family(folder)).eval()
        self._policy.to("cuda" if on_gpu else "cpu")
        self._budget = cfg.train.micro_batch_tokens

    def load_weights(self, sent: SentWeights) -> None:
        """Take the policy's present weights (the end of the warm start)."""
        parameters = dict(self._policy.network.named_parameters())
        for bucket in ray.get([ref for ref, _ in sent]):
            for name, tensor in bucket.tensors():
                parameters[name].data.copy_(tensor)

    def save(self, file: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: p.detach().contiguous() for name, p in self._policy.network.named_parameters()}, file)

    def load(self, file: Path) -> None:
        from safetensors.torch import load_file

        parameters = dict(self._policy.network.named_parameters())
        for name, tensor in load_file(file).items():
            parameters[name].data.copy_(tensor)

    def logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        """One array [sum R] per group."""
        import torch

        from rlvid.training.micro_batches import score

        device = next(self._policy.parameters()).device
        with torch.no_grad():
            return score(lambda row: self._policy(row.to(device))[0], fetch(groups), self._budget)
