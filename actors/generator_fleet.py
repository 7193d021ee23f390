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
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.fleet_growth import Growth
from actors.fleet_replicas import Call, Replicas, log_name
from actors.fleet_state import Fleet, ReplicaId, State
from actors.generator import CONCURRENCY_GROUPS, Generator, SentBucket
from actors.gpu_weight_sync import weight_backend
from actors.placement import Placement
from actors.pump import Pump
from actors.trainer import TrainerGroup
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Encoded, Rollout

CHECK_EVERY_S = 0.5  # deadlines
WAIT_S = 0.2  # how long a caller waits before it looks whether the pump needs the trainer
MESSAGES = 16  # that a replica answers at a time; more wait in its process
CHECKPOINT_VERSION = -1  # what an engine calls the weights of its start


@ray.remote(num_cpus=0)
def _digest(bucket: Bucket | SharedBucket) -> str:
    return (bucket.open() if isinstance(bucket, SharedBucket) else bucket).digest()


def _digest_of(sent: SentBucket) -> ObjectRef[str]:
    """Computed where the bucket can be read."""
    if not isinstance(sent, SharedBucket):
        return _digest.remote(sent)
    there = NodeAffinitySchedulingStrategy(sent.machine, soft=False)
    return _digest.options(scheduling_strategy=there).remote(sent)


