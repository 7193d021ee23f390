"""Weights as a few flat buckets, from the trainer through shared memory into vLLM.

The trainer cuts its parameters into buckets of bytes (`rlvid/training/buckets.py`); Ray's object store carries them
without a copy; vLLM's weight-transfer API takes them in through `BucketEngine`, registered under the name "buckets" by
`vllm_plugin.py`. Never one call per parameter. It works on GPUs too (one copy to the device). vLLM's own `nccl` and
`ipc` engines take their weights from the trainer as a `LearnerSource`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlvid.training.buckets import Bucket

if TYPE_CHECKING:
    from torch import Tensor

    from rlvid.training.learner import Learner


@dataclass
class BucketInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket, as the worker receives it."""

    bucket: Bucket


class BucketEngine(WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads buckets into the worker's model.

    On CPU straight into its parameters, one copy (`vllm_plugin.keep_plain_weights`). On GPU, and where vLLM has packed
    linear weights all the same (bfloat16 on CPU) and left them empty, by its layerwise reload, which materialises each
    layer, loads it and packs it again.
    """

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self._awaited = {name for name, _ in self.model.named_parameters()}  # a tied head is not named twice
        self._is_plain = self.device.type == "cpu" and all(p.numel() for p in self.model.parameters())
        if not self._is_plain:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises torch.accelerator afterwards, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdate) -> None:
        self._awaited -= self.model.load_weights(
            (name, tensor.to(self.device)) for name, tensor in update_info.bucket.tensors()
        )

    def finish_weight_update(self) -> None:
        if not self._is_plain:
            finalize_layerwise_reload(self.model, self.model_config)
        if self._awaited:  # vLLM would only warn, and serve these with their old values
            raise RuntimeError(f"{len(self._awaited)} weights did not arrive, for example {min(self._awaited)}")
        # A head tied to the embedding is not in the checkpoint, so the reload leaves it alone; where it computes with a
        # packed copy of its own, that would keep the old weights (log-probs off by 0.9 in a test).
        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        pass


class LearnerSource(WeightSource):
    """A trainer rank's weights for vLLM's own senders. vLLM's `ModuleSource` does not know DeepSpeed's ZeRO-3."""

    def __init__(self, learner: Learner):
        self._learner = learner

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*row) for row in self._learner.shapes()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._learner.weights()

    @property
    def largest_bytes(self) -> int:
        return max(math.prod(meta.shape) * meta.dtype.itemsize for meta in self.metadata())
