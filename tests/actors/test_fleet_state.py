"""The fleet's rules by name, and random histories with every invariant checked after each event."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors.fleet_state import GONE, Fleet, ReplicaId, State
from rlvid.config import DeadlinesConfig


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


DEADLINES = DeadlinesConfig(start_s=100.0, heartbeat_s=10.0, suspect_s=20.0)


def ready_fleet(replicas: int = 2, **options: int) -> tuple[Fleet[int], list[ReplicaId], Clock]:
    """A fleet whose replicas all hold version 1."""
    clock = Clock()
    fleet: Fleet[int] = Fleet(replicas, deadlines=DEADLINES, clock=clock, **options)
    fleet.publish(1)
    for replica in fleet.members():
        fleet.started(replica)
        fleet.synced(replica, 1)
    assert fleet.members(State.READY) == fleet.members()
    return fleet, fleet.members(), clock


def test_no_replica_serves_before_the_first_sync() -> None:
    fleet: Fleet[int] = Fleet(2)
    first, second = fleet.members()
    assert fleet.assign([1, 2]) == {}
    fleet.started(first)
    fleet.started(second)
    assert fleet.assign() == {}
    fleet.publish(1)
    fleet.synced(second, 1)
    assert fleet.assign() == {second: [1, 2]}


def test_restarted_replica_serves_only_after_sync() -> None:
    fleet, [replica], _ = ready_fleet(1)
    fleet.died(replica)
    restarted = fleet.restart(replica)
    assert restarted == ReplicaId(slot=0, restarts=1)
    for state, report in [
        (State.STARTING, lambda: fleet.ping(restarted, 1)),
        (State.STARTING, lambda: fleet.synced(restarted, 1)),
        (State.STALE, lambda: fleet.started(restarted)),
        (State.STALE, lambda: fleet.ping(restarted, 1)),  # it says so, but no sync since the restart was checked
    ]:
        report()
        assert fleet.state(restarted) is state
        assert fleet.assign() == {}
    fleet.assign([1])
    fleet.synced(restarted, 1)
    assert fleet.assign() == {restarted: [1]}


@pytest.mark.parametrize("report", ["started", "ping", "synced", "missed", "failed", "died"])
def test_dead_never_becomes_ready_by_itself(report: str) -> None:
    fleet, [replica], _ = ready_fleet(1)
    fleet.died(replica)
    arguments = {"ping": (1,), "synced": (1,), "failed": ([],)}.get(report, ())
    getattr(fleet, report)(replica, *arguments)
    assert fleet.state(replica) is State.DEAD


def test_reports_from_before_a_restart_are_ignored() -> None:
    fleet, [replica], _ = ready_fleet(1)
    fleet.died(replica)
    restarted = fleet.restart(replica)
    assert restarted is not None
    fleet.started(replica)
    assert fleet.state(restarted) is State.STARTING
    fleet.started(restarted)
    fleet.synced(replica, 1)
    assert fleet.state(restarted) is State.STALE
    fleet.synced(restarted, 1)
    fleet.missed(replica)
    fleet.died(replica)
    assert fleet.state(restarted) is State.READY
    with pytest.raises(ValueError, match="only a dead replica"):
        fleet.restart(replica)


def test_new_weights_make_every_replica_stale_and_work_in_flight_continues() -> None:
    fleet, [first, second], _ = ready_fleet()
    fleet.assign([1, 2])
    fleet.publish(2)
    assert fleet.members(State.STALE) == [first, second]
    assert fleet.assign([3]) == {}
    assert fleet.done(first, 1)
    fleet.synced(first, 1)  # an old confirmation
    assert fleet.state(first) is State.STALE
    fleet.synced(second, 2)
    assert fleet.assign() == {second: [3]}


def test_weight_versions_count_up() -> None:
    fleet, _, _ = ready_fleet()
    with pytest.raises(ValueError, match="1 after 1"):
        fleet.publish(1)


def test_suspect_keeps_its_work_gets_none_and_comes_back_with_a_good_ping() -> None:
    fleet, [first, second], _ = ready_fleet()
    assert fleet.assign([1, 2]) == {first: [1], second: [2]}
    fleet.missed(first)
    assert fleet.state(first) is State.SUSPECT
    assert fleet.assign([3]) == {second: [3]}
    assert fleet.in_flight[first] == (1,)
    fleet.ping(first, 1)
    assert fleet.state(first) is State.READY
    assert fleet.done(first, 1)
    assert fleet.counters.reassigned == 0


def test_suspect_that_missed_new_weights_comes_back_stale() -> None:
    fleet, [first, _], _ = ready_fleet()
    fleet.missed(first)
    fleet.publish(2)
    fleet.ping(first, 1)
    assert fleet.state(first) is State.STALE


def test_ready_replica_that_restarted_by_itself_is_stale() -> None:
    fleet, [first, _], _ = ready_fleet()
    fleet.ping(first, 0)
    assert fleet.state(first) is State.STALE
    fleet.ping(first, 1)
    assert fleet.state(first) is State.STALE, "only a checked sync counts"


def test_silence_makes_suspect_and_then_dead_and_its_work_is_handed_out_once() -> None:
    fleet, [first, second], clock = ready_fleet()
    assert fleet.assign([1, 2, 3, 4]) == {first: [1, 3], second: [2, 4]}
    clock.now_s = 9.0
    fleet.ping(second, 1)
    clock.now_s = 11.0
    assert fleet.tick() == []
    assert (fleet.state(first), fleet.state(second)) == (State.SUSPECT, State.READY)
    clock.now_s = 18.0
    fleet.ping(second, 1)
    clock.now_s = 27.0
    fleet.ping(second, 1)
    clock.now_s = 32.0
    assert fleet.tick() == [first]
    assert fleet.tick() == []
    assert fleet.queued == (1, 3)
    assert fleet.assign() == {second: [1, 3]}
    assert fleet.assign() == {}
    assert fleet.counters.reassigned == 2


def test_late_answer_of_a_presumed_dead_replica_is_dropped() -> None:
    fleet, [first, second], _ = ready_fleet()
    fleet.assign([1, 2])
    fleet.died(first)
    assert not fleet.done(first, 1)
    assert fleet.assign() == {second: [1]}
    assert not fleet.done(first, 1)
    assert fleet.done(second, 1)
    assert not fleet.done(second, 1), "an answer counts once"
    assert fleet.counters.dropped_late == 3


def test_late_answer_from_before_a_restart_is_dropped() -> None:
    fleet, [replica], _ = ready_fleet(1)
    fleet.assign([1])
    fleet.died(replica)
    restarted = fleet.restart(replica)
    assert restarted is not None
    fleet.started(restarted)
    fleet.synced(restarted, 1)
    assert fleet.assign() == {restarted: [1]}
    assert not fleet.done(replica, 1)
    assert fleet.done(restarted, 1)
    assert not fleet.queued and not fleet.in_flight


def test_replica_that_does_not_start_is_dead() -> None:
    clock = Clock()
    fleet: Fleet[int] = Fleet(1, deadlines=DEADLINES, clock=clock)
    clock.now_s = 100.0
    assert fleet.tick() == []
    clock.now_s = 101.0
    assert fleet.tick() == fleet.members(State.DEAD) == [ReplicaId(0)]


def test_restarts_are_counted_and_end_in_retirement() -> None:
    fleet, [replica, other], _ = ready_fleet(2, max_restarts=2)
    for restarts in (1, 2):
        fleet.died(replica)
        restarted = fleet.restart(replica)
        assert restarted == ReplicaId(0, restarts)
        replica = restarted
    fleet.died(replica)
    assert fleet.restart(replica) is None
    assert fleet.state(replica) is State.RETIRED
    assert fleet.counters.restarts == 2
    assert not fleet.is_lost
    fleet.leave(replica)  # already gone: nothing to do
    for _ in range(3):
        fleet.died(other)
        other = fleet.restart(other) or other
    assert fleet.is_lost


def test_work_goes_to_the_least_loaded() -> None:
    fleet, [first, second], _ = ready_fleet()
    fleet.assign([1, 2, 3, 4])
    fleet.done(second, 2)
    fleet.done(second, 4)
    assert fleet.assign([5, 6, 7]) == {second: [5, 6], first: [7]}


def test_joining_replica_is_given_the_queue_and_then_the_lighter_share() -> None:
    fleet, [first], _ = ready_fleet(1, max_replicas=2)
    assert fleet.assign([1, 2]) == {first: [1, 2]}
    second = fleet.join()
    fleet.started(second)
    assert fleet.assign([3]) == {first: [3]}
    fleet.synced(second, 1)
    assert fleet.assign([4, 5, 6, 7]) == {second: [4, 5, 6], first: [7]}


def test_a_large_fleet_shares_evenly_in_the_order_of_slots() -> None:
    fleet, replicas, _ = ready_fleet(12)
    shares = fleet.assign(range(30))
    assert list(shares) == replicas
    assert [len(share) for share in shares.values()] == [3] * 6 + [2] * 6
    assert shares[replicas[10]] == [10, 22], "slot 10 comes after slot 9"


def test_join_and_leave_keep_to_the_limits() -> None:
    fleet, [first, second], _ = ready_fleet(2, min_replicas=1, max_replicas=2)
    with pytest.raises(ValueError, match="full"):
        fleet.join()
    fleet.assign([1, 2])
    fleet.leave(first)
    assert fleet.assign() == {second: [1]}
    assert not fleet.done(first, 1)
    with pytest.raises(ValueError, match="minimum of 1"):
        fleet.leave(second)
    assert fleet.join() == ReplicaId(2), "a slot is not used twice"


def test_a_replica_that_has_to_leave_finishes_its_work_and_gets_none() -> None:
    fleet, [first, second, third], _ = ready_fleet(3, min_replicas=2, max_replicas=3)
    fleet.assign([1, 2, 3])
    assert fleet.drain([first, second]) == [], "only one may go, and it has work"
    assert fleet.assign([4, 5]) == {second: [4], third: [5]}
    assert fleet.done(first, 1)
    assert fleet.drain([first, second]) == [first]
    fleet.leave(first)
    assert fleet.drain([second]) == [], "it serves to the end: without it too few are left"
    assert fleet.assign([6, 7]) == {second: [6], third: [7]}


def test_a_replica_leaves_only_when_another_one_runs_in_its_place() -> None:
    fleet, [first], _ = ready_fleet(1, max_replicas=2)
    second = fleet.join()
    assert fleet.drain([first]) == [], "the other one is still starting"
    fleet.started(second)
    assert fleet.drain([first]) == [first]
    assert fleet.assign([1]) == {}, "the other one has no weights yet"
    assert fleet.drain([]) == [] and fleet.assign() == {first: [1]}, "its node stays after all"


def test_failed_call_returns_its_work_and_gives_up_after_max_attempts() -> None:
    fleet, [replica], _ = ready_fleet(1, max_attempts=2)
    fleet.assign([1, 2, 3])
    assert fleet.done(replica, 3)
    assert fleet.failed(replica, [1]) == []
    assert (fleet.state(replica), fleet.queued) == (State.SUSPECT, (1,))
    fleet.ping(replica, 1)
    assert fleet.assign() == {replica: [1]}
    assert fleet.failed(replica, [1, 2, 3]) == [1], "2 failed once, 3 was answered before"
    assert fleet.queued == (2,)


def test_same_work_twice_is_refused_and_changes_nothing() -> None:
    fleet, [first, _], _ = ready_fleet()
    for work in ([7, 7], [1, 2]):
        if work == [1, 2]:
            fleet.assign([1])
        with pytest.raises(ValueError, match="queued or assigned already"):
            fleet.assign(work)
    assert fleet.queued == ()
    assert fleet.done(first, 1)
    assert fleet.assign([1]), "done work may come again"


@pytest.mark.parametrize(("replicas", "low", "high"), [(0, 0, 1), (2, 3, 4), (3, 1, 2)])
def test_impossible_sizes_are_refused(replicas: int, low: int, high: int) -> None:
    with pytest.raises(ValueError, match="need 1 <= min"):
        Fleet(replicas, min_replicas=low, max_replicas=high)


class FleetHistory(RuleBasedStateMachine):
    """Any order of events, also late ones about replicas restarted long ago and answers to no question."""

    @initialize(replicas=st.integers(1, 3))
    def start(self, replicas: int) -> None:
        self.clock = Clock()
        self.fleet: Fleet[int] = Fleet(
            replicas,
            max_replicas=4,
            max_restarts=2,
            max_attempts=2,
            deadlines=DEADLINES,
            clock=self.clock,
        )
        self.replicas = list(self.fleet.members())  # all there ever were
        self.gone: set[ReplicaId] = set()
        self.version = 0
        self.confirmed: dict[ReplicaId, int] = {}  # version of the last sync that was reported
        self.submitted = 0
        self.answers: Counter[int] = Counter()
        self.given_up: set[int] = set()
        self.draining: set[ReplicaId] = set()  # get no work

    def replica(self, index: int) -> ReplicaId:
        return self.replicas[index % len(self.replicas)]

    @rule(n=st.integers(0, 4))
    def assign(self, n: int) -> None:
        before = {replica: self.fleet.state(replica) for replica in self.fleet.members()}
        new = range(self.submitted, self.submitted + n)
        self.submitted += n
        for replica, work in self.fleet.assign(new).items():
            assert work
            assert before[replica] is State.READY
            assert self.confirmed[replica] == self.version
            assert replica not in self.draining
        serving = [r for r in self.fleet.members(State.READY) if r not in self.draining]
        assert not (self.fleet.queued and serving), "nothing waits while somebody may serve"

    @rule(index=st.integers(0, 50))
    def start_up(self, index: int) -> None:
        self.fleet.started(self.replica(index))

    @rule()
    def publish(self) -> None:
        self.version += 1
        self.fleet.publish(self.version)

    @rule(index=st.integers(0, 50), age=st.sampled_from([0, 0, 0, 1]))
    def sync(self, index: int, age: int) -> None:
        if self.version > age:
            self.confirmed[self.replica(index)] = max(self.confirmed.get(self.replica(index), 0), self.version - age)
            self.fleet.synced(self.replica(index), self.version - age)

    @rule(age=st.sampled_from([0, 0, 0, 1]))
    def bring_all_up(self, age: int) -> None:
        for index in range(len(self.replicas)):
            self.start_up(index)
            self.sync(index, age)

    @rule(index=st.integers(0, 50), version=st.none() | st.integers(0, 5))
    def ping(self, index: int, version: int | None) -> None:
        self.fleet.ping(self.replica(index), version)

    @rule(index=st.integers(0, 50))
    def ping_current(self, index: int) -> None:
        self.fleet.ping(self.replica(index), self.version)

    @rule(index=st.integers(0, 50))
    def miss(self, index: int) -> None:
        self.fleet.missed(self.replica(index))

    @rule(index=st.integers(0, 50))
    def die(self, index: int) -> None:
        self.fleet.died(self.replica(index))

    @rule(index=st.integers(0, 50), work=st.sets(st.integers(0, 20)))
    def fail(self, index: int, work: set[int]) -> None:
        given_up = self.fleet.failed(self.replica(index), sorted(work))
        assert not self.given_up & set(given_up)
        self.given_up |= set(given_up)

    @rule(index=st.integers(0, 50), work=st.integers(0, 30))
    def answer(self, index: int, work: int) -> None:
        owed = work in self.fleet.in_flight.get(self.replica(index), ())
        assert self.fleet.done(self.replica(index), work) is owed
        self.answers[work] += owed

    @rule(index=st.integers(0, 50))
    def answer_all(self, index: int) -> None:
        for work in self.fleet.in_flight.get(self.replica(index), ()):
            self.answer(index, work)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        for replica in self.fleet.tick():
            assert self.fleet.state(replica) is State.DEAD

    @rule()
    def restart_the_dead(self) -> None:
        for replica in self.fleet.members(State.DEAD):
            restarted = self.fleet.restart(replica)
            if restarted is not None:
                self.replicas.append(restarted)

    @rule()
    def join(self) -> None:
        if len(self.fleet.members()) < self.fleet.max_replicas:
            self.replicas.append(self.fleet.join())

    @rule(index=st.integers(0, 50))
    def leave(self, index: int) -> None:
        if len(self.fleet.members()) > self.fleet.min_replicas:
            self.fleet.leave(self.replica(index))

    @rule(indices=st.sets(st.integers(0, 50), max_size=3))
    def announce_the_end_of_nodes(self, indices: set[int]) -> None:
        leaving = {self.replica(index) for index in indices}
        going = sorted(leaving & set(self.fleet.members(State.STALE, State.READY, State.SUSPECT)))
        n_staying = len(set(self.fleet.members(State.STALE, State.READY)) - leaving)
        idle = self.fleet.drain(leaving)
        self.draining = set(going[: max(0, len(going) + n_staying - self.fleet.min_replicas)])
        assert set(idle) == self.draining - set(self.fleet.in_flight)
        for replica in idle:
            self.fleet.leave(replica)

    @invariant()
    def work_is_in_one_place(self) -> None:
        """Queue, one replica, done once, or given up: exactly one of them for each piece of work."""
        places = Counter(self.fleet.queued)
        for work in self.fleet.in_flight.values():
            places.update(work)
        places.update(self.answers)
        places.update(self.given_up)
        assert {work: places[work] for work in range(self.submitted)} == dict.fromkeys(range(self.submitted), 1)
        assert bool(self.fleet._attempts) == bool(self.fleet.queued or self.fleet.in_flight)

    @invariant()
    def only_current_weights_serve(self) -> None:
        for replica in self.fleet.members(State.READY):
            assert self.confirmed.get(replica) == self.version

    @invariant()
    def gone_replicas_stay_gone_and_hold_no_work(self) -> None:
        for replica in self.replicas:
            if self.fleet.state(replica) in GONE:
                self.gone.add(replica)
                assert replica not in self.fleet.in_flight
        assert all(self.fleet.state(replica) in GONE for replica in self.gone)
        assert max(replica.restarts for replica in self.replicas) <= self.fleet.max_restarts
        assert len(self.fleet.members()) <= self.fleet.max_replicas

    def teardown(self) -> None:
        """Whatever happened, a fleet that gets healthy replicas finishes all of its work."""
        self.restart_the_dead()
        self.join()
        self.publish()
        self.bring_all_up(0)
        if not self.fleet.is_lost:
            for _ in range(self.submitted):
                self.fleet.assign()
                for index in range(len(self.replicas)):
                    self.answer_all(index)
            assert not self.fleet.queued and not self.fleet.in_flight
            self.work_is_in_one_place()


FleetHistory.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True, database=None
)
test_random_histories_keep_every_invariant = FleetHistory.TestCase


def test_cancelled_work_is_forgotten_and_its_answers_are_late() -> None:
    fleet: Fleet[str] = Fleet(1)
    (replica,) = fleet.members()
    fleet.started(replica)
    fleet.publish(1)
    fleet.synced(replica, 1)
    fleet.assign(["a", "b"])
    fleet.missed(replica)
    fleet.assign(["c"])  # queued: no replica is ready
    fleet.cancel()
    assert not fleet.queued and not fleet.in_flight
    assert not fleet.done(replica, "a") and fleet.counters.dropped_late == 1
    fleet.ping(replica, 1)
    assert fleet.assign(["a"]) == {replica: ["a"]}  # the name is free again
