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
from actors.placement import Placement
from actors.ranks import GroupRef, LogProbs, Rank, RankGroup, balance_indices, fetch
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.weights.buckets import BUCKET_BYTES, Bucket, to_buckets
from rlvid.rollout.weights.shared_memory import SharedBuckets
from rlvid.training.objectives import Objective

LOGPROBS, VALUES = "old_logprobs", "values"  # arrays of tokens that the trainer computes
POLICY, CRITIC = "", "critic"  # the models of a trainer, by their folder in a checkpoint


class TrainerRank(Rank):
    """One DeepSpeed rank: the policy, and a critic where it has a network of its own."""

    def start(self, address: str, rank: int, world_size: int, folder: Path, cfg: JobConfig) -> None:
        super().start(address, rank, world_size, folder, cfg)
        from rlvid.models.families import load_family
        from rlvid.models.heads import VALUE
        from rlvid.training.learner import Learner

        self._sender: Any = None
        self._shared: SharedBuckets | None = None
        self._node = str(ray.get_runtime_context().get_node_id())
        family, head = load_family(folder), VALUE if cfg.critic == "shared" else None
        self._policy = Learner(folder, family, cfg.model, cfg.train, head, is_policy=True)
        self._learners, self._sources = {POLICY: self._policy}, {POLICY: folder}
        if cfg.critic == "own":
            source = cfg.critic_path or folder
            critic_family = load_family(source)
            if critic_family.tokenizer.get_vocab() != family.tokenizer.get_vocab():
                raise UserError(
                    f"ppo.critic_path: {source} has another tokenizer than the policy in {folder}, whose "
                    f"prompts and responses the critic reads: give a model of the same family"
                )
            self._learners[CRITIC] = Learner(source, critic_family, cfg.model, cfg.train, VALUE)
            self._sources[CRITIC] = source

    def step(self, model: str, groups: Sequence[GroupRef], *arguments: Any) -> dict[str, float]:
        return self._learners[model].step(fetch(groups), *arguments)

    def scores(self, groups: Sequence[GroupRef], names: Collection[str]) -> list[dict[str, npt.NDArray[np.float32]]]:
        """Log-probs and values, in one pass where one network has both."""
        loaded = fetch(groups)
        found: list[dict[str, npt.NDArray[np.float32]]] = [{} for _ in loaded]
        critic = self._learners.get(CRITIC)
        if LOGPROBS in names or critic is None:
            for own, outputs in zip(found, self._policy.outputs(loaded), strict=True):
                own |= zip((LOGPROBS, VALUES), outputs.reshape(len(outputs), -1).T, strict=False)
        if VALUES in names and critic is not None:
            for own, outputs in zip(found, critic.outputs(loaded), strict=True):
                own[VALUES] = outputs[:, 0]
        return [{name: np.ascontiguousarray(own[name]) for name in names} for own in found]

    def reference_logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        outputs = self._policy.reference_logprobs(fetch(groups))
        return [own if own.ndim == 1 else np.ascontiguousarray(own[:, 0]) for own in outputs]

    def freeze_reference(self, file: Path, is_resumed: bool) -> None:
        reference = self._policy.reference
        (reference.load if is_resumed else reference.freeze)(file)

    def put_weights(self, is_checked: bool, nodes: Collection[str]) -> Iterator[tuple[SentBucket, str | None]]:
        """Put the weights where the nodes can read them: (bucket, digest if asked for), each reported as soon as it is
        there. Rank 0 puts; under ZeRO-3 all ranks gather."""
        import torch.distributed as dist

        parts = self._policy.weight_parts(BUCKET_BYTES)
        if dist.get_rank() == 0:
            put: Callable[[Bucket], SentBucket] = ray.put
            if set(nodes) == {self._node}:
                self._shared = self._shared or SharedBuckets(self._node)
                self._shared.rewind()
                put = self._shared.write
            for bucket in to_buckets(parts):
                yield put(bucket), bucket.digest() if is_checked else None
        elif self._policy.cfg.zero_stage == 3:
            for _ in parts:
                pass

    def send_weights(self, version: int, replicas: Mapping[str, ActorHandle[Any]]) -> dict[str, str]:
        """Send the weights from GPU to GPU; see `GpuSender.send`."""
        import torch.distributed as dist

        from rlvid.rollout import vllm_plugin

        if self._sender is None:
            vllm_plugin.register()  # before the first import of vLLM
            from rlvid.rollout.weights.gpu_sender import GpuSender

            backend, rank, host = weight_backend(self._cfg), dist.get_rank(), ray.util.get_node_ip_address()
            self._sender = GpuSender(backend, self._policy, rank, host, self._cfg, open_client=ReplicaClient)
        return dict(self._sender.send(version, replicas))

    def begin_save(self, folder: Path) -> None:
        for name, learner in self._learners.items():
            learner.begin_save(folder / name)

    def is_saved(self) -> bool:
        return all(learner.is_saved for learner in self._learners.values())

    def end_save(self) -> None:
        for learner in self._learners.values():
            learner.end_save()

    def load(self, folder: Path) -> None:
        for name, learner in self._learners.items():
            learner.load(folder / name)

    def export(self, model: str, folder: Path) -> None:
        self._learners[model].export(folder, self._sources[model])


