"""The replicas' processes: started, given requests, called with deadlines, pinged, and restarted when they fail.

Everything here but `submit` and `send_directly` runs in the thread of the fleet's pump; Ray posts an event to it when a
call is answered.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.fleet_state import Fleet, ReplicaId, State
from actors.generator import EngineFailed
from actors.pump import Pump
from rlvid.errors import UserError
from rlvid.types import Encoded, Prompt

if TYPE_CHECKING:
    from actors.trainer import TrainerGroup

PING_EVERY_S = 10.0
Question: TypeAlias = tuple[str, tuple[Any, ...]]  # method of a generator, and its arguments after the prompts


def cause_of(error: BaseException) -> str:
    """The first line of what a replica's own error says."""
    cause = getattr(error, "cause", None) or error  # Ray raises an error from an actor around its cause
    line = next(iter(str(cause).strip().splitlines()), "")
    return line if isinstance(cause, EngineFailed | RayActorError) else f"{type(cause).__name__}: {line}"


@dataclass(eq=False)
class Call:
    """A message to a replica that is not answered yet."""

    kind: str  # "start" | "sync" | "sleep" | "ping" | "generate" | "first_logprobs"
    replica: ReplicaId
    timeout_s: float
    on_answer: Callable[[Any], None] = lambda _: None
    work: Sequence[int] = ()  # work items it carries
    sent_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Request:
    """One prompt for `Generator.generate` or `first_logprobs`. Those with equal questions share a message."""

    question: Question
    prompt: ObjectRef[Prompt]
    future: Future[Any]


