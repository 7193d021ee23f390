"""What the driver and the workers of a supervised training exchange: the plan, the prompts, the events.

Separate from `actors/supervised_worker.py` because making a plan needs no torch, which is slow to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import DataConfig

from actors.supervised_tasks import Example, Task
from rlvid.config import JobConfig
from rlvid.data.encoding import Source
from rlvid.data.order import batch_indices
from rlvid.data.ray_stream import prompt_stream
from rlvid.reporting.checkpoints import Checkpoints

Event = tuple[str, Any]  # what a worker tells the driver: kind and content


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

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def examples(self, name: str) -> tuple[Example, ...]:
        """Of a data set of the workers: "train", "held_out", or "all" for both."""
        return {"train": self.train, "held_out": self.held_out, "all": (*self.train, *self.held_out)}[name]

    def batch(self, step: int) -> list[int]:
        """Indices of the examples of one mini-batch, over all workers: a function of seed and step alone."""
        size = self.cfg.train.batch_size
        return batch_indices(len(self.train), self.cfg.seed, step * size, size)

    def shares(self, rank: int, world: int, start: int) -> list[tuple[int, int]]:
        """(step, index of an example) of everything that a rank trains on from step `start` on: every world-th example
        of each mini-batch, so neither a restart nor another number of workers changes a mini-batch."""
        size, steps = self.cfg.train.batch_size, self.cfg.train.steps
        order = batch_indices(len(self.train), self.cfg.seed, start * size, (steps - start) * size)
        return [(start + i // size, index) for i, index in enumerate(order) if i % size % world == rank]

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
        self._put = self._taken = self._done = 0
        self._state: Mapping[str, Any] = {}
        self._failed: list[int] = []  # ranks that told their error, in order of time
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

    def put(self, *events: Event) -> bool:
        """Returns whether to stop."""
        self._events += events
        self._put += len(events)
        return self._is_stopping

    def fail(self, rank: int, error: str) -> None:
        """A worker tells why it ends."""
        self._failed.append(rank)
        self.put(("failed", f"worker {rank} failed: {error}"))

    def take(self, state: Mapping[str, Any]) -> list[Event]:
        """The next events, when the driver has handled the previous ones.

        Args:
            state: of the job after those, for a checkpoint.
        """
        self._done, self._state = self._taken, state
        events, self._events = self._events, []
        self._taken += len(events)
        return events

    def settled_state(self) -> Mapping[str, Any] | None:
        """The job's state once the driver has handled all events; None before."""
        return self._state if self._done == self._put else None

    def stop(self) -> None:
        self._is_stopping = True


def root_error(failures: Mapping[int, BaseException], told: Sequence[int]) -> BaseException | None:
    """The error, by rank, that caused the others: a process that died, else the one that was told first. The others
    only say that a connection was closed.

    Args:
        told: ranks that told an error, in order of time. An earlier restart may have told some too.
    """
    ended = [error for error in failures.values() if isinstance(error, RayActorError)]
    in_order = [failures[rank] for rank in reversed(list(dict.fromkeys(reversed(told)))) if rank in failures]
    return next(iter([*ended, *in_order, *failures.values()]), None)


class Shards(DataConfig):
    """The prompts of each worker, from the step on where training resumes."""

    def __init__(self, plan: Plan):
        super().__init__()
        self._plan = plan

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        plan, (name,) = self._plan, datasets
        newest = plan.checkpoints.newest()
        source, place = Source.of(plan.cfg, plan.model), plan.cfg.placement
        encoders = -(-place.encoders // world_size) if name == "train" else 1
        encode_cpus = 0.0 if plan.cfg.is_elastic else place.encode_cpus  # elastic workers may take every CPU there is
        examples = plan.examples(name)
        samples = ray.put([example.sample for example in examples])
        shards = []
        for rank in range(world_size):
            order = list(range(rank, len(examples), world_size))
            if name == "train":
                order = [i for _, i in plan.shares(rank, world_size, newest.step if newest else 0)]
            stream = prompt_stream(samples, order, source, encoders, encode_cpus).iterator() if order else None
            shards.append({name: stream})
        return shards
