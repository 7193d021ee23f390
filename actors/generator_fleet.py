"""The generator fleet: replicas that answer prompts with the policy's current weights.

One background thread, the pump, owns the state machine (`actors/fleet_state.py`) and makes all calls to the replicas;
Ray posts an event to it when a call is answered. A replica that fails is restarted, takes the current weights and
serves again; its work goes to the others.

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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.clip_store import Encoded
from actors.fleet_state import Fleet, ReplicaId, State
from actors.generator import CONCURRENCY_GROUPS, EngineFailed, Generator, SentBucket
from actors.gpu_weight_sync import weight_backend
from actors.placement import Placement, Slot
from actors.pump import Pump
from actors.trainer import TrainerGroup
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.weights.buckets import Bucket
from rlvid.rollout.weights.shared_memory import SharedBucket
from rlvid.types import Prompt, Rollout

logger = logging.getLogger(__name__)
PING_EVERY_S = 10.0
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


def _cause(error: BaseException) -> str:
    """The first line of what a replica's own error says."""
    cause = getattr(error, "cause", None) or error  # Ray raises an error from an actor around its cause
    line = next(iter(str(cause).strip().splitlines()), "")
    return line if isinstance(cause, EngineFailed | RayActorError) else f"{type(cause).__name__}: {line}"


@dataclass(eq=False)
class _Call:
    """A message to a replica that is not answered yet."""

    kind: str  # "start" | "sync" | "ping" | "generate" | "first_logprobs"
    replica: ReplicaId
    timeout_s: float
    on_answer: Callable[[Any], None] = lambda _: None
    items: Sequence[int] = ()  # the requests it carries
    sent_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Request:
    """One prompt for `Generator.generate` or `first_logprobs`. Those with equal questions share a message."""

    question: tuple[str, tuple[Any, ...]]  # method, and its arguments after the prompts
    prompt: ObjectRef[Prompt]
    future: Future[Any]


