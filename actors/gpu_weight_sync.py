"""Weights from GPU to GPU: vLLM's own `nccl` and `ipc` transfers between trainer ranks and generator replicas.

On CPU, and for adapters, weights go through the object store instead (`TrainerGroup.put_weights`). Not yet run on a
GPU.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.actor import ActorHandle

from rlvid.config import JobConfig

if TYPE_CHECKING:
    from rlvid.training.learner import Learner

WeightBackend = Literal["buckets", "nccl", "ipc"]
PACKED_BYTES = 256 * 2**20  # of the staging buffers on the GPU; vLLM's default of 1 GiB, twice, is room for sequences


def weight_backend(cfg: JobConfig) -> WeightBackend:
    """How this job's weights travel.

    `ipc` where every replica lies on the GPU of a trainer rank. `nccl` where none does: NCCL takes a GPU only once.
    """
    place = cfg.placement
    if cfg.rollout.weight_transfer != "auto":
        return cfg.rollout.weight_transfer
    if not place.gpus or cfg.model.lora:
        return "buckets"
    if place.colocate and place.gpus <= 1:
        return "ipc" if cfg.rollout.replicas <= place.trainer_workers else "buckets"
    return "nccl" if place.gpus >= 1 else "buckets"


class ReplicaClient:
    """The replicas of one transfer, as vLLM's trainer side wants them (`VLLMWeightSyncClient`): each call reaches all
    of them at once. One that fails is asked nothing more and stands in `failed`.

    Args:
        gpus_each: ranks that a replica has in the NCCL group; vLLM's own client gives all replicas the same ones.
    """

    def __init__(self, replicas: Mapping[str, ActorHandle[Any]], gpus_each: int, timeout_s: float):
        self._replicas = dict(replicas)
        self._gpus_each, self._timeout_s = gpus_each, timeout_s
        self.failed: dict[str, str] = {}
        self.version = -1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self._replicas]
        if "rank_offset" in init_info:
            for i, info in enumerate(infos):
                info["rank_offset"] += i * self._gpus_each
        self._all("init_transfer", infos)

    def start_weight_update(self) -> None:
        self._all("start_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._all("receive_update", [update_info] * len(self._replicas))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_update", [self.version] * len(self._replicas))

    def _all(self, step: str, arguments: Sequence[Any] | None = None) -> None:
        calls = {}
        for i, (name, replica) in enumerate(self._replicas.items()):
            if name not in self.failed:
                calls[name] = replica.transfer.remote(step, *([] if arguments is None else [arguments[i]]))
        deadline_s = time.monotonic() + self._timeout_s
        for name, call in calls.items():
            try:
                ray.get(call, timeout=max(0.0, deadline_s - time.monotonic()))
            except Exception as e:
                self.failed[name] = f"{step}: {e}"


class WeightSender:
    """One trainer rank's end. Every rank makes the same calls; rank 0 sends, the others help to gather.

    A NCCL group cannot change, so other replicas than last time (one that restarted, say) are met anew.
    """

    def __init__(self, backend: WeightBackend, learner: Learner, rank: int, cfg: JobConfig):
        from rlvid.rollout import vllm_plugin

        vllm_plugin.register()  # before the first import of vLLM
        from rlvid.rollout.weight_transfer import LearnerSource

        self._backend, self._rank, self._cfg = backend, rank, cfg.rollout
        self._source = LearnerSource(learner)
        self._members: tuple[str, ...] = ()
        self._engine: Any = None

    def send(self, version: int, replicas: Mapping[str, ActorHandle[Any]]) -> dict[str, str]:
        """Send the weights; those replicas that did not take them, with the reason."""
        if self._engine is None or self._members != tuple(replicas):
            self._meet(replicas)
        self._client.version = version
        self._engine.send_weights()
        if self._client.failed:
            self._members = ()
        return self._client.failed

    def _meet(self, replicas: Mapping[str, ActorHandle[Any]]) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        if self._engine is not None:
            self._engine.shutdown()
        self._client = ReplicaClient(replicas, self._cfg.tensor_parallel, self._cfg.sync_timeout_s)
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self._init_info(len(replicas)), client=self._client, source=self._source
        )
        self._members = tuple(replicas)

    def _init_info(self, n_replicas: int) -> Any:
        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            room = max(PACKED_BYTES, self._source.largest_bytes)  # a tensor has to fit into the buffer
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=room, rank=self._rank)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=port,
            world_size=1 + n_replicas * self._cfg.tensor_parallel,
            packed_buffer_size_bytes=PACKED_BYTES,
            rank=self._rank,
        )
