"""The trainer: one actor per rank around a `Learner`, and the driver's handle on all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.generator import SentBucket
from actors.gpu_weight_sync import ReplicaClient, weight_backend
from actors.placement import Placement, Slot
from actors.ranks import GroupRef, LogProbs, Rank, RankGroup, balance_indices, fetch
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.weights.buckets import BUCKET_BYTES, Bucket, to_buckets
from rlvid.rollout.weights.shared_memory import SharedBuckets
from rlvid.training.objectives import Objective


class TrainerRank(Rank):
    """One DeepSpeed rank."""

    def __init__(self, log_file: Path, threads: int | None, on_gpu: bool):
        super().__init__(log_file, threads, on_gpu)
        self._sender: Any = None
        self._shared: SharedBuckets | None = None
        self._node = str(ray.get_runtime_context().get_node_id())

    def start(self, address: str, rank: int, world_size: int, folder: Path, cfg: JobConfig) -> None:
        super().start(address, rank, world_size, folder, cfg)
        from rlvid.models.families import load_family
        from rlvid.training.learner import Learner

        self._learner = Learner(folder, load_family(folder), cfg.model, cfg.train)

    def step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        return self._learner.step(fetch(groups), objective, lr)

    def logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        return self._learner.outputs(fetch(groups))

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        return self._learner.reference_logprobs(fetch(groups))

    def freeze_reference(self, file: Path) -> None:
        self._learner.freeze_reference(file)

    def load_reference(self, file: Path) -> None:
        self._learner.load_reference(file)

    def put_weights(self, is_checked: bool, nodes: Collection[str]) -> Iterator[tuple[SentBucket, str | None]]:
        """Put the weights where the nodes can read them: (bucket, digest if asked for), each reported as soon as it is
        there. Rank 0 puts; under ZeRO-3 all ranks gather."""
        import torch.distributed as dist

        parts = self._learner.weight_parts(BUCKET_BYTES)
        if dist.get_rank() == 0:
            put: Callable[[Bucket], SentBucket] = ray.put
            if set(nodes) == {self._node}:
                self._shared = self._shared or SharedBuckets(self._node)
                self._shared.rewind()
                put = self._shared.write
            for bucket in to_buckets(parts):
                yield put(bucket), bucket.digest() if is_checked else None
        elif self._learner.cfg.zero_stage == 3:
            for _ in parts:
                pass

    def send_weights(self, version: int, replicas: Mapping[str, ActorHandle[Any]]) -> dict[str, str]:
        """Send the weights from GPU to GPU; see `GpuSender.send`."""
        import torch.distributed as dist

        from rlvid.rollout import vllm_plugin

        if self._sender is None:
            vllm_plugin.register()  # before the first import of vLLM
            from rlvid.rollout.weights.gpu_sender import GpuSender

            host, backend = ray.util.get_node_ip_address(), weight_backend(self._cfg)
            self._sender = GpuSender(
                backend, self._learner, dist.get_rank(), host, self._cfg, open_client=ReplicaClient
            )
        failed: dict[str, str] = self._sender.send(version, replicas)
        return failed

    def begin_save(self, folder: Path) -> None:
        self._learner.begin_save(folder)

    def is_saved(self) -> bool:
        return self._learner.is_saved

    def end_save(self) -> None:
        self._learner.end_save()

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder, self._checkpoint)


class TrainerGroup(RankGroup):
    """All ranks of the trainer."""

    def __init__(self, folder: Path, cfg: JobConfig, slots: Sequence[Slot], placement: Placement, logs: Path):
        super().__init__(TrainerRank, folder, cfg, slots, placement, logs)
        self.updates = 0  # how often the weights have changed

    def step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        """One optimizer step on a mini-batch. Statistics are those of `Learner.step`."""
        self.updates += 1
        shares = balance(groups, len(self._ranks))
        return dict(self._all("step", [(share, objective, lr) for share in shares])[0])

    def logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        """Log-probs under the current weights, one array [sum R] per group, in the order given."""
        return self._begin_scoring("logprobs", groups)()

    def begin_reference_logprobs(self, groups: Sequence[GroupRef]) -> Callable[[], LogProbs]:
        """Log-probs under the reference, which with adapters is part of the trainer. The function that is returned
        waits for them."""
        return self._begin_scoring("reference_logprobs", groups)

    def freeze_reference(self, file: Path) -> None:
        """From now on the reference has the current adapters; they are kept in `file`."""
        self._all("freeze_reference", [(file,)] * len(self._ranks))

    def load_reference(self, file: Path) -> None:
        self._all("load_reference", [(file,)] * len(self._ranks))

    def put_weights(self, is_checked: bool, nodes: Collection[str] = ()) -> Iterator[tuple[SentBucket, str | None]]:
        """The weights, with digests if they are to be checked on arrival. A bucket comes as soon as it is there, while
        the next is written.

        Args:
            nodes: who will read them. If that is the node of rank 0 alone they are in memory shared with it, until the
                next call; else in the object store.
        """
        streams = [rank.put_weights.remote(is_checked, nodes) for rank in self._ranks]
        try:
            for sent in streams[0]:
                yield ray.get(sent)
            ray.get([stream.completed() for stream in streams], timeout=self._timeout_s)
        except ray.exceptions.RayTaskError as e:
            raise e.as_instanceof_cause() from e

    def send_weights(self, version: int, replicas: Mapping[str, ActorHandle[Any]], timeout_s: float) -> dict[str, str]:
        """Send the weights from GPU to GPU. Returns the replicas that did not take them, with the reason.

        Raises:
            RuntimeError: no end within the deadline; a replica that fails in the middle leaves NCCL waiting forever.
        """
        calls = [rank.send_weights.remote(version, replicas) for rank in self._ranks]
        try:
            failed: dict[str, str] = ray.get(calls, timeout=timeout_s)[0]
        except ray.exceptions.GetTimeoutError as e:
            raise RuntimeError(
                f"weights {version} were not taken within deadlines.sync_s={timeout_s:g} by "
                f"{', '.join(replicas)}; start the job again, it resumes from its last checkpoint"
            ) from e
        return failed

    def begin_save(self, folder: Path) -> None:
        """Copy weights and optimizer to the host; they are written to `folder` in the background, until `end_save`."""
        self._all("begin_save", [(folder,)] * len(self._ranks))

    def is_saved(self) -> bool:
        """Whether all is written."""
        return all(self._all("is_saved"))

    def end_save(self) -> None:
        self._all("end_save")

    def load(self, folder: Path) -> None:
        self.updates += 1
        self._all("load", [(folder,)] * len(self._ranks))

    def export(self, folder: Path) -> None:
        self._all("export", [(folder,)] * len(self._ranks))


def balance(groups: Sequence[GroupRef], n: int) -> list[list[GroupRef]]:
    """Spread groups over n ranks by cost."""
    if len(groups) < n:
        raise UserError(f"{len(groups)} usable prompts in a step for {n} ranks: lower placement.trainer_workers")
    return [[groups[i] for i in share] for share in balance_indices([g.cost for g in groups], n)]
