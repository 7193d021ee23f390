"""Which replica may generate, and which replica has which work. Pure: no Ray, no threads, an injected clock.

`actors/generator_fleet.py` makes the calls to the replicas, reports here what happened, and acts on what is returned.
The transition that must not exist is DEAD -> READY: a restarted engine holds the weights of its start, so every
restarted replica passes STARTING -> STALE and becomes READY only through `synced`. Guarded invariants:

- only READY replicas, which hold the current weights, are given work, and not if they are about to leave;
- each work item is in the queue or with one replica until it is done or given up: none is lost, none counts twice.

                 started         synced             missed, failed (STALE too)
        STARTING ------> STALE <--------> READY ---------------------------> SUSPECT
            ^              ^     publish    ^                                  | |
            |              |                +--- ping, current weights --------+ |
            |              +-------------------- ping, other weights ----------+ |
            |                                                                    v
            +------------------------- restart ------------- DEAD <--- deadline (SUSPECT, STARTING), died (any)
                                                               |
                                                               +-----> RETIRED: restarts used up, or leave (any)
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

from rlvid.config import DeadlinesConfig

Work = TypeVar("Work", bound=Hashable)


class State(Enum):
    STARTING = "starting"  # its engine is loading
    STALE = "stale"  # running, but without the current weights
    READY = "ready"  # running with the current weights: the only state that is given work
    SUSPECT = "suspect"  # a ping or call failed: keeps its work until it answers or its deadline passes
    DEAD = "dead"  # may be restarted
    RETIRED = "retired"  # will not be restarted


GONE = frozenset({State.DEAD, State.RETIRED})
NOT_RETIRED = tuple(state for state in State if state is not State.RETIRED)


@dataclass(frozen=True, order=True)
class ReplicaId:
    """A replica between two restarts. A restart keeps the slot and counts up, so that a late answer from before the
    restart is never taken for an answer of the restarted replica."""

    slot: int
    restarts: int = 0

    def __str__(self) -> str:
        return f"{self.slot}.{self.restarts}"


@dataclass
class Counters:
    """Over the whole run."""

    restarts: int = 0
    reassigned: int = 0  # work items that went back to the queue
    dropped_late: int = 0  # answers from a replica that no longer had the work


@dataclass
class _Replica(Generic[Work]):
    state: State
    since_s: float  # when the state began
    seen_s: float  # last sign of life
    version: int | None = None  # weights that `synced` confirmed since the last restart
    work: dict[Work, None] = field(default_factory=dict)  # an ordered set


class Fleet(Generic[Work]):
    """The state machine. Reports about a replica from before its restart are ignored: they are late, not wrong."""

    def __init__(
        self,
        replicas: int,
        *,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        max_restarts: int = 3,
        max_attempts: int = 3,
        deadlines: DeadlinesConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`max_restarts` is per slot. `max_attempts` bounds how often a work item may fail on running replicas."""
        self.min_replicas = min_replicas
        self.max_replicas = replicas if max_replicas is None else max_replicas
        if not 1 <= self.min_replicas <= replicas <= self.max_replicas:
            raise ValueError(f"need 1 <= min ({min_replicas}) <= replicas ({replicas}) <= max ({self.max_replicas})")
        self.max_restarts, self.max_attempts = max_restarts, max_attempts
        self.deadlines = deadlines or DeadlinesConfig()
        self.counters = Counters()
        self.version: int | None = None
        self._clock = clock
        self._replicas: dict[ReplicaId, _Replica[Work]] = {}  # one per slot
        self._queue: deque[Work] = deque()
        self._attempts: dict[Work, int] = {}  # failed attempts of all work that is not done yet
        self._draining: set[ReplicaId] = set()  # they get no more work
        self.next_slot = 0  # of the next replica to join
        for _ in range(replicas):
            self.join()

    # --- membership ---------------------------------------------------------------------------------------------------

    def members(self, *states: State) -> list[ReplicaId]:
        """Replicas in these states, by slot; without an argument all that are not retired."""
        found = [r for r, record in self._replicas.items() if record.state in (states or NOT_RETIRED)]
        return sorted(found, key=attrgetter("slot"))  # one replica per slot; comparing dataclasses is far slower

    def state(self, replica: ReplicaId) -> State:
        """A replica that was restarted since is DEAD."""
        record = self._replicas.get(replica)
        return record.state if record else State.DEAD

    @property
    def is_lost(self) -> bool:
        """All replicas are retired."""
        return not self.members()

    def join(self) -> ReplicaId:
        """A new slot, STARTING. Raises ValueError at max_replicas."""
        if len(self.members()) >= self.max_replicas:
            raise ValueError(f"the fleet is full: {self.max_replicas} replicas")
        replica = ReplicaId(self.next_slot)
        self.next_slot += 1
        self._begin(replica)
        return replica

    def leave(self, replica: ReplicaId) -> None:
        """Retire a replica in a running fleet; its work returns to the queue. Raises ValueError at min_replicas."""
        record = self._replicas.get(replica)
        if record is None or record.state is State.RETIRED:
            return
        if len(self.members()) <= self.min_replicas:
            raise ValueError(f"replica {replica} cannot leave: the fleet is at its minimum of {self.min_replicas}")
        self._end(record, State.RETIRED)

    def drain(self, leaving: Collection[ReplicaId]) -> list[ReplicaId]:
        """Give these no more work, because they will have to leave, as far as `min_replicas` others run. Each call
        replaces the one before. Returns those of them that have no work left: the caller may stop them."""
        going = [r for r in self.members(State.STALE, State.READY, State.SUSPECT) if r in leaving]
        staying = [r for r in self.members(State.STALE, State.READY) if r not in leaving]
        self._draining = set(going[: max(0, len(going) + len(staying) - self.min_replicas)])
        return [r for r in sorted(self._draining) if not self._replicas[r].work]

    def restart(self, replica: ReplicaId) -> ReplicaId | None:
        """Restart a DEAD replica: its new id, STARTING; None if its restarts are used up, it is RETIRED then."""
        record = self._replicas.get(replica)
        if record is None or record.state is not State.DEAD:
            raise ValueError(f"replica {replica} is {self.state(replica).value}: only a dead replica can restart, once")
        if replica.restarts >= self.max_restarts:
            self._end(record, State.RETIRED)
            return None
        del self._replicas[replica]
        self.counters.restarts += 1
        restarted = ReplicaId(replica.slot, replica.restarts + 1)
        self._begin(restarted)
        return restarted

    # --- reports about replicas ---------------------------------------------------------------------------------------

    def started(self, replica: ReplicaId) -> None:
        """The engine is loaded, with the weights of its start."""
        if (record := self.heard(replica)) and record.state is State.STARTING:
            self._move(record, State.STALE)

    def publish(self, version: int) -> None:
        """The trainer has new weights: READY replicas are STALE until they take them. Work in flight continues."""
        if self.version is not None and version <= self.version:
            raise ValueError(f"weight versions count up: {version} after {self.version}")
        self.version = version
        for record in self._replicas.values():
            if record.state is State.READY:
                self._move(record, State.STALE)

    def synced(self, replica: ReplicaId, version: int) -> None:
        """The replica has taken these weights, and they were checked. It is READY, unless newer ones exist by now."""
        record = self.heard(replica)
        if record is None or record.state is State.STARTING or version != self.version:
            return
        record.version = version
        if record.state is not State.READY:
            self._move(record, State.READY)

    def heard(self, replica: ReplicaId) -> _Replica[Work] | None:
        """A sign of life that says nothing about the weights. Returns the replica's record if it is running."""
        record = self._replicas.get(replica)
        if record is None or record.state in GONE:
            return None
        record.seen_s = self._clock()
        return record

    def ping(self, replica: ReplicaId, version: int | None) -> None:
        """The replica answered and says which weights it holds. A SUSPECT one is READY again only with the current
        ones, confirmed by `synced` since its restart. A READY one with others (restarted without us) is STALE."""
        record = self.heard(replica)
        if record is None or record.state is State.STARTING:
            return
        if version != record.version:
            record.version = None
        is_current = self.version is not None and record.version == self.version
        if record.state is State.SUSPECT:
            self._move(record, State.READY if is_current else State.STALE)
        elif record.state is State.READY and not is_current:
            self._move(record, State.STALE)

    def missed(self, replica: ReplicaId) -> None:
        """A ping was not answered in time, or a weight update failed."""
        record = self._replicas.get(replica)
        if record and record.state in (State.READY, State.STALE):
            self._move(record, State.SUSPECT)

    def failed(self, replica: ReplicaId, work: Iterable[Work]) -> list[Work]:
        """A call failed and its work will not be answered: it returns to the queue, the replica is SUSPECT. Returns the
        work that has now failed `max_attempts` times: it is given up, the caller reports it."""
        record = self._replicas.get(replica)
        if record is None:
            return []
        assigned = [item for item in work if item in record.work]
        for item in assigned:
            self._attempts[item] += 1
        given_up = [item for item in assigned if self._attempts[item] >= self.max_attempts]
        for item in given_up:
            del record.work[item], self._attempts[item]
        self._return(record, [item for item in assigned if item in record.work])
        self.missed(replica)
        return given_up

    def died(self, replica: ReplicaId) -> None:
        """Its process is gone for certain."""
        if record := self.heard(replica):
            self._end(record, State.DEAD)

    def tick(self) -> list[ReplicaId]:
        """Apply the deadlines. Returns the replicas that are now presumed dead: stop their processes, then restart."""
        now = self._clock()
        limits_s = {State.STARTING: self.deadlines.start_s, State.SUSPECT: self.deadlines.suspect_s}
        presumed_dead = []
        for replica, record in self._replicas.items():
            if now - record.since_s > limits_s.get(record.state, math.inf):
                self._end(record, State.DEAD)
                presumed_dead.append(replica)
            elif now - record.seen_s > self.deadlines.heartbeat_s:
                self.missed(replica)
        return presumed_dead

    # --- work ---------------------------------------------------------------------------------------------------------

    def assign(self, work: Iterable[Work] = ()) -> dict[ReplicaId, list[Work]]:
        """Queue new work, then give the queue to READY replicas, least loaded first. With none READY it stays queued.
        Raises ValueError for work that is queued or assigned already."""
        new: dict[Work, int] = {}
        for item in work:
            if item in self._attempts or item in new:
                raise ValueError(f"work {item!r} is queued or assigned already")
            new[item] = 0
        self._attempts.update(new)
        self._queue.extend(new)
        handed_out: dict[ReplicaId, list[Work]] = {}
        if not self._queue:
            return handed_out
        # A heap, least loaded first and among equals the lowest slot: 64 replicas cost no more than one.
        serving = [replica for replica in self.members(State.READY) if replica not in self._draining]
        least_loaded = [(len(self._replicas[r].work), r.slot, r) for r in serving]
        heapq.heapify(least_loaded)
        while self._queue and least_loaded:
            load, slot, replica = least_loaded[0]
            item = self._queue.popleft()
            self._replicas[replica].work[item] = None
            handed_out.setdefault(replica, []).append(item)
            heapq.heapreplace(least_loaded, (load + 1, slot, replica))
        return handed_out

    def done(self, replica: ReplicaId, work: Work) -> bool:
        """An answer came. False: the replica no longer had the work (presumed dead, or answered before): drop it."""
        record = self._replicas.get(replica)
        if record is None or work not in record.work:
            self.counters.dropped_late += 1
            return False
        record.seen_s = self._clock()
        del record.work[work], self._attempts[work]
        return True

    def cancel(self) -> None:
        """Forget all work; answers to it are late."""
        self._queue.clear()
        self._attempts.clear()
        for record in self._replicas.values():
            record.work.clear()

    @property
    def queued(self) -> tuple[Work, ...]:
        return tuple(self._queue)

    @property
    def in_flight(self) -> dict[ReplicaId, tuple[Work, ...]]:
        return {replica: tuple(record.work) for replica, record in self._replicas.items() if record.work}

    # --- internals ----------------------------------------------------------------------------------------------------

    def _begin(self, replica: ReplicaId) -> None:
        now = self._clock()
        self._replicas[replica] = _Replica(State.STARTING, since_s=now, seen_s=now)

    def _move(self, record: _Replica[Work], state: State) -> None:
        record.state, record.since_s = state, self._clock()

    def _end(self, record: _Replica[Work], state: State) -> None:
        self._move(record, state)
        self._return(record, list(record.work))

    def _return(self, record: _Replica[Work], work: list[Work]) -> None:
        """Back to the front of the queue, in order: this work has waited longest."""
        for item in work:
            del record.work[item]
        self._queue.extendleft(reversed(work))
        self.counters.reassigned += len(work)
