from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from actors.pump import Pump
from rlvid.errors import UserError


class Counter:
    """State that only the pump's thread touches."""

    def __init__(self) -> None:
        self.value = 0
        self.threads: set[str] = set()
        self.pump = Pump("counter", self.act)
        self.pump.start()

    def act(self) -> None:
        self.threads.add(threading.current_thread().name)
        if self.value < 0:
            raise UserError("below zero")

    def add(self, amount: int) -> None:
        self.value += amount


@pytest.fixture
def counter() -> Iterator[Counter]:
    made = Counter()
    yield made
    made.pump.stop()


def test_events_run_in_the_thread_in_the_order_they_were_posted(counter: Counter) -> None:
    seen: list[int] = []
    for i in range(100):
        counter.pump.post(lambda i=i: seen.append(i))  # type: ignore[misc]
    assert counter.pump.run_in_thread(lambda: list(seen)) == list(range(100))
    assert counter.threads <= {"counter"}


def test_a_condition_is_waited_for_and_its_action_runs_in_the_thread(counter: Counter) -> None:
    future = counter.pump.when(lambda: counter.value >= 3, lambda: threading.current_thread().name)
    for _ in range(2):
        counter.pump.post(lambda: counter.add(1))
    assert counter.pump.run_in_thread(lambda: counter.value) == 2 and not future.done()
    counter.pump.post(lambda: counter.add(1))
    assert future.result(timeout=5) == "counter"


def test_an_error_of_an_action_reaches_its_caller_alone(counter: Counter) -> None:
    with pytest.raises(ZeroDivisionError):
        counter.pump.run_in_thread(lambda: 1 // 0)
    assert counter.pump.run_in_thread(lambda: counter.value) == 0


def test_an_error_of_the_thread_reaches_every_open_and_every_later_future(counter: Counter) -> None:
    waiting = [counter.pump.future(), counter.pump.when(lambda: False)]
    counter.pump.post(lambda: counter.add(-1))
    for future in waiting:
        with pytest.raises(UserError, match="below zero"):
            future.result(timeout=5)
    counter.pump.join(5)
    for ask in (counter.pump.future, lambda: counter.pump.run_in_thread(lambda: None)):
        with pytest.raises(UserError, match="below zero"):
            ask()


def test_a_busy_thread_acts_without_events_and_runs_them_in_between() -> None:
    acts: list[int] = []
    errors: list[BaseException] = []
    is_over = threading.Event()

    def act() -> None:
        acts.append(1)
        if is_over.is_set():
            raise UserError("over")

    pump = Pump("busy", act, is_idle=lambda: False, on_error=errors.append)
    pump.start()
    before = pump.run_in_thread(lambda: len(acts))
    while len(acts) < before + 100:
        time.sleep(0.001)
    pump.post(is_over.set)
    pump.join(5)
    assert [str(error) for error in errors] == ["over"]


def test_a_stopped_thread_is_gone_and_leaves_no_caller_waiting(counter: Counter) -> None:
    future = counter.pump.future()
    counter.pump.stop()
    assert not counter.pump.is_alive()
    with pytest.raises(RuntimeError, match="was stopped"):
        future.result(timeout=5)
    counter.pump.stop()  # a second time: nothing to do
