"""What goes between the driver and the workers of a training on pairs: the plan, the prompts, the news.

Apart from `actors/supervised_worker.py` because who makes a plan needs no torch, which is slow to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import DataConfig

from rlvid.config import DpoJobConfig
from rlvid.data.encoding import Source
from rlvid.data.order import batch_indices
from rlvid.data.ray_stream import prompt_stream
from rlvid.reporting.checkpoints import Checkpoints
from rlvid.types import Preference

Event = tuple[str, Any]  # what a worker tells the driver: kind and content


@dataclass(frozen=True)
class PreferencePlan:
    """What the workers need to know; paths are absolute."""

    cfg: DpoJobConfig
    model: Path
    reference: Path
    pairs: tuple[Preference, ...]
    held_out: tuple[Preference, ...]
    folder: Path  # checkpoints, reference log-probs, logs
    out: Path  # the trained policy, a checkpoint folder that appears whole

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints")

    def items(self, rank: int, world: int, start: int) -> list[tuple[int, int]]:
        """(step, index of a pair) of everything that a rank trains on from step `start` on."""
        size, steps = self.cfg.train.batch_size, self.cfg.train.steps
        order = batch_indices(len(self.pairs), self.cfg.seed, start * size, (steps - start) * size)
        return [(start + i // size, pair) for i, pair in enumerate(order) if i % size % world == rank]


class TrainingRun:
    """The actor that runs Ray Train. It carries what the workers have to say to the driver, and the driver's wish to
    stop to the workers. Killing it ends Ray Train's controller and workers, which it owns.

    The driver does not wait for Ray Train in a thread of its own: where a worker's error ended the run, Ray was shut
    down under that thread, and the driver died of a segmentation fault now and then.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._put = self._taken = self._done = 0
        self._is_stopping = False

    @ray.method(concurrency_group="fit")
    def fit(
        self, plan: PreferencePlan, run: ray.actor.ActorHandle
    ) -> tuple[BaseException | None, BaseException | None]:
        """Train to the end; the error of a worker that made Ray Train give up, if any did, and what Ray Train says.

        Args:
            run: this actor.
        """
        from actors.supervised_worker import make_trainer

        try:
            make_trainer(plan, run).fit()
        except Exception as e:
            failures: dict[int, BaseException] = getattr(e, "worker_failures", {})
            return (next(iter(failures.values())), e) if failures else (e, None)
        return None, None

    def put(self, *events: Event) -> bool:
        """Returns whether to stop."""
        self._events += events
        self._put += len(events)
        return self._is_stopping

    def take(self) -> list[Event]:
        """The driver takes the next ones when it is done with the last ones."""
        self._done = self._taken
        events, self._events = self._events, []
        self._taken += len(events)
        return events

    def is_done(self) -> bool:
        """Whether the driver has written down all that was put."""
        return self._done == self._put

    def stop(self) -> None:
        self._is_stopping = True


class Shards(DataConfig):
    """The prompts of each worker, from the step on where training goes on."""

    def __init__(self, plan: PreferencePlan):
        super().__init__()
        self._plan = plan

    def configure(self, datasets: dict[str, Any], world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:
        plan, (name,) = self._plan, datasets
        newest = plan.checkpoints.newest()
        source, place = Source.of(plan.cfg, plan.model), plan.cfg.placement
        encoders = -(-place.encoders // world_size) if name == "train" else 1
        encode_cpus = 0.0 if plan.cfg.is_elastic else place.encode_cpus  # elastic workers may take every CPU there is
        pairs = {"train": plan.pairs, "held_out": plan.held_out, "all": (*plan.pairs, *plan.held_out)}[name]
        samples = ray.put([pair.sample for pair in pairs])
        shards = []
        for rank in range(world_size):
            if name == "train":
                order = [i for _, i in plan.items(rank, world_size, newest.step if newest else 0)]
            else:
                order = list(range(rank, len(pairs), world_size))
            stream = prompt_stream(samples, order, source, encoders, encode_cpus).iterator() if order else None
            shards.append({name: stream})
        return shards
