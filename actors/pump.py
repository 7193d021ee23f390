"""A thread that owns some state: others post events to it, or wait until it finds a condition true."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Event = Callable[[], None]
TURN_S = 0.5  # longest time between two calls of `act`


class Pump(threading.Thread):
    """Runs the posted events one after another, and `act` after them, at least every `TURN_S`.

    An error in an event or in `act` ends the thread. Every future that is open then, and every one asked for later,
    raises that error: no caller waits forever.

    Args:
        is_idle: whether to wait for an event before the next `act`.
        on_error: called in the thread when an error ends it, after the futures have it.
    """

    def __init__(
        self,
        name: str,
        act: Event,
        is_idle: Callable[[], bool] = lambda: True,
        on_error: Callable[[BaseException], None] = lambda _: None,
    ):
        super().__init__(name=name, daemon=True)
        self._act, self._is_idle, self._on_error = act, is_idle, on_error
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._conditions: list[tuple[Callable[[], bool], Callable[[], Any], Future[Any]]] = []
        self._open: set[Future[Any]] = set()
        self._lock = threading.Lock()  # of `_open` and `_error`: no future may miss the error
        self._error: BaseException | None = None
        self._is_stopping = False

    def post(self, event: Event) -> None:
        """Run `event()` in the thread, soon. Ignored after its end."""
        self._events.put(event)

    def future(self) -> Future[Any]:
        """A future that an event will resolve; if the thread ends before, it raises why."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled
        with self._lock:
            if self._error is not None:
                raise self._error
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def when(self, condition: Callable[[], bool], action: Callable[[], Any] = lambda: None) -> Future[Any]:
        """As soon as `condition()` holds, the result of `action()` or what it raised; both run in the thread."""
        future = self.future()
        self.post(lambda: self._conditions.append((condition, action, future)))
        return future

    def run_in_thread(self, action: Callable[[], T]) -> T:
        """The result of `action()`, which runs in the thread."""
        result: T = self.when(lambda: True, action).result()
        return result

    def stop(self) -> None:
        """End the thread and wait for its end."""

        def stop() -> None:
            self._is_stopping = True

        self.post(stop)
        self.join()

    def run(self) -> None:
        error: BaseException = RuntimeError(f"the thread {self.name!r} was stopped")
        try:
            while not self._is_stopping:
                self._run_events()
                self._act()
                self._check_conditions()
        except BaseException as e:
            error = e
        with self._lock:
            self._error = error
        for future in list(self._open):
            future.set_exception(error)
        if not self._is_stopping:
            self._on_error(error)

    def _run_events(self) -> None:
        """Wait for an event, then run all that have come."""
        try:
            self._events.get(timeout=TURN_S if self._is_idle() else 0)()
            while True:
                self._events.get_nowait()()
        except queue.Empty:
            pass

    def _check_conditions(self) -> None:
        for entry in [entry for entry in self._conditions if entry[0]()]:
            self._conditions.remove(entry)
            _, action, future = entry
            try:
                future.set_result(action())
            except Exception as e:
                future.set_exception(e)