class GeneratorFleet:
    """Replicas that hold the policy's current weights and answer prompts.

    Args:
        on_event: told what happens to replicas, one line each, from the pump's thread.

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
        self._slots, self._on_event = slots, on_event
        self.fleet: Fleet[int] = Fleet(len(slots), max_restarts=cfg.rollout.max_restarts)
        self._actors: dict[ReplicaId, ActorHandle[Any]] = {}
        self._nodes: dict[ReplicaId, str] = {}
        self._calls: set[_Call] = set()
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count()
        self._backend = weight_backend(cfg)
        self._trainer: TrainerGroup | None = None
        self._updates = 0  # of the trainer, when it gave the current version
        self._weights: list[tuple[SentBucket, str | ObjectRef[str] | None]] = []  # of the current version, so far
        self._sent: dict[ReplicaId, tuple[int, int]] = {}  # version, and the number of its buckets that were sent
        self._checked: set[ReplicaId] = set()  # their first weights had the right checksum
        self._needs_trainer = False
        self._pinged_s = self._checked_s = time.monotonic()
        self._pump = Pump("generator fleet", self._act)
        for replica in self.fleet.members():
            self._pump.post(partial(self._start, replica))
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
            self._weights, self._trainer, self._updates = [], trainer, trainer.updates
            members = self.fleet.members()
            return any(r not in self._checked for r in members), {self._nodes[r] for r in members if r in self._nodes}

        # A replica that came late still reads the previous version, from the memory where the next one is written.
        is_checked, nodes = self._wait(
            self._pump.when(lambda: not any(call.kind == "sync" for call in self._calls), publish)
        )
        if self._backend == "buckets":
            for sent in trainer.put_weights(is_checked, nodes):  # replicas load a bucket while the next is written
                self._pump.post(partial(self._add_weights, sent))
        else:
            self._send_directly()
        self._wait(
            self._pump.when(
                lambda: not self.fleet.members(State.STALE, State.SUSPECT) and bool(self.fleet.members(State.READY))
            )
        )

    def submit(self, prompts: Sequence[Encoded], sampling: Any) -> list[Future[list[Rollout]]]:
        """Ask for `sampling.n` responses to each prompt; returns at once. Lost work is done again, none counts twice.

        Requests that come while weights change are answered by the first replica that has taken them. Wait with
        `collect`: a replica that comes late may need the trainer meanwhile.
        """
        return self._submit(("generate", (sampling,)), prompts)

    def collect(self, futures: Sequence[Future[list[Rollout]]]) -> list[list[Rollout]]:
        """Wait for what was submitted, in the order given."""
        return [self._wait(future) for future in futures]

    def generate(self, prompts: Sequence[Encoded], sampling: Any) -> list[list[Rollout]]:
        """`sampling.n` responses to each prompt, in the order given."""
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
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()

    # --- in the caller's thread ---------------------------------------------------------------------------------------

    def _submit(self, question: tuple[str, tuple[Any, ...]], prompts: Sequence[Encoded]) -> list[Future[Any]]:
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
            if self._needs_trainer and self._has_trainer_this_version:
                self._put_again() if self._backend == "buckets" else self._send_directly()
        return future.result()

    @property
    def _has_trainer_this_version(self) -> bool:
        """Else a late replica waits for the next version: the trainer's present weights are no longer this one."""
        return self._trainer is not None and self._trainer.updates == self._updates

    def _put_again(self) -> None:
        """Put the current weights into the object store, where every node reads them."""
        assert self._trainer is not None
        weights = list(self._trainer.put_weights(is_checked=True))

        def replace() -> None:
            self._weights, self._needs_trainer = list(weights), False

        self._pump.run_in_thread(replace)

    def _send_directly(self) -> None:
        """From GPU to GPU, to all stale replicas at once."""
        assert self._trainer is not None
        assert self.fleet.version is not None
        version, timeout_s = self.fleet.version, self._cfg.rollout.sync_timeout_s
        calls: list[_Call] = []  # the trainer makes them; in our table they have a deadline and hold pings back

        def begin() -> dict[str, ActorHandle[Any]]:
            self._needs_trainer = False
            calls.extend(_Call("sync", replica, timeout_s) for replica in self.fleet.members(State.STALE))
            self._calls.update(calls)
            return {str(call.replica): self._actors[call.replica] for call in calls}

        def end(failed: dict[str, str]) -> None:
            self._calls.difference_update(calls)
            for replica in (call.replica for call in calls):
                if reason := failed.get(str(replica)):
                    self._replace_dead(replica, f"weights {version} were not taken: {reason}")
                else:
                    self.fleet.synced(replica, version)

        if replicas := self._pump.run_in_thread(begin):
            failed = self._trainer.send_weights(version, replicas, timeout_s)
            self._pump.run_in_thread(lambda: end(failed))

    # --- in the pump's thread -----------------------------------------------------------------------------------------

    def _act(self) -> None:
        """After events: whatever the state of the fleet asks for."""
        now = time.monotonic()
        if now - self._checked_s >= CHECK_EVERY_S:
            self._checked_s = now
            self._check_deadlines(now)
        self._update_stale()
        self._hand_out()
        if self.fleet.is_lost:
            raise UserError(
                f"no generator is left after rollout.max_restarts={self._cfg.rollout.max_restarts} each; see "
                f"{self._logs}/generator-*.log"
            )

    def _check_deadlines(self, now: float) -> None:
        for call in [c for c in self._calls if now - c.sent_s > c.timeout_s]:
            self._replace_dead(call.replica, f"no answer to {call.kind!r} within {call.timeout_s:g} s")
        for call in self._calls:
            if call.kind == "sync":  # long, and with a deadline of its own
                self.fleet.heard(call.replica)
        for replica in self.fleet.tick():
            self._replace_dead(replica, "no sign of life")
        if now - self._pinged_s >= PING_EVERY_S:
            self._pinged_s = now
            busy = {call.replica for call in self._calls if call.kind in ("ping", "sync")}
            for replica in self.fleet.members(State.READY, State.STALE, State.SUSPECT):
                if replica not in busy:
                    self._ping(replica)

    def _ping(self, replica: ReplicaId) -> None:
        ref = self._actors[replica].ping.remote()
        self._track(ref, "ping", replica, self.fleet.deadlines.suspect_s, lambda held: self.fleet.ping(replica, held))

    def _start(self, replica: ReplicaId) -> None:
        slot = self._slots[replica.slot]
        actor = (
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Generator)
            .options(max_concurrency=MESSAGES, **self._placement.options(slot))
            .remote(self._log_of(replica), self._cfg.placement.threads)
        )
        self._actors[replica] = actor
        # Another seed for each slot and restart: two engines must not sample the same noise.
        seed = self._seed + 1000 * replica.slot + replica.restarts

        def started(node: str) -> None:
            self._nodes[replica] = node
            self.fleet.started(replica)

        ref = actor.start.remote(self._folder, self._cfg, slot.gpus > 0, seed)
        self._track(ref, "start", replica, self.fleet.deadlines.start_s, started)

    def _log_of(self, replica: ReplicaId) -> Path:
        return self._logs / f"generator-{replica}.log"

    def _update_stale(self) -> None:
        """Send each bucket of the current version to each stale replica once; the first time with checksums."""
        version, stale = self.fleet.version, self.fleet.members(State.STALE)
        if version is None or not stale:
            return
        if version == CHECKPOINT_VERSION:
            for replica in stale:
                self.fleet.synced(replica, version)
        elif self._backend == "buckets":
            for replica in stale:
                self._send(replica, version)
        elif not any(call.kind == "sync" for call in self._calls):
            self._needs_trainer = True

    def _add_weights(self, sent: tuple[SentBucket, str | None]) -> None:
        self._weights.append(sent)

    def _send(self, replica: ReplicaId, version: int) -> None:
        """One message for each bucket that the replica has not been sent."""
        if self._sent.get(replica) == (version, len(self._weights)):
            return  # most calls by far: each event looks at all replicas
        if any(isinstance(sent, SharedBucket) and sent.machine != self._nodes[replica] for sent, _ in self._weights):
            self._needs_trainer = True
            return
        last_version, count = self._sent.get(replica, (version, 0))
        count = count if last_version == version else 0
        if replica not in self._checked and count < len(self._weights):
            self._weights = [(sent, digest or _digest_of(sent)) for sent, digest in self._weights]

        def taken(held: int) -> None:
            if held == version:  # that was the last bucket
                self._checked.add(replica)
                self.fleet.synced(replica, version)

        for sent in self._weights[count:]:
            ref = self._actors[replica].update_weights.remote(version, [sent])
            self._track(ref, "sync", replica, self._cfg.rollout.sync_timeout_s, taken)
        self._sent[replica] = (version, len(self._weights))

    def _hand_out(self, new: Sequence[int] = ()) -> None:
        """One message per replica and question, however many prompts it has."""
        for replica, items in self.fleet.assign(new).items():
            for (method, arguments), group in itertools.groupby(items, key=lambda i: self._requests[i].question):
                self._ask(replica, method, arguments, list(group))

    def _ask(self, replica: ReplicaId, method: str, arguments: tuple[Any, ...], items: Sequence[int]) -> None:
        def answered(values: Sequence[Any]) -> None:
            for item, value in zip(items, values, strict=True):
                if self.fleet.done(replica, item):
                    self._requests.pop(item).future.set_result(value)

        prompts = [self._requests[item].prompt for item in items]
        ref = getattr(self._actors[replica], method).remote(prompts, *arguments)
        self._track(ref, method, replica, self._cfg.rollout.timeout_s, answered, items)

    def _track(
        self,
        ref: ObjectRef[Any],
        kind: str,
        replica: ReplicaId,
        timeout_s: float,
        on_answer: Callable[[Any], None],
        items: Sequence[int] = (),
    ) -> None:
        call = _Call(kind, replica, timeout_s, on_answer, items)
        self._calls.add(call)
        ref.future().add_done_callback(lambda answer: self._pump.post(lambda: self._answered(call, answer)))

    def _answered(self, call: _Call, answer: Future[Any]) -> None:
        if call not in self._calls:
            return  # its replica was replaced
        self._calls.remove(call)
        error = answer.exception()
        if error is None:
            self.fleet.heard(call.replica)
            call.on_answer(answer.result())
        elif isinstance(error, UserError) and call.kind == "start":
            raise getattr(error, "cause", error)
        elif call.items and not isinstance(error, RayActorError | EngineFailed):
            self._return_failed(call, error)
        else:  # dead; or an engine that half took its weights and must not serve
            self._replace_dead(call.replica, _cause(error))

    def _return_failed(self, call: _Call, error: BaseException) -> None:
        """The replica runs but could not answer: its requests are tried again, a few times."""
        self._on_event(f"generator {call.replica} could not answer {len(call.items)} prompts: {_cause(error)}")
        for item in self.fleet.failed(call.replica, call.items):
            failure = UserError(f"the same prompts failed on every generator that tried them: {_cause(error)}")
            self._requests.pop(item).future.set_exception(failure)

    def _replace_dead(self, replica: ReplicaId, cause: str) -> None:
        """Stop what is left of a dead replica and restart it."""
        if replica not in self._actors:
            return
        self.fleet.died(replica)
        ray.kill(self._actors.pop(replica))
        self._calls = {call for call in self._calls if call.replica != replica}
        restarted = self.fleet.restart(replica)
        most = self._cfg.rollout.max_restarts
        what = f"restart {restarted.restarts} of {most}" if restarted else f"not restarted, rollout.max_restarts={most}"
        self._on_event(f"generator {replica} failed ({what}): {cause}; its log: {self._log_of(replica)}")
        if restarted:
            self._start(restarted)
