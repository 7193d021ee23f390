"""Who may generate, and who owes which work. Pure: no Ray, no threads, time from an injected clock.

`actors/generator_fleet.py` makes the calls to the replicas, reports here what happened, and does what it is told. The
transition that must not exist is DEAD -> READY: a restarted engine holds the weights of its start, so every new life
goes STARTING -> STALE and becomes READY only through `synced`. Guarded invariants:

- only READY replicas, which hold the current weights, are given work;
- every piece of work is in the queue or with one replica until it is done or given up: none is lost, none counts twice.

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
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Generic, TypeVar

Work = TypeVar("Work", bound=Hashable)


class State(Enum):
    STARTING = "starting"  # its engine is loading
    STALE = "stale"  # alive, but without the current weights
    READY = "ready"  # alive with the current weights: the only state that is given work
    SUSPECT = "suspect"  # a ping or call failed: keeps its work until it answers or its deadline passes
    DEAD = "dead"  # may be restarted
    RETIRED = "retired"  # gone for good


GONE = frozenset({State.DEAD, State.RETIRED})


@dataclass(frozen=True, order=True)
class ReplicaId:
    """One life of a replica. A restart keeps the slot and counts up the life, so that what an earlier life says late is
    never taken for a word of the present one."""

    slot: int
    life: int = 0

    def __str__(self) -> str:
        return f"{self.slot}.{self.life}"


@dataclass(frozen=True)
class Deadlines:
    start_s: float = 600.0  # STARTING for longer is DEAD
    heartbeat_s: float = 30.0  # no sign of life for longer is SUSPECT
    suspect_s: float = 60.0  # SUSPECT for longer is DEAD


@dataclass
class Counters:
    """Over the whole run."""

    restarts: int = 0
    reassigned: int = 0  # pieces of work that went back to the queue
    dropped_late: int = 0  # answers that came from a replica that no longer owed them


@dataclass
class _Replica(Generic[Work]):
    state: State
    since_s: float  # when the state began
    seen_s: float  # last sign of life
    version: int | None = None  # weights that `synced` confirmed in this life
    work: dict[Work, None] = field(default_factory=dict)  # an ordered set


class Fleet(Generic[Work]):
    """The state machine. Reports about a life that is over are ignored: they come late, not wrong."""

    def __init__(
        self,
        replicas: int,
        *,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        max_restarts: int = 3,
        max_attempts: int = 3,
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`max_restarts` is per slot. `max_attempts` bounds how often a piece of work may fail on living replicas."""
        self.min_replicas = min_replicas
        self.max_replicas = replicas if max_replicas is None else max_replicas
        if not 1 <= self.min_replicas <= replicas <= self.max_replicas:
            raise ValueError(f"need 1 <= min ({min_replicas}) <= replicas ({replicas}) <= max ({self.max_replicas})")
        self.max_restarts = max_restarts
        self.max_attempts = max_attempts
        self.deadlines = deadlines or Deadlines()
        self.counters = Counters()
        self.version: int | None = None
        self._clock = clock
        self._replicas: dict[ReplicaId, _Replica[Work]] = {}  # the present life of each slot
        self._queue: deque[Work] = deque()
        self._books: dict[Work, int] = {}  # all work that is not done yet: its failed attempts
        self._next_slot = 0
        for _ in range(replicas):
            self.join()

    # --- who is there -------------------------------------------------------------------------------------------------

    def members(self, *states: State) -> list[ReplicaId]:
        """Replicas in these states, by slot; without an argument all that are not retired."""
        return sorted(
            (
                replica
                for replica, record in self._replicas.items()
                if (record.state in states if states else record.state is not State.RETIRED)
            ),
            key=attrgetter("slot"),  # one present life per slot; comparing dataclasses is far slower
        )

    def state(self, replica: ReplicaId) -> State:
        """A life that was followed by another one is DEAD."""
        record = self._replicas.get(replica)
        return record.state if record else State.DEAD

    @property
    def is_lost(self) -> bool:
        """Nobody is left, and nobody will come back by a restart."""
        return all(record.state is State.RETIRED for record in self._replicas.values())

    def join(self) -> ReplicaId:
        """A new slot, STARTING. Raises ValueError at max_replicas."""
        if len(self.members()) >= self.max_replicas:
            raise ValueError(f"the fleet is full: {self.max_replicas} replicas")
        replica = ReplicaId(self._next_slot)
        self._next_slot += 1
        self._begin(replica)
        return replica

    def leave(self, replica: ReplicaId) -> None:
        """Retire a replica while the run goes on; its work returns to the queue. Raises ValueError at min_replicas."""
        record = self._replicas.get(replica)
        if record is None or record.state is State.RETIRED:
            return
        if len(self.members()) <= self.min_replicas:
            raise ValueError(f"replica {replica} cannot leave: the fleet is at its minimum of {self.min_replicas}")
        self._end(record, State.RETIRED)

    def restart(self, replica: ReplicaId) -> ReplicaId | None:
        """The next life of a DEAD replica, STARTING, or None when it has used up its restarts and is RETIRED."""
        record = self._replicas.get(replica)
        if record is None or record.state is not State.DEAD:
            raise ValueError(f"replica {replica} is {self.state(replica).value}: only the latest dead life can restart")
        if replica.life >= self.max_restarts:
            self._end(record, State.RETIRED)
            return None
        del self._replicas[replica]
        self.counters.restarts += 1
        reborn = ReplicaId(replica.slot, replica.life + 1)
        self._begin(reborn)
        return reborn

    # --- what happened to them ----------------------------------------------------------------------------------------

    def started(self, replica: ReplicaId) -> None:
        """The engine is up, with the weights of its start."""
        if (record := self._alive(replica)) and record.state is State.STARTING:
            self._move(record, State.STALE)

    def publish(self, version: int) -> None:
        """The trainer has new weights: whoever was READY is STALE until it has taken them. Work in flight goes on."""
        if self.version is not None and version <= self.version:
            raise ValueError(f"weight versions count up: {version} after {self.version}")
        self.version = version
        for record in self._replicas.values():
            if record.state is State.READY:
                self._move(record, State.STALE)

    def synced(self, replica: ReplicaId, version: int) -> None:
        """The replica has taken these weights, and they were checked. It is READY, unless newer ones are out by now."""
        record = self._alive(replica)
        if record is None or record.state is State.STARTING or version != self.version:
            return
        record.version = version
        if record.state is not State.READY:
            self._move(record, State.READY)

    def ping(self, replica: ReplicaId, version: int | None) -> None:
        """The replica answered and says which weights it holds.

        A SUSPECT one is READY again only with the current weights, confirmed by `synced` in this life. A READY one that
        holds others (it restarted by itself) is STALE.
        """
        record = self._alive(replica)
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
        """A call failed and its work will not be answered: it returns to the queue, the replica is SUSPECT.

        Returns the work that has now failed `max_attempts` times. It is out of the books, and the caller's to report.
        """
        record = self._replicas.get(replica)
        if record is None:
            return []
        owed = [item for item in work if item in record.work]
        given_up = []
        for item in owed:
            self._books[item] += 1
            if self._books[item] >= self.max_attempts:
                del record.work[item], self._books[item]
                given_up.append(item)
        self._return(record, [item for item in owed if item in record.work])
        self.missed(replica)
        return given_up

    def died(self, replica: ReplicaId) -> None:
        """Its process is gone for certain."""
        if record := self._alive(replica):
            self._end(record, State.DEAD)

    def tick(self) -> list[ReplicaId]:
        """Let deadlines pass. Returns who is now presumed dead: stop their processes before a restart."""
        now = self._clock()
        presumed_dead = []
        for replica, record in self._replicas.items():
            in_state_s, silent_s = now - record.since_s, now - record.seen_s
            if (record.state is State.STARTING and in_state_s > self.deadlines.start_s) or (
                record.state is State.SUSPECT and in_state_s > self.deadlines.suspect_s
            ):
                self._end(record, State.DEAD)
                presumed_dead.append(replica)
            elif silent_s > self.deadlines.heartbeat_s:
                self.missed(replica)
        return presumed_dead

    # --- who owes which work ------------------------------------------------------------------------------------------

    def assign(self, work: Iterable[Work] = ()) -> dict[ReplicaId, list[Work]]:
        """Queue new work, then hand the queue out to READY replicas, least loaded first. Nobody READY: it stays queued.

        Raises ValueError for work that is already in the books.
        """
        new: dict[Work, int] = {}
        for item in work:
            if item in self._books or item in new:
                raise ValueError(f"work {item!r} is already in the books")
            new[item] = 0
        self._books.update(new)
        self._queue.extend(new)
        handed_out: dict[ReplicaId, list[Work]] = {}
        if not self._queue:
            return handed_out
        # A heap, the lightest first and among equals the lowest slot: work for 64 replicas costs what it does for one.
        lightest = [(self.load(replica), i, replica) for i, replica in enumerate(self.members(State.READY))]
        heapq.heapify(lightest)
        while self._queue and lightest:
            load, i, replica = lightest[0]
            item = self._queue.popleft()
            self._replicas[replica].work[item] = None
            handed_out.setdefault(replica, []).append(item)
            heapq.heapreplace(lightest, (load + 1, i, replica))
        return handed_out

    def done(self, replica: ReplicaId, work: Work) -> bool:
        """An answer came. False: the replica no longer owed it (presumed dead, or answered before): drop the answer."""
        record = self._replicas.get(replica)
        if record is None or work not in record.work:
            self.counters.dropped_late += 1
            return False
        record.seen_s = self._clock()
        del record.work[work], self._books[work]
        return True

    def load(self, replica: ReplicaId) -> int:
        record = self._replicas.get(replica)
        return len(record.work) if record else 0

    @property
    def queued(self) -> tuple[Work, ...]:
        return tuple(self._queue)

    @property
    def in_flight(self) -> dict[ReplicaId, tuple[Work, ...]]:
        return {replica: tuple(record.work) for replica, record in self._replicas.items() if record.work}

    @property
    def is_idle(self) -> bool:
        """All work is done or given up."""
        return not self._books

    # --- inside -------------------------------------------------------------------------------------------------------

    def _alive(self, replica: ReplicaId) -> _Replica[Work] | None:
        """Record of a living replica; notes the sign of life."""
        record = self._replicas.get(replica)
        if record is None or record.state in GONE:
            return None
        record.seen_s = self._clock()
        return record

    def _begin(self, replica: ReplicaId) -> None:
        now = self._clock()
        self._replicas[replica] = _Replica(State.STARTING, since_s=now, seen_s=now)

    def _move(self, record: _Replica[Work], state: State) -> None:
        record.state, record.since_s = state, self._clock()

    def _end(self, record: _Replica[Work], state: State) -> None:
        self._move(record, state)
        self._return(record, list(record.work))

    def _return(self, record: _Replica[Work], work: list[Work]) -> None:
        """Back to the front of the queue, in order: it has waited longest."""
        for item in work:
            del record.work[item]
        self._queue.extendleft(reversed(work))
        self.counters.reassigned += len(work)
