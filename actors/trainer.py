"""The trainer: one actor per rank around a `Learner`, and the driver's handle on all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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

LOGPROBS, VALUES = "old_logprobs", "values"  # arrays of tokens that the trainer computes
CRITIC = "critic"  # folder, in a checkpoint and in a run


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
        from rlvid.models.heads import VALUE
        from rlvid.training.learner import Learner

        head = VALUE if cfg.critic == "shared" else None
        self._learner = Learner(folder, load_family(folder), cfg.model, cfg.train, head, is_policy=True)
        self._critic: Learner | None = None
        if cfg.critic == "own":
            self._critic_folder = cfg.critic_path or folder
            family = load_family(self._critic_folder)
            if family.tokenizer.get_vocab() != load_family(folder).tokenizer.get_vocab():
                raise UserError(
                    f"ppo.critic_path: {self._critic_folder} has another tokenizer than the policy in {folder}, whose "
                    f"prompts and responses the critic reads: give a model of the same family"
                )
            self._critic = Learner(self._critic_folder, family, cfg.model, cfg.train, VALUE)

    def step(
        self, groups: Sequence[GroupRef], objective: Objective, lr: float, head_lr: float | None = None
    ) -> dict[str, float]:
        return self._learner.step(fetch(groups), objective, lr, head_lr)

    def critic_step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        assert self._critic is not None
        return self._critic.step(fetch(groups), objective, lr)

    def scores(self, groups: Sequence[GroupRef], names: Collection[str]) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Log-probs and values, in one pass where one network has both."""
        loaded = fetch(groups)
        found: list[dict[str, npt.NDArray[np.float32]]] = [{} for _ in loaded]
        if LOGPROBS in names or self._critic is None:
            for own, outputs in zip(found, self._learner.outputs(loaded), strict=True):
                own |= zip((LOGPROBS, VALUES), outputs.reshape(len(outputs), -1).T, strict=False)
        if VALUES in names and self._critic is not None:
            for own, outputs in zip(found, self._critic.outputs(loaded), strict=True):
                own[VALUES] = outputs[:, 0]
        return [{name: np.ascontiguousarray(own[name]) for name in names} for own in found]

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        outputs = self._learner.reference_logprobs(fetch(groups))
        return [own if own.ndim == 1 else np.ascontiguousarray(own[:, 0]) for own in outputs]

    def freeze_reference(self, file: Path) -> None:
        self._learner.reference.freeze(file)

    def load_reference(self, file: Path) -> None:
        self._learner.reference.load(file)

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
        if self._critic is not None:
            self._critic.begin_save(folder / CRITIC)

    def is_saved(self) -> bool:
        return self._learner.is_saved and (self._critic is None or self._critic.is_saved)

    def end_save(self) -> None:
        self._learner.end_save()
        if self._critic is not None:
            self._critic.end_save()

    def load(self, folder: Path) -> None:
        self._learner.load(folder)
        if self._critic is not None:
            self._critic.load(folder / CRITIC)

    def export(self, folder: Path) -> None:
        self._learner.export(folder, self._checkpoint)

    def export_critic(self, folder: Path) -> None:
        assert self._critic is not None
        self._critic.export(folder, self._critic_folder)


class TrainerGroup(RankGroup):
    """All ranks of the trainer."""

    def __init__(self, folder: Path, cfg: JobConfig, slots: Sequence[Slot], placement: Placement, logs: Path):
        super().__init__(TrainerRank, folder, cfg, slots, placement, logs)
        self.updates = 0  # how often the weights have changed
        self.has_own_critic = cfg.critic == "own"

    def step(
        self, groups: Sequence[GroupRef], objective: Objective, lr: float, head_lr: float | None = None
    ) -> dict[str, float]:
        """One optimizer step of the policy on a mini-batch. Statistics are those of `Learner.step`."""
        self.updates += 1
        shares = balance(groups, len(self._ranks))
        return dict(self._all("step", [(share, objective, lr, head_lr) for share in shares])[0])

    def critic_step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        """The same of a critic of its own."""
        shares = balance(groups, len(self._ranks))
        return dict(self._all("critic_step", [(share, objective, lr) for share in shares])[0])

    def scored(self, groups: Sequence[GroupRef], *names: str) -> list[GroupRef]:
        """The groups with arrays of their tokens under the current weights: `LOGPROBS`, `VALUES`, or both."""
        scores = self._begin_scoring("scores", groups, names)()
        return [group.with_tokens(**own) for group, own in zip(groups, scores, strict=True)]

    def logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        """Log-probs under the current weights, one array [sum R] per group, in the order given."""
        return [group.tokens[LOGPROBS] for group in self.scored(groups, LOGPROBS)]

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
        except ray.exceptions.RayError:
            self._get([stream.completed() for stream in streams])  # raises it as what it is
            raise
        self._get([stream.completed() for stream in streams])

    def send_weights(self, version: int, replicas: Mapping[str, ActorHandle[Any]], timeout_s: float) -> dict[str, str]:
        """Send the weights from GPU to GPU. Returns the replicas that did not take them, with the reason.

        Raises:
            RuntimeError: no end within the deadline; a replica that fails in the middle leaves NCCL waiting forever.
        """
        calls = [rank.send_weights.remote(version, replicas) for rank in self._ranks]
        try:
            failed: dict[str, str] = self._get(calls, timeout_s)[0]
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

    def export_critic(self, folder: Path) -> None:
        self._all("export_critic", [(folder,)] * len(self._ranks))


def balance(groups: Sequence[GroupRef], n: int) -> list[list[GroupRef]]:
    """Spread groups over n ranks by cost."""
    if len(groups) < n:
        raise UserError(f"{len(groups)} usable prompts in a step for {n} ranks: lower placement.trainer_workers")
    return [[groups[i] for i in share] for share in balance_indices([g.cost for g in groups], n)]
