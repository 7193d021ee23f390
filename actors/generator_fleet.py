"""The generator fleet: replicas that answer prompts with the policy's current weights.

One background thread, the pump, owns the state machine (`actors/fleet_state.py`) and makes all calls to the replicas
(`actors/fleet_replicas.py`). A replica that fails is restarted, takes the current weights and serves again; its work
goes to the others.

The trainer is called by the thread that calls the fleet and never by the pump: its ranks meet in collectives, and calls
from two threads could reach them in different orders. What the pump needs from the trainer for a replica that came late
therefore waits until a caller waits.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.fleet_replicas import Call, Replicas, log_name
from actors.fleet_state import Fleet, ReplicaId, State
from actors.generator import CONCURRENCY_GROUPS, Generator, SentBucket
from actors.gpu_weight_sync import weight_backend
from actors.placement import Placement, Slot
from actors.pump import Pump
from actors.trainer import TrainerGroup
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Encoded, Prompt, Rollout

logger = logging.getLogger(__name__)
CHECK_EVERY_S = 0.5  # deadlines
WAIT_S = 0.2  # how long a caller waits before it looks whether the pump needs the trainer
MESSAGES = 16  # that a replica answers at a time; more wait in its process
CHECKPOINT_VERSION = -1  # what an engine calls the weights of its start

Question: TypeAlias = tuple[str, tuple[Any, ...]]  # method of a generator, and its arguments after the prompts


@ray.remote(num_cpus=0)
def _digest(bucket: Bucket | SharedBucket) -> str:
    return (bucket.open() if isinstance(bucket, SharedBucket) else bucket).digest()


def _digest_of(sent: SentBucket) -> ObjectRef[str]:
    """Computed where the bucket can be read."""
    if not isinstance(sent, SharedBucket):
        return _digest.remote(sent)
    there = NodeAffinitySchedulingStrategy(sent.machine, soft=False)
    return _digest.options(scheduling_strategy=there).remote(sent)


@dataclass(frozen=True)
class _Request:
    """One prompt for `Generator.generate` or `first_logprobs`. Those with equal questions share a message."""

    question: Question
    prompt: ObjectRef[Prompt]
    future: Future[Any]


class GeneratorFleet:
    """Replicas that hold the policy's current weights and answer prompts.

    Args:
        on_event: called with one line on what happens to a replica, from the thread of the pump.

    Raises (from every method that waits, and from the futures of `submit`):
        UserError: no replica is left, or the engine cannot serve this checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        cfg: JobConfig,
        slots: Sequence[Slot],
        placement: Placement,
        logs: Path,
        seed: int,
        on_event: Callable[[str], None] = logger.warning,
    ):
        self._folder, self._cfg, self._placement, self._logs, self._seed = folder, cfg, placement, logs, seed
        self._slots = slots
        self.fleet: Fleet[int] = Fleet(len(slots), max_restarts=cfg.rollout.max_restarts, deadlines=cfg.deadlines)
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count()
        self._backend = weight_backend(cfg)
        self._trainer: TrainerGroup | None = None
        self._updates = 0  # of the trainer, when it gave the current version
        self._weights: list[tuple[SentBucket, str | ObjectRef[str] | None]] = []  # of the current version, so far
        self._sent: dict[ReplicaId, tuple[int, int]] = {}  # version, and the number of its buckets that were sent
        self._checked: set[ReplicaId] = set()  # their first weights had the right checksum
        self._needs_trainer = False
        self._checked_s = time.monotonic()
        self._pump = Pump("generator fleet", self._act)
        self._replicas = Replicas(self.fleet, self._pump, self._start, self._give_up, on_event)
        for replica in self.fleet.members():
            self._pump.post(partial(self._replicas.start, replica))
        self._pump.start()

    # --- for the job --------------------------------------------------------------------------------------------------

    def wait_ready(self) -> None:
        """Wait until no replica is starting."""
        self._wait(self._pump.when(lambda: not self.fleet.members(State.STARTING)))

    def serve_checkpoint(self) -> None:
        """Serve the weights that the replicas were started with."""
        self._pump.run_in_thread(lambda: self.fleet.publish(CHECKPOINT_VERSION))
        self._wait(self._pump.when(lambda: bool(self.fleet.members(State.READY))))

    def sync(self, trainer: TrainerGroup, version: int) -> None:
        """Send the trainer's weights to every replica; returns when all running replicas have taken them.

        Requests in flight continue; each token keeps the version that made it (`Rollout.versions`).

        Args:
            version: counts up; the number of training steps behind the weights.
        """

        def publish() -> tuple[bool, set[str]]:
            self.fleet.publish(version)
            self._weights.clear()
            self._trainer, self._updates, self._needs_trainer = trainer, trainer.updates, False
            members, node_of = self.fleet.members(), self._replicas.nodes
            return any(r not in self._checked for r in members), {node_of[r] for r in members if r in node_of}

        # A replica that came late still reads the previous version, from the memory where the next one is written.
        is_checked, nodes = self._wait(self._pump.when(lambda: not self._replicas.is_syncing(), publish))
        if self._backend == "buckets":
            for sent in trainer.put_weights(is_checked, nodes):  # replicas load a bucket while the next is written
                self._pump.post(partial(self._weights.append, sent))
        else:
            self._send_directly()
        self._wait(self._pump.when(self._is_current))

    def submit(self, prompts: Sequence[Encoded], sampling: Any) -> list[Future[list[Rollout] | Refused]]:
        """Ask for `sampling.n` responses to each prompt; returns at once. Lost work is done again, none counts twice.

        Requests that come while weights change are answered by the first replica that has taken them. Wait with
        `collect`: a replica that comes late may need the trainer meanwhile.
        """
        return self._submit(("generate", (sampling,)), prompts)

    def collect(self, futures: Sequence[Future[list[Rollout] | Refused]]) -> list[list[Rollout] | Refused]:
        """Wait for what was submitted, in the order given."""
        return [self._wait(future) for future in futures]

    def generate(self, prompts: Sequence[Encoded], sampling: Any) -> list[list[Rollout] | Refused]:
        """`sampling.n` responses to each prompt, in the order given; `ClipStore.answered` separates those refused."""
        return self.collect(self.submit(prompts, sampling))

    def first_logprobs(
        self, prompts: Sequence[Encoded], tokens: Sequence[int], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs [tokens] of `tokens` as first response token to each prompt (parity check)."""
        question = ("first_logprobs", (tuple(tokens), temperature))
        return [self._wait(future) for future in self._submit(question, prompts)]

    def metrics(self) -> dict[str, float]:
        ready = self._pump.run_in_thread(lambda: len(self.fleet.members(State.READY)))
        return {"fleet/ready": ready} | {f"fleet/{name}": n for name, n in vars(self.fleet.counters).items()}

    def stop(self) -> None:
        """End the pump and the replicas. Comes before Ray is shut down."""
        self._pump.stop()
        self._replicas.stop()

    # --- in the caller's thread ---------------------------------------------------------------------------------------

    def _submit(self, question: Question, prompts: Sequence[Encoded]) -> list[Future[Any]]:
        requests = [_Request(question, p.prompt, self._pump.future()) for p in prompts]

        def queue() -> None:
            new = dict(zip(self._numbers, requests, strict=False))
            self._requests |= new
            self._hand_out(list(new))

        self._pump.post(queue)
        return [request.future for request in requests]

    def _wait(self, future: Future[Any]) -> Any:
        """The future's result. Signal handlers run while this waits, and the trainer is called if the pump needs it."""
        while not future.done():
            concurrent.futures.wait([future], timeout=WAIT_S)
            # Weights that the trainer no longer has cannot be sent again: a late replica waits for the next version.
            if self._needs_trainer and self._trainer is not None and self._trainer.updates == self._updates:
                self._put_again() if self._backend == "buckets" else self._send_directly()
        return future.result()

    def _is_current(self) -> bool:
        return bool(self.fleet.members(State.READY)) and not self.fleet.members(State.STALE, State.SUSPECT)

    def _put_again(self) -> None:
        """Put the current weights into the object store, where every node reads them."""
        assert self._trainer is not None
        weights = list(self._trainer.put_weights(is_checked=True))

        def replace() -> None:
            self._weights[:], self._needs_trainer = weights, False

        self._pump.run_in_thread(replace)

    def _send_directly(self) -> None:
        """From GPU to GPU, to all stale replicas at once."""
        assert self._trainer is not None
        assert self.fleet.version is not None
        version, timeout_s = self.fleet.version, self._cfg.deadlines.sync_s
        calls: list[Call] = []  # the trainer makes them; in our table they have a deadline and hold pings back

        def begin() -> dict[str, ActorHandle[Any]]:
            self._needs_trainer = False
            calls.extend(Call("sync", replica, timeout_s) for replica in self.fleet.members(State.STALE))
            self._replicas.calls.update(calls)
            return {str(call.replica): self._replicas.actors[call.replica] for call in calls}

        def end(failed: dict[str, str]) -> None:
            self._replicas.calls.difference_update(calls)
            for call in calls:
                if reason := failed.get(str(call.replica)):
                    self._replicas.replace_dead(call.replica, f"weights {version} were not taken: {reason}")
                else:
                    self.fleet.synced(call.replica, version)

        if replicas := self._pump.run_in_thread(begin):
            failed = self._trainer.send_weights(version, replicas, timeout_s)
            self._pump.run_in_thread(lambda: end(failed))

    # --- in the pump's thread -----------------------------------------------------------------------------------------

    def _act(self) -> None:
        """After events: does what the state of the fleet requires."""
        now = time.monotonic()
        if now - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = now
            self._replicas.check()
        self._update_stale()
        self._hand_out()
        if self.fleet.is_lost:
            most = self.fleet.max_restarts
            raise UserError(f"no generator is left, rollout.max_restarts={most} each; see {self._logs}/generator-*.log")

    def _start(self, replica: ReplicaId) -> tuple[ActorHandle[Any], ObjectRef[str]]:
        slot = self._slots[replica.slot]
        actor = (
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Generator)
            .options(max_concurrency=MESSAGES, **self._placement.options(slot))
            .remote(self._logs / log_name(replica), self._cfg.placement.threads)
        )
        # Another seed for each slot and restart: two engines must not sample the same noise.
        seed = self._seed + 1000 * replica.slot + replica.restarts
        return actor, actor.start.remote(self._folder, self._cfg, slot.gpus > 0, seed)

    def _update_stale(self) -> None:
        """Send each bucket of the current version to each stale replica once; the first time with checksums."""
        version, stale = self.fleet.version, self.fleet.members(State.STALE)
        if version is None:
            return
        for replica in stale:
            if version == CHECKPOINT_VERSION:
                self.fleet.synced(replica, version)
            elif self._backend == "buckets":
                self._send(replica, version)
            elif not self._replicas.is_syncing():
                self._needs_trainer = True

    def _send(self, replica: ReplicaId, version: int) -> None:
        """One message for each bucket that the replica has not been sent."""
        last_version, count = self._sent.get(replica, (version, 0))
        count = count if last_version == version else 0
        if count == len(self._weights):
            return  # most calls by far: each event looks at all replicas
        node = self._replicas.nodes[replica]
        if any(isinstance(sent, SharedBucket) and sent.machine != node for sent, _ in self._weights):
            self._needs_trainer = True
            return
        if replica not in self._checked:
            self._weights[:] = [(sent, digest or _digest_of(sent)) for sent, digest in self._weights]

        def taken(held: int) -> None:
            if held == version:  # that was the last bucket
                self._checked.add(replica)
                self.fleet.synced(replica, version)

        for sent in self._weights[count:]:
            ref = self._replicas.actors[replica].update_weights.remote(version, [sent])
            self._replicas.track(ref, "sync", replica, self._cfg.deadlines.sync_s, taken)
        self._sent[replica] = (version, len(self._weights))

    def _hand_out(self, new: Sequence[int] = ()) -> None:
        """One message per replica and question, however many prompts it has."""
        for replica, items in self.fleet.assign(new).items():
            for question, group in itertools.groupby(items, key=lambda item: self._requests[item].question):
                self._ask(replica, question, list(group))

    def _ask(self, replica: ReplicaId, question: Question, items: Sequence[int]) -> None:
        def answered(values: Sequence[Any]) -> None:
            for item, value in zip(items, values, strict=True):
                if self.fleet.done(replica, item):
                    self._requests.pop(item).future.set_result(value)

        method, arguments = question
        prompts = [self._requests[item].prompt for item in items]
        ref = getattr(self._replicas.actors[replica], method).remote(prompts, *arguments)
        self._replicas.track(ref, method, replica, self._cfg.deadlines.generate_s, answered, items)

    def _give_up(self, items: Sequence[int], cause: str) -> None:
        for item in items:
            error = UserError(f"the same prompts failed on every generator that tried them: {cause}")
            self._requests.pop(item).future.set_exception(error)
