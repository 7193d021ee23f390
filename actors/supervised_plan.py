"""The driver's side of a supervised training: the plan that it gives to the workers, and the events that come back.

The workers are in `actors/supervised_worker.py`, which the driver does not import: Ray Train and torch take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.supervised_tasks import Example, Task
from rlvid.config import JobConfig
from rlvid.data.mixing import shares_of
from rlvid.data.order import Shares, Strata, batch_indices
from rlvid.errors import UserError
from rlvid.reporting.checkpoints import Checkpoints

Event = tuple[str, Any]  # that a worker reports to the driver: kind and content

POLL_S = 0.05  # between two requests of the driver for events
SILENCE_S = 60.0  # without events until the driver says so; steps that take longer raise it


@dataclass(frozen=True)
class Plan:
    """What the workers need to know; paths are absolute."""

    cfg: JobConfig
    task: Task
    model: Path
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    folder: Path  # checkpoints, logs
    out: Path  # the trained model, a checkpoint folder that appears whole
    evaluated: int = -1  # step of the last evaluation that the driver has logged
    together: Strata | None = None  # examples that follow each other, and mostly go to one worker

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def examples(self, name: str) -> tuple[Example, ...]:
        """Of a data set of the workers: "train", "held_out", or "all" for both."""
        return {"train": self.train, "held_out": self.held_out, "all": (*self.train, *self.held_out)}[name]

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of one mini-batch, over all workers: a function of seed and step alone."""
        size = self.cfg.train.batch_size
        return self._order(step * size, size)

    def shares(self, rank: int, world: int, start: int) -> list[tuple[int, int]]:
        """(step, index of an example) of everything that a rank trains on from step `start` on: every world-th example
        of each mini-batch, or a part of it whose examples stay `together`. So neither a restart nor another number of
        workers changes a mini-batch."""
        size, steps = self.cfg.train.batch_size, self.cfg.train.steps
        order = self._order(start * size, (steps - start) * size)
        rank_of = [i % world if self.together is None else i * world // size for i in range(size)]
        return [(start + i // size, index) for i, index in enumerate(order) if rank_of[i % size] == rank]

    def _order(self, start: int, count: int) -> list[int]:
        n, seed = len(self.train), self.cfg.seed
        return batch_indices(n, seed, start, count, together=self.together, shares=self.shares_of_examples)

    @cached_property
    def shares_of_examples(self) -> Shares | None:
        return shares_of([example.sample for example in self.train])

    def is_evaluated_after(self, step: int) -> bool:
        """Before the first step, every `evaluate.every` steps and after the last one; each evaluation once."""
        is_due = step % self.cfg.evaluate.every == 0 or step == self.cfg.train.steps
        return bool(self.held_out) and is_due and step > self.evaluated


class TrainingRun:
    """The actor that runs Ray Train. It carries events from the workers to the driver, and the driver's wish to stop
    to the workers. Killing it ends Ray Train's controller and the workers, which it owns.

    Ray Train does not run in a thread of the driver: where a worker's error ended the run, Ray was shut down under that
    thread, and the driver sometimes ended with a segmentation fault.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._is_handling = False  # the driver, what it took last
        self._state: Mapping[str, Any] = {}
        self._failed: list[int] = []  # ranks that reported an error, in order of time
        self._is_stopping = False

    @ray.method(concurrency_group="fit")
    def fit(self, plan: Plan, run: ray.actor.ActorHandle) -> tuple[BaseException | None, BaseException | None]:
        """Train to the end.

        Args:
            run: this actor.

        Returns:
            The worker's error that made Ray Train give up, if there is one, and what Ray Train says of all workers.
        """
        from actors.supervised_worker import make_trainer

        try:
            make_trainer(plan, run).fit()
        except Exception as e:
            return root_error(getattr(e, "worker_failures", {}), self._failed) or e, e
        return None, None

    def put(self, event: Event) -> bool:
        """Returns whether to stop."""
        self._events.append(event)
        return self._is_stopping

    def fail(self, rank: int, error: str) -> None:
        """A worker reports why it ends."""
        self._failed.append(rank)
        self.put(("failed", f"worker {rank} failed: {error}"))

    def take(self, state: Mapping[str, Any]) -> list[Event]:
        """The next events, when the driver has handled the previous ones.

        Args:
            state: of the job after those, for a checkpoint.
        """
        events, self._events = self._events, []
        self._state, self._is_handling = state, bool(events)
        return events

    def settled_state(self) -> Mapping[str, Any] | None:
        """The job's state once the driver has handled all events; None before."""
        return None if self._events or self._is_handling else self._state

    def stop(self) -> None:
        self._is_stopping = True


def root_error(failures: Mapping[int, BaseException], reported: Sequence[int]) -> BaseException | None:
    """The error, by rank, that caused the others: of a process that crashed, else the one that was reported first. The
    others only say that a connection was closed.

    Args:
        reported: ranks that reported an error, in order of time, before an earlier restart too.
    """
    ended = [error for error in failures.values() if isinstance(error, RayActorError)]
    in_order = [failures[rank] for rank in reversed(list(dict.fromkeys(reversed(reported)))) if rank in failures]
    return next(iter([*ended, *in_order, *failures.values()]), None)


class SupervisedTraining:
    """The driver's side of one training. `events` yields what happens, until the end."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._is_stopping = False
        self._stage = ""  # what the workers reported last; empty: no worker has started
        # Ray Train looks for checkpoints where it runs: on the machine of the run folder.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, concurrency_groups={"fit": 1}, scheduling_strategy=here)(TrainingRun)
        self._run = actor.remote()

    def stop(self) -> None:
        """Ask the workers to end after the step in progress, with a checkpoint; at once where none has started."""
        self._is_stopping = True
        self._run.stop.remote()

    def events(self, state: Callable[[], Mapping[str, Any]]) -> Iterator[Event]:
        """What the workers report, in order.

        Args:
            state: of the job after the events so far; checkpoints keep it.

        Raises:
            UserError: of a worker.
            Exception: that of a worker, after more failures than `train.max_failures`; its cause is Ray Train's account
                of all workers.
        """
        try:
            end = self._run.fit.remote(self._plan, self._run)
            last_s, patience_s = time.monotonic(), SILENCE_S
            is_over = False
            while not is_over:
                is_over = bool(ray.wait([end], timeout=POLL_S)[0])
                events = ray.get(self._run.take.remote(dict(state())))
                silent_s = time.monotonic() - last_s
                if events:
                    last_s, patience_s = time.monotonic(), max(SILENCE_S, 3 * silent_s)
                elif self._is_stopping and not self._stage:
                    return
                elif silent_s > patience_s:
                    patience_s *= 2
                    yield "note", describe_silence(self._stage, silent_s, self._plan.folder / "logs")
                for kind, content in events:
                    if kind == "user error":
                        raise UserError(content)
                    self._stage = content if kind == "stage" else self._stage
                    yield kind, content
            error, cause = ray.get(end)
            if error is not None:
                raise error from cause
        finally:
            ray.kill(self._run)


def describe_silence(stage: str, seconds: float, logs: Path) -> str:
    """A message for the time in which no event comes.

    Args:
        stage: the last one that the workers reported; empty if none has started.
    """
    if stage:
        return f"no news from the workers for {seconds:.0f} s, they were {stage}; see {logs}"
    return (
        f"no worker has started for {seconds:.0f} s: each needs placement.trainer_cpus, each encoder "
        f"placement.encode_cpus. `ray status` shows what waits for room"
    )