class GeneratorFleet:
    """Replicas that hold the policy's current weights and answer prompts.

    Raises (from every method that waits, and from the futures of `submit`):
        UserError: no replica is left, or the engine cannot serve this checkpoint.
    """

    def __init__(self, folder: Path, placement: Placement):
        self._folder, self._placement, self._cfg = folder, placement, placement.cfg
        n, rollout = len(placement.slots("generator")), self._cfg.rollout
        self.fleet: Fleet[int] = Fleet(
            n,
            min_replicas=n,
            max_replicas=max(rollout.max_replicas or 0, n),
            max_restarts=rollout.max_restarts,
            deadlines=self._cfg.deadlines,
        )
        self._backend = weight_backend(self._cfg)
        self._trainer: TrainerGroup | None = None
        self._updates = 0  # of the trainer, when it gave the current version
        self._weights: list[tuple[SentBucket, str | ObjectRef[str] | None]] = []  # of the current version, so far
        self._sent: dict[ReplicaId, int] = {}  # how many of them were sent to a replica
        self._checked: set[ReplicaId] = set()  # their first weights had the right checksum
        self._needs_trainer = False
        self._checked_s = time.monotonic()
        self._owner = threading.get_ident()  # the thread that may call the trainer
        self.version = CHECKPOINT_VERSION  # of the weights that replicas have or are taking
        self._pump = Pump("generator fleet", self._act)
        self._growth = Growth(self.fleet, placement)
        self._replicas = Replicas(self.fleet, self._pump, self._start, self._growth.leave, placement.on_event)
        self._growth.replicas = self._replicas
        if self._cfg.engines_sleep and not self._cfg.placement.gpus:
            placement.on_event(
                "rollout.sleep: engines on CPU have no GPU memory to give up, they only wait for the trainer"
            )
        for replica in self.fleet.members():
            self._pump.post(partial(self._replicas.start, replica))
        self._pump.start()

    def wait_ready(self) -> None:
        """Wait until no replica is starting."""
        self.wait(self._pump.when(lambda: not self.fleet.members(State.STARTING)))

    def serve_checkpoint(self) -> None:
        """Serve the weights that the replicas were started with."""
        self._pump.run_in_thread(lambda: self.fleet.publish(CHECKPOINT_VERSION))
        self.wait(self._pump.when(lambda: bool(self.fleet.members(State.READY))))

    def sync(self, trainer: TrainerGroup, step: int) -> None:
        """Send the trainer's weights to every replica; returns when all running replicas have taken them.

        Requests in flight continue; each token keeps the version that made it (`Rollout.versions`). Versions count up:
        they are the number of training steps, and larger where a lost trainer started from an earlier step again.
        """
        version = max(step, self.version + 1)

        def publish() -> tuple[bool, set[str]]:
            self.fleet.publish(version)
            self.version = version
            self._weights.clear()
            self._sent.clear()
            self._trainer, self._updates, self._needs_trainer = trainer, trainer.updates, False
            members, node_of = self.fleet.members(), self._replicas.nodes
            return any(r not in self._checked for r in members), {node_of[r] for r in members if r in node_of}

        # A replica that came late still reads the previous version, from the memory where the next one is written.
        is_checked, nodes = self.wait(self._pump.when(lambda: not self._replicas.awaits("sync"), publish))
        if self._backend == "buckets":
            for sent in trainer.put_weights(is_checked, nodes):  # replicas load a bucket while the next is written
                self._pump.post(partial(self._weights.append, sent))
        else:
            self._send_directly()
        self.wait(self._pump.when(self._is_current))

    def sleep(self) -> None:
        """Idle engines give up their GPU memory until `sync`, where the job's engines sleep."""
        if not self._cfg.engines_sleep:
            return

        def ask() -> None:
            for replica in self.fleet.members(State.READY):
                ref = self._replicas.actors[replica].sleep.remote()
                self._replicas.track(ref, Call("sleep", replica, self._cfg.deadlines.sync_s))

        self._pump.run_in_thread(ask)
        self.wait(self._pump.when(lambda: not self._replicas.awaits("sleep")))

    def submit(self, prompts: Sequence[Encoded], sampling: Any) -> list[Future[list[Rollout] | Refused]]:
        """Ask for `sampling.n` responses to each prompt; returns at once. Lost work is done again, none counts twice.

        Requests that come while weights change are answered by the first replica that has taken them. Wait with
        `collect`: a replica that comes late may need the trainer meanwhile.
        """
        return self._replicas.submit(("generate", (sampling,)), prompts)

    def collect(self, futures: Sequence[Future[list[Rollout] | Refused]]) -> list[list[Rollout] | Refused]:
        """Wait for what was submitted, in the order given."""
        return [self.wait(future) for future in futures]

    def generate(self, prompts: Sequence[Encoded], sampling: Any) -> list[list[Rollout] | Refused]:
        """`sampling.n` responses to each prompt, in the order given; `ClipStore.answered` separates those refused."""
        return self.collect(self.submit(prompts, sampling))

    def abandon(self) -> None:
        """Give up all requests; who waits for one gets an error. For a caller that will not sync the weights any more
        that the requests may wait for."""
        self._pump.run_in_thread(self._replicas.abandon)

    def first_logprobs(
        self, prompts: Sequence[Encoded], tokens: Sequence[int], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probs [tokens] of `tokens` as first response token to each prompt (parity check)."""
        question = ("first_logprobs", (tuple(tokens), temperature))
        return [self.wait(future) for future in self._replicas.submit(question, prompts)]

    def weight_digests(self) -> dict[str, str]:
        """Hash of the weights that each ready replica holds; equal where all have taken the same."""
        actors = self._pump.run_in_thread(
            lambda: {str(r): self._replicas.actors[r] for r in self.fleet.members(State.READY)}
        )
        digests = ray.get([a.weight_digest.remote() for a in actors.values()], timeout=self._cfg.deadlines.sync_s)
        return dict(zip(actors, digests, strict=True))

    def metrics(self) -> dict[str, float]:
        ready = self._pump.run_in_thread(lambda: len(self.fleet.members(State.READY)))
        counters = {f"fleet/{name}": n for name, n in vars(self.fleet.counters).items()}
        return {"fleet/ready": ready, "fleet/start_s": self._replicas.start_s} | counters

    def stop(self) -> None:
        """End the pump and the replicas. Comes before Ray is shut down."""
        self._pump.stop()
        self._replicas.stop()

    # --- in the caller's thread ---------------------------------------------------------------------------------------

    def wait(self, future: Future[Any]) -> Any:
        """The future's result. Signal handlers run while this waits, and the trainer is called if the pump needs it: by
        the thread that made the fleet, and no other."""
        while not future.done():
            concurrent.futures.wait([future], timeout=WAIT_S)
            if threading.get_ident() != self._owner:
                continue
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
        self._needs_trainer = False
        self._replicas.send_directly(self._trainer, self._cfg.deadlines.sync_s)

    # --- in the pump's thread -----------------------------------------------------------------------------------------

    def _act(self) -> None:
        """After events: does what the state of the fleet requires."""
        now = time.monotonic()
        if now - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = now
            self._replicas.check()
            self._growth.shrink()
            self._growth.grow()
        self._update_stale()
        self._replicas.hand_out()
        if self.fleet.is_lost:
            limit, logs = f"rollout.max_restarts={self.fleet.max_restarts}", self._placement.logs
            raise UserError(f"no generator is left, {limit} each; see {logs}/generator-*.log")

    def _start(self, replica: ReplicaId) -> tuple[ActorHandle[Any], ObjectRef[str]]:
        slot = self._growth.slots[replica.slot]
        actor = self._placement.start(
            Generator, slot, log_name(replica), concurrency_groups=CONCURRENCY_GROUPS, max_concurrency=MESSAGES
        )
        # Another seed for each slot and restart: two engines must not sample the same noise.
        seed = self._cfg.seed + 1000 * replica.slot + replica.restarts
        return actor, actor.start.remote(self._folder, self._cfg, seed)

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
            elif not self._replicas.awaits("sync"):
                self._needs_trainer = True

    def _send(self, replica: ReplicaId, version: int) -> None:
        """One message for each bucket that the replica has not been sent."""
        count = self._sent.get(replica, 0)
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
            self._replicas.track(ref, Call("sync", replica, self._cfg.deadlines.sync_s, taken))
        self._sent[replica] = len(self._weights)
