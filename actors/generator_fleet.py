"""The generator fleet: Ray calls on behalf of the state machine in `actors/fleet_state.py`.

All calls in flight lie in one table; `_pump` waits for any of them and reports to the state machine what came of it.
A replica that dies is started again in the background, takes the current weights, and joins; its work is handed out
again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.clip_store import Encoded
from actors.fleet_state import Fleet, ReplicaId, State
from actors.generator import CONCURRENCY_GROUPS, Generator, SentBucket
from actors.gpu_weight_sync import weight_backend
from actors.placement import Placement, Slot
from actors.trainer import TrainerGroup
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Rollout

logger = logging.getLogger(__name__)
PING_EVERY_S = 10.0
CHECKPOINT_VERSION = -1  # what an engine calls the weights of its start


@ray.remote(num_cpus=0)
def _digest(bucket: Bucket | SharedBucket) -> str:
    return (bucket.open() if isinstance(bucket, SharedBucket) else bucket).digest()


def _digest_of(sent: SentBucket) -> str:
    if not isinstance(sent, SharedBucket):
        return str(ray.get(_digest.remote(sent)))
    there = NodeAffinitySchedulingStrategy(sent.machine, soft=False)
    return str(ray.get(_digest.options(scheduling_strategy=there).remote(sent)))


@dataclass(frozen=True)
class _Call:
    """What was asked of whom, and until when the answer has to come."""

    kind: str  # "start" | "sync" | "ping" | "generate"
    replica: ReplicaId
    deadline_s: float
    detail: Any = None  # sync: the version; generate: the work items


class GeneratorFleet:
    """Replicas that hold the policy's current weights and answer prompts.

    Raises (from every method that waits):
        UserError: no replica is left, or the engine cannot serve this checkpoint.
    """

    def __init__(
        self, folder: Path, cfg: JobConfig, slots: Sequence[Slot], placement: Placement, logs: Path, seed: int
    ):
        self._folder, self._cfg, self._placement, self._logs, self._seed = folder, cfg, placement, logs, seed
        self._slots = slots
        self.fleet: Fleet[int] = Fleet(len(slots), max_restarts=cfg.rollout.max_restarts)
        self._actors: dict[ReplicaId, ActorHandle[Any]] = {}
        self._calls: dict[ObjectRef[Any], _Call] = {}
        self._backend = weight_backend(cfg)
        self._trainer: TrainerGroup | None = None
        self._updates = 0  # of the trainer, when it gave the current version
        self._weights: list[tuple[SentBucket, str | None]] = []  # of the current version, as far as they are put
        self._nodes: dict[ReplicaId, str] = {}
        self._sent: dict[ReplicaId, tuple[int, int]] = {}  # version, and how many of its buckets
        self._work: dict[int, tuple[Encoded, Any]] = {}  # item -> prompt and sampling
        self._results: dict[int, list[Rollout]] = {}
        self._checked: set[ReplicaId] = set()  # lives whose first weights had the right checksum
        self._next_item = 0
        self._pinged_s = time.monotonic()
        for replica in self.fleet.members():
            self._start(replica)

    def wait_ready(self) -> None:
        """Wait until no replica is starting."""
        while self.fleet.members(State.STARTING):
            self._pump()

    def serve_checkpoint(self) -> None:
        """Serve the weights that the replicas were started with."""
        self.fleet.publish(CHECKPOINT_VERSION)
        while not self.fleet.members(State.READY):
            self._pump()

    def sync(self, trainer: TrainerGroup, version: int) -> None:
        """Send the trainer's weights to every replica; returns when all that live have taken them.

        Args:
            version: counts up; the number of training steps behind the weights.
        """
        while any(call.kind == "sync" for call in self._calls.values()):
            self._pump()  # a replica that came late still reads the version before, from where the next is written
        self._weights, self._trainer, self._updates = [], trainer, trainer.updates
        self.fleet.publish(version)
        if self._backend == "buckets":
            is_checked = any(replica not in self._checked for replica in self.fleet.members())
            nodes = {self._nodes[replica] for replica in self.fleet.members() if replica in self._nodes}
            for sent in trainer.put_weights(is_checked, nodes):
                self._weights.append(sent)
                self._refresh()  # the replicas load it while the trainer writes the next
        while self.fleet.members(State.STALE, State.SUSPECT) or not self.fleet.members(State.READY):
            self._pump()

    def generate(self, prompts: Sequence[Encoded], sampling: Any) -> list[list[Rollout]]:
        """`sampling.n` responses to each prompt, in the order given. Lost work is done again, none counts twice."""
        items = range(self._next_item, self._next_item + len(prompts))
        self._next_item = items.stop
        self._work = {item: (prompt, sampling) for item, prompt in zip(items, prompts, strict=True)}
        self._hand_out(items)
        while not self.fleet.is_idle:
            self._pump()
        self._work = {}
        return [self._results.pop(item) for item in items]

    def first_logprobs(self, prompt: Encoded, tokens: Sequence[int], temperature: float) -> npt.NDArray[np.float32]:
        """Log-probs of `tokens` as first response token, by the first ready replica (parity check)."""
        actor = self._actors[self.fleet.members(State.READY)[0]]
        call = actor.first_logprobs.remote(prompt.prompt, tokens, temperature)
        values: npt.NDArray[np.float32] = ray.get(call, timeout=self._cfg.rollout.timeout_s)
        return values

    def metrics(self) -> dict[str, float]:
        counters = self.fleet.counters
        return {
            "fleet/ready": len(self.fleet.members(State.READY)),
            "fleet/restarts": counters.restarts,
            "fleet/reassigned": counters.reassigned,
            "fleet/dropped_late": counters.dropped_late,
        }

    def stop(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    def _start(self, replica: ReplicaId) -> None:
        slot = self._slots[replica.slot]
        log = self._logs / f"generator-{replica}.log"
        actor = (
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Generator)
            .options(max_concurrency=4, **self._placement.options(slot))
            .remote(log, self._cfg.placement.threads)
        )
        self._actors[replica] = actor
        # Another seed in each life and slot: two engines must not sample the same noise.
        seed = self._seed + 1000 * replica.slot + replica.life
        self._track(
            actor.start.remote(self._folder, self._cfg, slot.gpus > 0, seed),
            "start",
            replica,
            self.fleet.deadlines.start_s,
        )

    def _refresh(self) -> None:
        """Every living replica without the current weights is sent each bucket once; the first time with checksums."""
        version, stale = self.fleet.version, self.fleet.members(State.STALE)
        if version is None or not stale:
            return
        if version == CHECKPOINT_VERSION:
            for replica in stale:
                self.fleet.synced(replica, version)
        elif self._backend == "buckets":
            for replica in stale:
                self._send(replica, version)
        else:
            self._send_directly(stale, version)

    def _send(self, replica: ReplicaId, version: int) -> None:
        """One message for each bucket that the replica has not been sent."""
        if self._sent.get(replica) == (version, len(self._weights)):
            return  # most calls by far: each answer of one replica looks at all
        if any(isinstance(sent, SharedBucket) and sent.machine != self._nodes[replica] for sent, _ in self._weights):
            if not self._has_trainer_this_version:
                return
            assert self._trainer is not None
            self._weights = list(self._trainer.put_weights(is_checked=True))  # in the object store
        last_version, count = self._sent.get(replica, (version, 0))
        count = count if last_version == version else 0
        if replica not in self._checked and count < len(self._weights):
            self._weights = [(sent, digest or _digest_of(sent)) for sent, digest in self._weights]
        for sent in self._weights[count:]:
            ref = self._actors[replica].update_weights.remote(version, [sent])
            self._track(ref, "sync", replica, self._cfg.rollout.sync_timeout_s, version)
        self._sent[replica] = (version, len(self._weights))

    @property
    def _has_trainer_this_version(self) -> bool:
        """Else a replica that comes late waits for the next version: what the trainer has now is no longer this one."""
        return self._trainer is not None and self._trainer.updates == self._updates

    def _send_directly(self, stale: Sequence[ReplicaId], version: int) -> None:
        """From GPU to GPU, to all of them at once."""
        if not self._has_trainer_this_version:
            return
        assert self._trainer is not None  # a version other than the checkpoint's comes from `sync`
        replicas = {str(replica): self._actors[replica] for replica in stale}
        failed = self._trainer.send_weights(version, replicas, self._cfg.rollout.sync_timeout_s)
        for replica in stale:
            if reason := failed.get(str(replica)):
                logger.warning("generator %s did not take the weights: %s", replica, reason)
                self._bury(replica)
            else:
                self.fleet.synced(replica, version)

    def _hand_out(self, work: Sequence[int] = ()) -> None:
        """One message per replica, however many prompts it gets."""
        for replica, items in self.fleet.assign(work).items():
            _, sampling = self._work[items[0]]
            prompts = [self._work[item][0].prompt for item in items]
            ref = self._actors[replica].generate.remote(prompts, sampling)
            self._track(ref, "generate", replica, self._cfg.rollout.timeout_s, items)

    def _track(self, ref: ObjectRef[Any], kind: str, replica: ReplicaId, timeout_s: float, detail: Any = None) -> None:
        self._calls[ref] = _Call(kind, replica, time.monotonic() + timeout_s, detail)

    def _pump(self) -> None:
        """Wait for the next answer, a deadline or the next ping; then let the fleet act on it."""
        self._ping()
        self._refresh()
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=1.0) if self._calls else ([], [])
        if done:  # what came meanwhile counts too, before any deadline is held against it
            done, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        for ref in done:
            if call := self._calls.pop(ref, None):
                self._answered(ref, call)
        now = time.monotonic()
        for ref, call in list(self._calls.items()):
            if call.deadline_s < now:
                del self._calls[ref]
                logger.warning("generator %s did not answer %r in time", call.replica, call.kind)
                self._bury(call.replica)
        for replica in self.fleet.tick():
            self._bury(replica)
        self._refresh()
        self._hand_out()
        if self.fleet.is_lost:
            raise UserError(
                f"no generator is left after rollout.max_restarts={self._cfg.rollout.max_restarts} each; see "
                f"{self._logs}/generator-*.log"
            )

    def _answered(self, ref: ObjectRef[Any], call: _Call) -> None:
        try:
            value = ray.get(ref)
        except RayActorError:
            self._bury(call.replica)
        except RayTaskError as e:
            self._failed(call, e.as_instanceof_cause())
        else:
            self._succeeded(call, value)

    def _succeeded(self, call: _Call, value: Any) -> None:
        replica = call.replica
        if call.kind == "start":
            self._nodes[replica] = value
            self.fleet.started(replica)
        elif call.kind == "sync":
            if value == call.detail:  # that was the last bucket
                self._checked.add(replica)
                self.fleet.synced(replica, value)
        elif call.kind == "ping":
            self.fleet.ping(replica, value)
        else:
            for item, rollouts in zip(call.detail, value, strict=True):
                if self.fleet.done(replica, item):
                    self._results[item] = rollouts

    def _failed(self, call: _Call, error: Exception) -> None:
        """The replica lives but could not do it."""
        logger.warning("generator %s failed to %s: %s", call.replica, call.kind, error)
        if call.kind == "start" and isinstance(error, UserError):
            raise error
        if call.kind == "generate":
            if self.fleet.failed(call.replica, call.detail):
                raise UserError(f"the same prompts failed on every generator that tried them: {error}") from error
            return
        self._bury(call.replica)  # an engine that half took its weights must not serve: it starts anew

    def _bury(self, replica: ReplicaId) -> None:
        """Stop what is left of a dead replica and start its next life."""
        if self.fleet.state(replica) is State.RETIRED or replica not in self._actors:
            return
        self.fleet.died(replica)
        ray.kill(self._actors.pop(replica))
        self._calls = {ref: call for ref, call in self._calls.items() if call.replica != replica}
        reborn = self.fleet.restart(replica)
        if reborn is not None:
            self._start(reborn)

    def _ping(self) -> None:
        now = time.monotonic()
        if now - self._pinged_s < PING_EVERY_S:
            return
        self._pinged_s = now
        waiting = {call.replica for call in self._calls.values() if call.kind in ("ping", "sync")}
        for replica in self.fleet.members(State.READY, State.STALE, State.SUSPECT):
            if replica not in waiting:
                self._track(self._actors[replica].ping.remote(), "ping", replica, self.fleet.deadlines.suspect_s)
