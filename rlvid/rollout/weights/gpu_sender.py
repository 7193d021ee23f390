"""The trainer's end of vLLM's own `nccl` and `ipc` transfers. Not yet run on a GPU.

Import it only after `vllm_plugin.register()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from rlvid.config import JobConfig
from rlvid.rollout.weights.buckets import BUCKET_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from rlvid.training.learner import Learner

PACKED_BYTES = 256 * 2**20  # of the staging buffers on the GPU; vLLM's default of 1 GiB, twice, is room for sequences


class LearnerSource(WeightSource):
    """A trainer rank's weights as vLLM's senders take them. vLLM's `ModuleSource` does not know DeepSpeed's ZeRO-3."""

    def __init__(self, learner: Learner):
        self._learner = learner

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*row) for row in self._learner.weight_metadata()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for part, _ in self._learner.weight_parts(BUCKET_BYTES):
            for name, parameter in part:
                yield name, parameter.data  # another reference: ZeRO-3 empties the parameter after the part

    @property
    def largest_bytes(self) -> int:
        return max(math.prod(meta.shape) * meta.dtype.itemsize for meta in self.metadata())


@dataclass
class GpuSender:
    """One trainer rank's end. Every rank makes the same calls; rank 0 sends, the others help to gather.

    A NCCL group cannot change its members, so other replicas than last time (a restarted one, for example) need a new
    group.
    """

    backend: str
    learner: Learner
    rank: int
    host: str  # address of this machine
    cfg: JobConfig
    # (replicas, GPUs of each, deadline in seconds) -> vLLM's `VLLMWeightSyncClient`, with `version` to set and
    # `failed`, the replicas that did not take the weights, with the reason.
    open_client: Callable[[Mapping[str, Any], int, float], Any]
    _members: tuple[str, ...] = ()
    _engine: Any = None
    _client: Any = None

    def send(self, version: int, replicas: Mapping[str, Any]) -> dict[str, str]:
        """Send the weights. It has no deadline of its own: the caller's call has one.

        Returns:
            The replicas that did not take them, with the reason.
        """
        if self._members != tuple(replicas):
            if self._engine is not None:
                self._engine.shutdown()
            self._client = self.open_client(replicas, self.cfg.rollout.tensor_parallel, self.cfg.deadlines.sync_s)
            source = LearnerSource(self.learner)
            info = self._init_info(source, len(replicas))
            self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)
        self._client.version = version
        self._engine.send_weights()
        self._members = () if self._client.failed else tuple(replicas)
        return dict(self._client.failed)

    def _init_info(self, source: LearnerSource, n_replicas: int) -> IPCTrainerInitInfo | NCCLTrainerInitInfo:
        if self.backend == "ipc":
            room = max(PACKED_BYTES, source.largest_bytes)  # a tensor has to fit into the buffer
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=room, rank=self.rank)
        return NCCLTrainerInitInfo(
            master_address=self.host,
            master_port=get_open_port(),
            world_size=1 + n_replicas * self.cfg.rollout.tensor_parallel,
            packed_buffer_size_bytes=PACKED_BYTES,
            rank=self.rank,
        )
