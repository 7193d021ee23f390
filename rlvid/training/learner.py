"""One rank of the trainer: a DeepSpeed engine around the packed policy.

The caller makes the process group and sets DeepSpeed's environment (`actors/trainer.py`). Ranks meet in collectives, so
every public method is called on every rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from rlvid.config import ModelConfig, TrainConfig
from rlvid.errors import UserError
from rlvid.models.families.chat import ChatFamily
from rlvid.models.heads import HEAD_FILE, Head
from rlvid.models.loading import load_model, part_of
from rlvid.models.lora import add_adapters, file_name, is_adapter
from rlvid.training.activations import on_host
from rlvid.training.adapters import ReferenceAdapters
from rlvid.training.batch import Group, check_arrays
from rlvid.training.checkpoint_writer import BackgroundWriter
from rlvid.training.collectives import most_of
from rlvid.training.depth_first import PromptPass
from rlvid.training.export import HEAD, write_checkpoint
from rlvid.training.micro_batches import MicroBatches, repeated, score
from rlvid.training.objectives import Objective
from rlvid.training.packing import PackedPolicy, PackedRow, PackedScorer, pack
from rlvid.training.parameters import NamedTensor, Part, in_parts, whole_shape
from rlvid.types import Prompt

# DeepSpeed would compile an operator on CPU, for `inference_all_reduce` alone: this says that none can be compiled.
deepspeed.ops.__compatible_ops__ = {}

NETWORK = "network."  # PackedPolicy's prefix before the checkpoint's parameter names


def deepspeed_config(cfg: TrainConfig, dtype: str, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings. The caller owns accumulation: any number of backwards, then one step."""
    offloads = cfg.offload_optimizer
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": cfg.max_grad_norm if cfg.zero_stage or dtype != "float32" else 0.0,  # see Learner._clip
        "zero_optimization": {"stage": cfg.zero_stage} | ({"offload_optimizer": {"device": "cpu"}} if offloads else {}),
        "zero_force_ds_cpu_optimizer": False,  # torch's optimizer on the CPU: nothing to compile
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 2**31 - 1,
    }


