"""Ray's side of the weights from GPU to GPU: which way a job takes, and the replicas as vLLM's sender calls them.

The contract is in rlvid/rollout/weights. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from rlvid.config import JobConfig

WeightBackend = Literal["buckets", "nccl", "ipc"]


def weight_backend(cfg: JobConfig) -> WeightBackend:
    """How this job's weights travel.

    `ipc` where every replica is on the GPU of a trainer rank. `nccl` where none is: NCCL takes a GPU only once.
    """
    place = cfg.placement
    if cfg.rollout.weight_transfer != "auto":
        return cfg.rollout.weight_transfer
    if not place.gpus or cfg.model.lora:
        return "buckets"
    if place.colocate:
        is_fixed = (cfg.rollout.max_replicas or 0) <= cfg.rollout.replicas
        return "ipc" if is_fixed and cfg.rollout.replicas <= place.trainer_workers else "buckets"
    return "nccl" if place.gpus >= 1 else "buckets"


class ReplicaClient:
    """The replicas of one transfer, as vLLM's trainer side calls them (`VLLMWeightSyncClient`): each call reaches all
    of them at once. A replica that fails gets no further calls; `failed` has the reason.

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
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=self._timeout_s)
        for name, call in calls.items():
            try:
                ray.get(call, timeout=0)
            except Exception as e:
                self.failed[name] = f"{step}: {e}"
