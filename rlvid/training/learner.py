"""One rank of the trainer: a DeepSpeed engine around the packed policy.

The process group and DeepSpeed's environment are the caller's business (`actors/trainer.py`); collectives must be met
by all ranks, so every public method is called on every rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor

from rlvid.config import ModelConfig, TrainConfig
from rlvid.models.families.qwen_vl import QwenVL
from rlvid.models.loading import load_model
from rlvid.training.buckets import BUCKET_BYTES, Bucket, to_buckets
from rlvid.training.objectives import Objective, Supervised
from rlvid.training.packing import Group, PackedPolicy, micro_batches, pack

NETWORK = "network."  # PackedPolicy's prefix before the checkpoint's parameter names


def deepspeed_config(cfg: TrainConfig, dtype: str, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings. The caller owns accumulation: any number of backwards, then one step."""
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.max_grad_norm if cfg.zero_stage or dtype != "float32" else 0.0,  # see Learner._clip
        "zero_optimization": {"stage": cfg.zero_stage},
        "bf16": {"enabled": dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": list(cfg.betas),
                "weight_decay": cfg.weight_decay,
                "torch_adam": True,  # plain torch: nothing to compile, same numbers on CPU and GPU
            },
        },
        "steps_per_print": 2**31 - 1,
    }


class Learner:
    """Policy, optimizer and the steps on them.

    Args:
        folder: Hugging Face checkpoint folder of the policy.
        temperature: log-probs are those of sampling at this temperature.
    """

    def __init__(self, folder: Path, family: QwenVL, model: ModelConfig, cfg: TrainConfig, temperature: float):
        self.cfg = cfg
        self.temperature = temperature
        self.policy = PackedPolicy(load_model(folder, model.dtype), family, temperature)
        self.world_size = dist.get_world_size()
        settings = deepspeed_config(cfg, model.dtype, self.world_size)
        self.engine, *_ = deepspeed.initialize(model=self.policy, config=settings)
        self.device = self.engine.device
        self._clipped_norm: float | None = None
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            self.engine.optimizer.register_step_pre_hook(self._clip)

    def step(self, groups: Sequence[Group], objective: Objective, lr: float) -> dict[str, float]:
        """One optimizer step on this rank's share of a mini-batch.

        Args:
            groups: at least one; their token weights belong to the whole mini-batch, over all ranks.

        Returns:
            Means over the response tokens of all ranks (entropy, objective's statistics), `loss`, `grad_norm`, `lr`.
        """
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = lr
        # The likelihood of given answers is not tempered; that of sampled ones is, as they were sampled.
        self.policy.temperature = 1.0 if isinstance(objective, Supervised) else self.temperature
        rows = self._rows(groups)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for i in range(self._most(len(rows))):
            # Collectives want as many micro-batches on every rank: one with fewer repeats a row that counts nothing.
            row = rows[min(i, len(rows) - 1)]
            logprobs, entropy = self.engine(pack(row).to(self.device))
            loss, stats = objective(logprobs, row)
            counts = i < len(rows)
            # DeepSpeed averages gradients over ranks; the weights already average over the whole mini-batch.
            self.engine.backward(loss * (self.world_size if counts else 0.0))
            if counts:
                for name, value in {**stats, "entropy": entropy.sum()}.items():
                    sums[name] += value.to(self.device)
        self.engine.step()
        return self._means(sums) | {"grad_norm": self._last_grad_norm(), "lr": lr}

    @torch.no_grad()
    def logprobs(self, groups: Sequence[Group]) -> list[npt.NDArray[np.float32]]:
        """Log-probs of every response token under the current weights: one array [sum R] per group."""
        self.engine.eval()
        self.policy.temperature = self.temperature
        rows = self._rows(groups)
        values: list[npt.NDArray[np.float32]] = []
        for i in range(self._most(len(rows))):
            row = rows[min(i, len(rows) - 1)]
            flat = self.engine(pack(row).to(self.device))[0].float().cpu().numpy()
            if i < len(rows):
                values.append(flat)
        self.engine.train()
        flat = np.concatenate(values)
        return np.split(flat, np.cumsum([g.responses.n_tokens for g in groups])[:-1])

    def buckets(self, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
        """The weights under the checkpoint's names, in buckets; the same on every rank.

        Under ZeRO-3 each bucket's parameters are gathered together, in the same order on every rank.
        """
        named = [(name.removeprefix(NETWORK), p) for name, p in self.engine.module.named_parameters()]
        if self.cfg.zero_stage < 3:
            yield from to_buckets(named, bucket_bytes)
            return
        chosen: list[tuple[str, Tensor]] = []
        size = 0
        for name, parameter in [*named, ("", None)]:
            nbytes = parameter.ds_numel * parameter.element_size() if parameter is not None else bucket_bytes
            if chosen and size + nbytes > bucket_bytes:
                with GatheredParameters([p for _, p in chosen]):
                    yield from to_buckets(chosen, max(size, bucket_bytes))
                chosen, size = [], 0
            chosen.append((name, parameter))
            size += nbytes

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer; `folder` is shared by all ranks."""
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=False)

    def load(self, folder: Path) -> None:
        """Take up weights and optimizer from `save`, on as many ranks as saved them."""
        path, _ = self.engine.load_checkpoint(str(folder), tag="state")
        if path is None:
            raise FileNotFoundError(f"no trainer state in {folder}")

    def export(self, folder: Path, checkpoint: Path) -> None:
        """Write the policy as a Hugging Face checkpoint, tokenizer and processor copied from `checkpoint`. Rank 0
        writes."""
        state = {name: tensor.clone() for bucket in self.buckets() for name, tensor in bucket.tensors()}
        if dist.get_rank() == 0:
            self.engine.module.network.save_pretrained(folder, state_dict=state)
            for file in checkpoint.iterdir():
                if file.is_file() and not (folder / file.name).exists() and "safetensors" not in file.name:
                    (folder / file.name).write_bytes(file.read_bytes())
        dist.barrier()

    def _clip(self, *_: object) -> None:
        """Clip reduced gradients where DeepSpeed hands the step to plain torch (ZeRO 0, float32).

        It would clip there too, but forgets the norm.
        """
        self._clipped_norm = float(
            torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), self.cfg.max_grad_norm)
        )

    def _last_grad_norm(self) -> float:
        return float(self.engine.get_global_grad_norm()) if self._clipped_norm is None else self._clipped_norm

    def _rows(self, groups: Sequence[Group]) -> list[list[Group]]:
        if not self.cfg.shared_prefix:
            groups = [part for group in groups for part in group.split()]
        return micro_batches(groups, self.cfg.micro_batch_tokens)

    def _most(self, count: int) -> int:
        """The largest `count` of all ranks."""
        most = torch.tensor(count, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(values)
        totals = dict(zip(names, values.tolist(), strict=True))
        tokens = totals.pop("tokens")
        return {name: value if name == "loss" else value / tokens for name, value in totals.items()} | {
            "tokens": tokens
        }