class Learner:
    """Policy, optimizer and the steps on them.

    Args:
        folder: Hugging Face checkpoint folder of the policy. With `model.lora` its weights are frozen and adapters
            are trained.
        head: of a reward model or a critic; the outputs are its scores in place of log-probs. Read from `folder` if it
            is there.
        is_policy: with a head too; the outputs are log-probs and values.
    """

    def __init__(
        self,
        folder: Path,
        family: ChatFamily,
        model: ModelConfig,
        cfg: TrainConfig,
        head: Head | None = None,
        is_policy: bool = False,
    ):
        self.cfg = cfg
        self._is_sharded = cfg.zero_stage == 3
        self.world_size = dist.get_world_size()
        settings = deepspeed_config(cfg, model.dtype, self.world_size)
        network = load_model(folder, model.dtype, settings if self._is_sharded else None)
        self.policy: PackedPolicy | PackedScorer = PackedPolicy(network, family)
        self.lora = model.lora
        if self.lora:
            add_adapters(self.policy.network, self.lora, family.no_lora)
        factors = {name: cfg.lr_factors.get(part_of(name, family), 1.0) for name, _ in network.named_parameters()}
        for name, parameter in network.named_parameters():
            if not factors[name]:
                parameter.requires_grad_(False)
        on_gpu = get_accelerator().device_name() == "cuda"
        if on_gpu if cfg.activation_checkpointing is None else cfg.activation_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self._head = head
        if head:
            self.policy = (PackedPolicy if is_policy else PackedScorer)(network, family, head)
            if self.policy.head is not None and (folder / HEAD_FILE).exists():
                head.load(self.policy.head, folder)
        named = self.policy.named_parameters()
        self._trained = [(name.removeprefix(NETWORK), p) for name, p in named if p.requires_grad]
        # A critic's head on a policy has a learning rate of its own, and so may have the parts of the network.
        alike = defaultdict(list)
        for name, p in self._trained:
            alike[is_policy and name.startswith(HEAD), factors.get(name, 1.0)].append(p)
        if not alike:
            raise UserError("train.lr_factors freezes the whole model, so there is nothing to train")
        self._rates = list(alike)
        # torch's own: nothing to compile. A loop over the adapters took a tenth of a small step on CPU.
        groups = [{"params": own} for own in alike.values()]
        adam = torch.optim.AdamW(groups, cfg.lr, cfg.betas, weight_decay=cfg.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(model=self.policy, optimizer=adam, config=settings)
        if self._is_sharded:
            self.policy.most = most_of(self.engine.device)
            if isinstance(self.policy, PackedPolicy):
                self.policy.prediction.shard()
        self.engine.train()  # transformers loads a network for inference, without activation checkpointing
        self.engine.checkpoint_engine = self._writer = BackgroundWriter()
        self.device = self.engine.device
        self._most = most_of(self.device)
        self.reference = ReferenceAdapters(self._trained if self.lora else [], self._is_sharded)
        self._clipped_norm: float | None = None
        self._skipped_in_a_row = 0
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            self.engine.optimizer.register_step_pre_hook(self._clip)

    def step(
        self, groups: Sequence[Group[Prompt]], objective: Objective, lr: float, head_lr: float | None = None
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of a mini-batch.

        Args:
            groups: at least one; their token weights belong to the whole mini-batch, over all ranks.
            head_lr: of a critic's head on the policy; default `lr`.

        Raises:
            ValueError: the groups lack an array that the objective needs.
            UserError: the last `train.max_skipped` steps were skipped.

        Returns:
            Means over the response tokens, or pairs, of all ranks (entropy, objective's statistics), `loss`,
            `grad_norm`, `lr`, and `skipped`: 1 if loss or gradient was not finite and nothing was changed. Of all
            ranks' forwards, `rows`: their number, `tokens`: what is predicted in them, and `fill`: the mean share of
            `train.micro_batch_tokens` that one has, above 1 where a single response is longer.
        """
        check_arrays(groups, objective.needs, type(objective).__name__)
        for parameters, (is_head, factor) in zip(self.engine.optimizer.param_groups, self._rates, strict=True):
            parameters["lr"] = factor * (head_lr or lr if is_head else lr)
        is_shared = self.cfg.shared_prefix and not self.policy.family.is_recurrent
        batches = MicroBatches.of(groups, self.cfg.micro_batch_tokens, is_shared)
        parts = [part for _, part in batches.parts]
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for row, is_counted in batches.whole_rows(self._most):
            chosen = [parts[i] for i in row]
            self._learn(pack(chosen).to(self.device), chosen, objective, is_counted, sums)
        for indices, is_own in batches.deep_groups(self._most):
            with on_host() if self.cfg.offload_activations else nullcontext():
                prompt = PromptPass(self.engine, parts[indices[0]].prompt, self.device)
            for i, is_first in repeated(indices, indices[0], self._most):
                part = parts[i].of_responses()  # all of an own one
                self._learn(prompt.row(part), [part], objective, is_own and is_first, sums)
                prompt.collect()
            self.engine.backward(prompt.loss())
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm()) if self._clipped_norm is None else self._clipped_norm
        means = self._means(sums)
        return means | {"grad_norm": norm, "lr": lr, "skipped": self._count_skipped(means["loss"], norm)}

    def _learn(
        self,
        row: PackedRow,
        groups: Sequence[Group[Prompt]],
        objective: Objective,
        is_counted: bool,
        sums: dict[str, Tensor],
    ) -> None:
        """Forward and backward of one row, and its statistics into `sums`. One that does not count has no gradient."""
        with on_host() if self.cfg.offload_activations else nullcontext():
            outputs, entropy = self.engine(row)
        loss, stats = objective(outputs, groups)
        # DeepSpeed averages gradients over ranks; the weights already average over the whole mini-batch.
        scale = float(self.world_size if is_counted else 0)
        # A loss that is not finite makes all gradients nan, so that every rank sees it in their common norm.
        self.engine.backward(loss * torch.where(loss.detach().isfinite(), scale, math.nan))
        if is_counted:
            fill = sum(group.cost for group in groups) / self.cfg.micro_batch_tokens
            counts = {"tokens": len(outputs), "rows": 1, "fill": fill}
            stats |= {"loss": loss.detach(), "entropy": entropy.sum()}
            stats |= {name: torch.tensor(float(count)) for name, count in counts.items()}
            for name, value in stats.items():
                sums[name] += value.to(self.device)

    def _count_skipped(self, loss: float, grad_norm: float) -> float:
        """1 if the optimizer left the step out, which DeepSpeed and `_clip` do where the gradient's norm is not finite.

        The norm is that of all ranks, so they agree.
        """
        self._skipped_in_a_row = 0 if math.isfinite(grad_norm) else self._skipped_in_a_row + 1
        if self._skipped_in_a_row >= self.cfg.max_skipped:
            raise UserError(
                f"{self._skipped_in_a_row} steps in a row were skipped because their loss or gradient was not finite "
                f"(the last loss: {loss:g}). Resume the run with a smaller train.lr, or with more train.max_skipped"
            )
        return float(self._skipped_in_a_row > 0)

    def outputs(self, groups: Sequence[Group[Prompt]], both: bool = False) -> list[npt.NDArray[np.float32]]:
        """Log-probs [sum R] of each group's response tokens under the current weights; with a head, or `both`, see
        `micro_batches.score`."""
        self.engine.eval()
        values = score(self.engine, groups, self.cfg.micro_batch_tokens, self.cfg.shared_prefix, self._most, both)
        self.engine.train()
        return values

    def reference_logprobs(self, groups: Sequence[Group[Prompt]]) -> list[npt.NDArray[np.float32]]:
        """Log-probs under the reference, which is this model with the adapters that `reference` keeps.

        Without adapters the reference is another model.
        """
        with self.reference.in_place():
            return self.outputs(groups)

    def weight_parts(self, part_bytes: int) -> Iterator[Part]:
        """What the engines need, as whole tensors in parts: the weights under the checkpoint's names, or the adapters
        under those of an adapter file. The contract is in rlvid/rollout/weights."""
        return in_parts(self._sent(), part_bytes, self._is_sharded)

    def weight_metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and whole shape of each tensor of `weight_parts`, in its order."""
        return [(name, p.dtype, whole_shape(p)) for name, p in self._sent()]

    def _sent(self) -> list[NamedTensor]:
        """The engines know no critic's head."""
        if self.lora:
            return [(file_name(name), p) for name, p in self._named() if is_adapter(name)]
        return [(name, p) for name, p in self._named() if not name.startswith(HEAD)]

    def _named(self) -> list[NamedTensor]:
        """All parameters under the checkpoint's names; those of a head begin with `HEAD`."""
        return [(name.removeprefix(NETWORK), p) for name, p in self.engine.module.named_parameters()]

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights and optimizer; `folder` is shared by all ranks.

        Raises:
            UserError: a weight is not finite.
        """
        self.begin_save(folder)
        self.end_save()

    def begin_save(self, folder: Path) -> None:
        """`save` up to a copy on the host, which a thread writes. Nothing may be loaded or saved until `end_save`."""
        self._check_finite()
        self.engine.save_checkpoint(str(folder), tag="state", exclude_frozen_parameters=self.lora is not None)

    @property
    def is_saved(self) -> bool:
        """Whether this rank's part is on the disk."""
        return self._writer.is_done

    def end_save(self) -> None:
        """Return when all ranks' parts are on the disk."""
        self._writer.wait()
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, on the same number of ranks under ZeRO."""
        path, _ = self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=self.lora is None)
        if path is None:
            raise FileNotFoundError(f"no trainer state in {folder}")

    def export(self, folder: Path, checkpoint: Path) -> None:
        """Write the policy as a Hugging Face checkpoint, tokenizer and processor copied from `checkpoint`. Rank 0
        writes. Adapters are merged into the weights, and are in `folder/adapter` by themselves too.

        Raises:
            UserError: a weight is not finite.
        """
        self._check_finite()
        network, family = self.engine.module.network, self.policy.family
        write_checkpoint(folder, checkpoint, network, family, self._named(), self._is_sharded, self.lora, self._head)

    def _check_finite(self) -> None:
        trained = [getattr(p, "ds_tensor", p) for _, p in self._trained]  # under ZeRO-3 this rank's share
        if self._most(sum(not tensor.isfinite().all() for tensor in trained)):
            raise UserError("the trained weights are not finite and are not saved: start a run with a smaller train.lr")

    def _clip(self, *_: object) -> None:
        """Clip reduced gradients where DeepSpeed hands the step to plain torch (ZeRO 0, float32).

        It would clip there too, but forgets the norm, and would take a step whose norm is not finite.
        """
        parameters = list(self.engine.module.parameters())
        self._clipped_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.cfg.max_grad_norm))
        if not math.isfinite(self._clipped_norm):
            for parameter in parameters:
                parameter.grad = None  # torch's optimizer leaves such a parameter alone

    def _means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        values = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(values)
        totals = dict(zip(names, values.tolist(), strict=True))
        counts = {name: totals.pop(name) for name in ("tokens", "pairs", "rows", "fill") if name in totals}
        means = {name: v / counts["pairs" if name.startswith("pair/") else "tokens"] for name, v in totals.items()}
        fill = counts["fill"] / counts["rows"]
        return means | {"loss": totals["loss"], "tokens": counts["tokens"], "rows": counts["rows"], "fill": fill}