class TrainerGroup(RankGroup):
    """All ranks of the trainer."""

    def __init__(self, folder: Path, placement: Placement):
        super().__init__("trainer", TrainerRank, folder, placement)
        self.updates = 0  # how often the weights have changed
        self.has_own_critic = placement.cfg.critic == "own"

    def step(
        self, groups: Sequence[GroupRef], objective: Objective, lr: float, head_lr: float | None = None
    ) -> dict[str, float]:
        """One optimizer step of the policy on a mini-batch. Statistics are those of `Learner.step`."""
        self.updates += 1
        return self._step(POLICY, groups, objective, lr, head_lr)

    def critic_step(self, groups: Sequence[GroupRef], objective: Objective, lr: float) -> dict[str, float]:
        """The same of a critic of its own."""
        return self._step(CRITIC, groups, objective, lr)

    def _step(self, model: str, groups: Sequence[GroupRef], *arguments: Any) -> dict[str, float]:
        shares = balance(groups, len(self._ranks))
        return dict(self._begin("step", [(model, share, *arguments) for share in shares])()[0])

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

    def freeze_reference(self, file: Path, is_resumed: bool) -> None:
        """From now on the reference has the current adapters, kept in `file`; in a resumed run those of the file."""
        self._all("freeze_reference", file, is_resumed)

    def put_weights(self, is_checked: bool, nodes: Collection[str] = ()) -> Iterator[tuple[SentBucket, str | None]]:
        """The weights, with digests if they are to be checked on arrival. A bucket comes as soon as it is there, while
        the next is written.

        Args:
            nodes: who will read them. If that is the node of rank 0 alone they are in memory shared with it, until the
                next call; else in the object store.
        """
        streams = [rank.put_weights.remote(is_checked, nodes) for rank in self._ranks]
        ends = [stream.completed() for stream in streams]
        try:
            for sent in streams[0]:
                yield ray.get(sent)
        except ray.exceptions.RayError:
            self._get(ends)  # raises it as what it is
            raise
        self._get(ends)

    def send_weights(self, version: int, replicas: Mapping[str, ActorHandle[Any]], timeout_s: float) -> dict[str, str]:
        """Send the weights from GPU to GPU. Returns the replicas that did not take them, with the reason.

        Raises:
            RuntimeError: no end within the deadline; a replica that fails in the middle leaves NCCL waiting forever.
        """
        calls = [rank.send_weights.remote(version, replicas) for rank in self._ranks]
        try:
            return dict(self._get(calls, timeout_s)[0])
        except ray.exceptions.GetTimeoutError as e:
            raise RuntimeError(
                f"weights {version} were not taken within deadlines.sync_s={timeout_s:g} by "
                f"{', '.join(replicas)}; start the job again, it resumes from its last checkpoint"
            ) from e

    def begin_save(self, folder: Path) -> None:
        """Copy weights and optimizer to the host; they are written to `folder` in the background, until `end_save`."""
        self._all("begin_save", folder)

    def is_saved(self) -> bool:
        """Whether all is written."""
        return all(self._all("is_saved"))

    def end_save(self) -> None:
        self._all("end_save")

    def load(self, folder: Path) -> None:
        self.updates += 1
        self._all("load", folder)

    def export(self, folder: Path) -> None:
        self._all("export", POLICY, folder)

    def export_critic(self, folder: Path) -> None:
        self._all("export", CRITIC, folder)


def balance(groups: Sequence[GroupRef], n: int) -> list[list[GroupRef]]:
    """Spread groups over n ranks by cost."""
    if len(groups) < n:
        raise UserError(f"{len(groups)} usable prompts in a step for {n} ranks: lower placement.trainer_workers")
    return [[groups[i] for i in share] for share in balance_indices([g.cost for g in groups], n)]