class Replicas:
    """Makes the calls and reports to the state machine `fleet`, whose work items are numbers of requests, what came of
    them.

    Args:
        leave: a dead replica leaves the fleet, if that is what has become of it; otherwise it is restarted.
        on_event: called with one line on what happens to a replica.

    Raises (from the pump's events and `check`):
        UserError: the engine cannot serve this checkpoint.
    """

    def __init__(
        self,
        fleet: Fleet[int],
        pump: Pump,
        start: Callable[[ReplicaId], tuple[ActorHandle[Any], ObjectRef[str]]],
        leave: Callable[[ReplicaId], bool],
        on_event: Callable[[str], None],
    ):
        self._fleet, self._pump, self._start, self._leave, self._on_event = fleet, pump, start, leave, on_event
        self.actors: dict[ReplicaId, ActorHandle[Any]] = {}
        self.nodes: dict[ReplicaId, str] = {}
        self.calls: set[Call] = set()
        self.start_s = 0.0  # that the last engine took to start
        self.has_answered = False  # a request
        self._pinged_s = time.monotonic()
        self._requests: dict[int, _Request] = {}  # that are not answered yet
        self._numbers = itertools.count()

    def start(self, replica: ReplicaId) -> None:
        self.actors[replica], ref = self._start(replica)
        begin = time.monotonic()

        def started(node: str) -> None:
            self.nodes[replica], self.start_s = node, time.monotonic() - begin
            self._fleet.started(replica)

        self.track(ref, Call("start", replica, self._fleet.deadlines.start_s, started))

    def track(self, ref: ObjectRef[Any], call: Call) -> None:
        """Call `call.on_answer` with what `ref` brings; a replica that does not answer in time is replaced."""
        self.calls.add(call)
        ref.future().add_done_callback(lambda answer: self._pump.post(lambda: self._answered(call, answer)))

    def submit(self, question: Question, prompts: Sequence[Encoded]) -> list[Future[Any]]:
        """Queue one request for each prompt; from any thread."""
        requests = [_Request(question, p.prompt, self._pump.future()) for p in prompts]

        def queue() -> None:
            new = dict(zip(self._numbers, requests, strict=False))
            self._requests |= new
            self.hand_out(list(new))

        self._pump.post(queue)
        return [request.future for request in requests]

    def hand_out(self, new: Sequence[int] = ()) -> None:
        """One message per replica and question, however many prompts it has."""
        for replica, items in self._fleet.assign(new).items():
            for question, group in itertools.groupby(items, key=lambda item: self._requests[item].question):
                self._ask(replica, question, list(group))

    def abandon(self) -> None:
        """Give up all requests; who waits for one gets an error."""
        self._fleet.cancel()
        for request in self._requests.values():
            request.future.set_exception(RuntimeError("the request was given up"))
        self._requests.clear()

    def awaits(self, kind: str) -> bool:
        """Whether a call of this kind is not answered yet."""
        return any(call.kind == kind for call in self.calls)

    def check(self) -> None:
        """Apply the deadlines and ping; call it about twice a second."""
        now = time.monotonic()
        for call in [c for c in self.calls if now - c.sent_s > c.timeout_s]:
            self.replace_dead(call.replica, f"no answer to {call.kind!r} within {call.timeout_s:g} s")
        syncing = {call.replica for call in self.calls if call.kind == "sync"}
        for replica in syncing:  # long, and with a deadline of its own
            self._fleet.heard(replica)
        for replica in self._fleet.tick():
            self.replace_dead(replica, "no sign of life")
        if now - self._pinged_s >= PING_EVERY_S:
            self._pinged_s = now
            pinged = {call.replica for call in self.calls if call.kind == "ping"}
            for replica in self._fleet.members(State.READY, State.STALE, State.SUSPECT):
                if replica not in syncing | pinged:
                    call = Call("ping", replica, self._fleet.deadlines.suspect_s, partial(self._fleet.ping, replica))
                    self.track(self.actors[replica].ping.remote(), call)

    def replace_dead(self, replica: ReplicaId, cause: str) -> None:
        """Stop what is left of a dead replica and restart it."""
        if replica not in self.actors:
            return
        self.kill(replica)
        if self._leave(replica):
            return
        restarted, most = self._fleet.restart(replica), self._fleet.max_restarts
        what = f"restart {restarted.restarts} of {most}" if restarted else f"not restarted, rollout.max_restarts={most}"
        self._on_event(f"generator {replica} failed ({what}): {cause}; its log: logs/{log_name(replica)}")
        if restarted:
            self.start(restarted)

    def kill(self, replica: ReplicaId) -> None:
        """End its process; its work returns to the queue."""
        self._fleet.died(replica)
        ray.kill(self.actors.pop(replica))
        self.calls = {call for call in self.calls if call.replica != replica}

    def send_directly(self, trainer: TrainerGroup, timeout_s: float) -> None:
        """The trainer sends its weights from GPU to GPU to all stale replicas at once; in the thread that may call it.

        Args:
            timeout_s: for all of it.
        """
        assert self._fleet.version is not None
        version = self._fleet.version
        calls: list[Call] = []  # the trainer makes them; in our table they have a deadline and hold pings back

        def begin() -> dict[str, ActorHandle[Any]]:
            calls.extend(Call("sync", replica, timeout_s) for replica in self._fleet.members(State.STALE))
            self.calls.update(calls)
            return {str(call.replica): self.actors[call.replica] for call in calls}

        def end(failed: dict[str, str]) -> None:
            self.calls.difference_update(calls)
            for call in calls:
                if reason := failed.get(str(call.replica)):
                    self.replace_dead(call.replica, f"weights {version} were not taken: {reason}")
                else:
                    self._fleet.synced(call.replica, version)

        if replicas := self._pump.run_in_thread(begin):
            failed = trainer.send_weights(version, replicas, timeout_s)
            self._pump.run_in_thread(lambda: end(failed))

    def stop(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors.clear()

    def _ask(self, replica: ReplicaId, question: Question, items: Sequence[int]) -> None:
        def answered(values: Sequence[Any]) -> None:
            for item, value in zip(items, values, strict=True):
                if self._fleet.done(replica, item):
                    self._requests.pop(item).future.set_result(value)
            self.has_answered = True

        method, arguments = question
        prompts = [self._requests[item].prompt for item in items]
        ref = getattr(self.actors[replica], method).remote(prompts, *arguments)
        self.track(ref, Call(method, replica, self._fleet.deadlines.generate_s, answered, items))

    def _answered(self, call: Call, answer: Future[Any]) -> None:
        if call not in self.calls:
            return  # its replica was replaced
        self.calls.remove(call)
        error = answer.exception()
        if error is None:
            self._fleet.heard(call.replica)
            call.on_answer(answer.result())
        elif isinstance(error, UserError) and call.kind == "start":
            raise getattr(error, "cause", error)
        elif call.work and not isinstance(error, RayActorError | EngineFailed):
            # It runs but could not answer: its work is tried again, a few times.
            cause = cause_of(error)
            self._on_event(f"generator {call.replica} could not answer {len(call.work)} prompts: {cause}")
            for item in self._fleet.failed(call.replica, call.work):
                given_up = UserError(f"the same prompts failed on every generator that tried them: {cause}")
                self._requests.pop(item).future.set_exception(given_up)
        else:  # dead; or an engine that half took its weights and must not serve
            self.replace_dead(call.replica, cause_of(error))


def log_name(replica: ReplicaId) -> str:
    return f"generator-{replica}.log"
