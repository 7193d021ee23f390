"""The trainer: one actor per rank around a `Learner`, and the driver's handle on all of them."""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.actor_process import enter_process
from actors.generator import SentBucket
from actors.gpu_weight_sync import ReplicaClient, weight_backend
from actors.placement import Placement, Slot
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.weights.buckets import BUCKET_BYTES, Bucket, to_buckets
from rlvid.rollout.weights.shared_memory import SharedBuckets
from rlvid.training.batch import Group
from rlvid.training.objectives import Objective
from rlvid.types import Prompt

logger = logging.getLogger(__name__)

GroupRef: TypeAlias = Group[ObjectRef[Prompt]]  # the prompt stays in the object store until a rank needs it


def fetch(groups: Sequence[GroupRef]) -> list[Group[Prompt]]:
    """Groups with their prompts, as views into the object store."""
    prompts = ray.get([g.prompt for g in groups])
    return [g.with_prompt(prompt) for prompt, g in zip(prompts, groups, strict=True)]


class TrainerRank:
    """One DeepSpeed rank. `start` meets the other ranks, so all are called at once."""

    def __init__(self, log_file: Path, threads: int | None, on_gpu: bool):
        enter_process(log_file, threads)
        self._on_gpu = on_gpu
        self._sender: Any = None
        self._shared: SharedBuckets | None = None
        self._node = str(ray.get_runtime_context().get_node_id())

    def address(self) -> str:
        """A free port on this node, for rank 0."""
        with socket.socket() as s:
            s.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{s.getsockname()[1]}"

    def start(self, address: str, rank: int, world_size: int, folder: Path, cfg: JobConfig) -> None:
        if not self._on_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
        import torch.distributed as dist

        from rlvid.models.families import load_family
        from rlvid.training.learner import Learner

        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
        dist.init_process_group(
            "nccl" if self._on_gpu else "gloo", init_method=f"tcp://{address}", rank=rank, world_size=world_size
        )
        self._checkpoint, self._cfg = folder, cfg
        self._learner = Learner(folder, load_family(folder), cfg.model, cfg.train)

    def step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        return self._learner.step(fetch(groups), objective, lr)

    def logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        return self._learner.outputs(fetch(groups))

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
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

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        self._learner.export(folder, self._checkpoint)


class TrainerGroup:
    """All ranks. Every call goes to all of them at once, since they meet in collectives."""

    def __init__(self, folder: Path, cfg: JobConfig, slots: Sequence[Slot], placement: Placement, logs: Path):
        self._ranks: list[ActorHandle[Any]] = [
            ray.remote(TrainerRank)
            .options(**placement.options(slot))
            .remote(logs / f"{slot.name}.log", cfg.placement.threads, slot.gpus > 0)
            for slot in slots
        ]
        self._log = logs / f"{slots[0].name}.log"
        self._started = self._start(folder, cfg)
        self._timeout_s = cfg.deadlines.train_s
        self.updates = 0  # how often the weights have changed

    def _start(self, folder: Path, cfg: JobConfig) -> list[ObjectRef[None]]:
        address = ray.get(self._ranks[0].address.remote())
        n = len(self._ranks)
        return [rank.start.remote(address, i, n, folder, cfg) for i, rank in enumerate(self._ranks)]

    def wait_ready(self) -> None:
        """Ranks start in the background, as the engines do; this waits for them and raises what they raised."""
        for minutes in itertools.count(1):
            try:
                ray.get(self._started, timeout=60)
                return
            except ray.exceptions.GetTimeoutError:
                logger.warning("the trainer has been starting for %d min; %s has what it does", minutes, self._log)

    def step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        """One optimizer step on a mini-batch. Statistics are those of `Learner.step`."""
        self.updates += 1
        shares = balance(groups, len(self._ranks))
        return self._all("step", [(share, objective, lr) for share in shares])[0]

    def logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        """Log-probs under the current weights, one array [sum R] per group, in the order given."""
        return self._score("logprobs", groups)

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        """Log-probs under the reference, which with adapters is part of the trainer."""
        return self._score("reference_logprobs", groups)

    def freeze_reference(self, file: Path) -> None:
        """From now on the reference has the current adapters; they are kept in `file`."""
        self._all("freeze_reference", [(file,)] * len(self._ranks))

    def load_reference(self, file: Path) -> None:
        self._all("load_reference", [(file,)] * len(self._ranks))

    def _score(self, method: str, groups: Sequence[GroupRef]) -> list[npt.NDArray[np.float32]]:
        if (missing := len(self._ranks) - len(groups)) > 0:  # every rank has to take part in the forward
            return self._score(method, [*groups, *(groups[0] for _ in range(missing))])[: len(groups)]
        order = balance_indices([g.cost for g in groups], len(self._ranks))
        values: list[npt.NDArray[np.float32] | None] = [None] * len(groups)
        calls = [([groups[i] for i in ix],) for ix in order]
        for indices, part in zip(order, self._all(method, calls), strict=True):
            for i, value in zip(indices, part, strict=True):
                values[i] = value
        return [v for v in values if v is not None]

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

    def save(self, folder: Path) -> None:
        self._all("save", [(folder,)] * len(self._ranks))

    def load(self, folder: Path) -> None:
        self.updates += 1
        self._all("load", [(folder,)] * len(self._ranks))

    def export(self, folder: Path) -> None:
        self._all("export", [(folder,)] * len(self._ranks))

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = [getattr(rank, method).remote(*args) for rank, args in zip(self._ranks, arguments, strict=True)]
        try:
            return list(ray.get(calls, timeout=self._timeout_s))
        except ray.exceptions.RayTaskError as e:
            raise e.as_instanceof_cause() from e

    def stop(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)


def balance(groups: Sequence[GroupRef], n: int) -> list[list[GroupRef]]:
    """Spread groups over n ranks by cost."""
    if len(groups) < n:
        raise UserError(f"{len(groups)} usable prompts in a step for {n} ranks: lower placement.trainer_workers")
    return [[groups[i] for i in share] for share in balance_indices([g.cost for g in groups], n)]


def balance_indices(costs: Sequence[int], n: int) -> list[list[int]]:
    """Indices of n shares of about equal cost, each with at least one where there are enough: largest first, to the
    lightest."""
    shares: list[list[int]] = [[] for _ in range(n)]
    loads = [(0, i) for i in range(n)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, lightest = heapq.heappop(loads)
        shares[lightest].append(i)
        heapq.heappush(loads, (load + costs[i], lightest))
    return [sorted(share) for share in shares]
