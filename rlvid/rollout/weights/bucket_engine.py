"""vLLM's end of the `buckets` way, registered under that name by `vllm_plugin.py`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer import base
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlvid.rollout.weights.buckets import Bucket


@dataclass
class BucketInit(base.WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class BucketUpdate(base.WeightTransferUpdateInfo):
    """One bucket, as the worker receives it."""

    bucket: Bucket


class _Copies(TorchDispatchMode):
    """Records where a tensor, or parts of it, are copied to."""

    def __init__(self, source: Tensor):
        super().__init__()
        self._source = source
        self._targets: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        is_copy = func is torch.ops.aten.copy_.default
        if is_copy and args[1].untyped_storage().data_ptr() == self._source.untyped_storage().data_ptr():
            self._targets.append(args[0])
        return func(*args, **(kwargs or {}))

    def only_target(self, memory: Collection[int]) -> NDArray[np.uint8] | None:
        """Where in the parameters, whose storages begin at `memory`, the tensor was copied to as it is: once, whole, in
        its own order."""
        if len(self._targets) != 1 or self._targets[0].untyped_storage().data_ptr() not in memory:
            return None
        (target,) = self._targets
        as_it_is = target.shape == self._source.shape and target.dtype == self._source.dtype
        return target.detach().view(-1).view(torch.uint8).numpy() if as_it_is and target.is_contiguous() else None


class BucketEngine(base.WeightTransferEngine[BucketInit, BucketUpdate]):
    """Loads buckets into the worker's model.

    On CPU straight into its parameters (`vllm_plugin.keep_plain_weights`): vLLM's loading copies every weight to one
    place, always the same, so the first update records the places and the next ones copy there. On GPU, and where vLLM
    has packed linear weights anyway (bfloat16 on CPU) and left them empty, by its layerwise reload, which materialises
    each layer, loads it and packs it again.
    """

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        self._places: dict[str, tuple[str, NDArray[np.uint8]]] = {}  # sent name -> name in the model, memory

    def start_weight_update(self) -> None:
        self._awaited = {name for name, _ in self.model.named_parameters()}  # a tied head is named once
        self._is_plain = self.device.type == "cpu" and all(p.numel() for p in self.model.parameters())
        if not self._is_plain:
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronises torch.accelerator afterwards, which raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdate) -> None:
        if not self._is_plain:
            self._awaited -= self.model.load_weights(
                (name, tensor.to(self.device)) for name, tensor in update_info.bucket.tensors()
            )
            return
        memory: set[int] = set()
        for part, (name, tensor) in zip(update_info.bucket.parts, update_info.bucket.tensors(), strict=True):
            loaded_as, place = self._places.get(name, ("", None))
            if place is not None and place.nbytes == part.nbytes:
                np.copyto(place, part)
                self._awaited.discard(loaded_as)
                continue
            memory = memory or {p.untyped_storage().data_ptr() for p in self.model.parameters()}
            with _Copies(tensor) as copies:
                loaded = self.model.load_weights([(name, tensor)])
            self._awaited -= loaded
            if len(loaded) == 1 and (target := copies.only_target(memory)) is not None:
                self._places[name] = next(iter(loaded)), target

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
