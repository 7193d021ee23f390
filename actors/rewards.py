"""Rewards of groups of rollouts: rules and the user's own code run in worker processes beside the driver."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from rlvid.rewards.part import Group, NoReward, Part, Response, Values, combine, score_rules
from rlvid.types import Reward, Rollout, Sample

logger = logging.getLogger(__name__)
TRIES = 2
START_S = 120.0  # for a worker's process to start
WAITING = 16  # groups that a worker has in progress where a part waits for a server

Model = Callable[[Sequence[Group]], Sequence[Values]]


class RewardWorker:
    """Values of the parts that have a function."""

    def __init__(self, parts: Sequence[Part]):
        self._waiting = [part for part in parts if part.kind.waits]
        self._others = [part for part in parts if not part.kind.waits]

    def wait_ready(self) -> None:
        """Returns once the process runs."""

    @ray.method(num_returns="streaming")
    def score(self, groups: Sequence[Group]) -> Iterator[dict[str, Values]]:
        """The values of each group, as soon as they and those before are there."""
        with ThreadPoolExecutor(WAITING) as pool:
            for group, coming in zip(groups, pool.map(partial(score_rules, self._waiting), groups), strict=True):
                yield coming | score_rules(self._others, group)


class Rewards:
    """Scores groups of rollouts. What fails or takes too long twice is invalid, never 0, and takes no other along.

    Args:
        opening: with which the policy's prompts begin the response (`ChatFamily.opening`).
        models: of the parts whose values come from elsewhere, by the part's name: reward models, judges.
        timeout_s: for a group.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        workers: int,
        cpus: float,
        opening: str = "",
        models: Mapping[str, Model] | None = None,
        timeout_s: float = 120.0,
    ):
        self._timeout_s = timeout_s
        self._parts, self._cpus, self._opening = parts, cpus, opening
        self.models = dict(models or {})
        self._starting: list[ActorHandle[Any]] = []
        self._workers: list[ActorHandle[Any]] = [self._start() for _ in range(workers)]

    def __call__(self, samples: Sequence[Sample], rollouts: Sequence[Sequence[Rollout]]) -> list[list[Reward]]:
        """One reward per rollout, in the order given."""
        groups = [
            Group(sample, tuple(Response(r.text, len(r.token_ids)) for r in own), self._opening)
            for sample, own in zip(samples, rollouts, strict=True)
        ]
        self._wait_ready()
        n = len(self._workers)
        streams = [worker.score.remote(groups[i::n]) for i, worker in enumerate(self._workers)]
        values: list[dict[str, Values]] = [{} for _ in groups]
        for part in self._parts:
            if part.name in self.models:
                covered = [i for i, group in enumerate(groups) if part.covers(group.sample)]
                scored = self.models[part.name]([groups[i] for i in covered]) if covered else []
                for i, own_values in zip(covered, scored, strict=True):
                    values[i][part.name] = own_values
        for i, stream in enumerate(streams):
            for own, found in zip(values[i::n], self._finish(i, stream, groups[i::n]), strict=True):
                own.update(found)
        return [combine(self._parts, group, own) for group, own in zip(groups, values, strict=True)]

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _start(self) -> ActorHandle[Any]:
        worker: ActorHandle[Any] = (
            ray.remote(RewardWorker).options(num_cpus=self._cpus, max_restarts=-1).remote(self._parts)
        )
        self._starting.append(worker)
        return worker

    def _wait_ready(self) -> None:
        """The deadline of a group does not count the start of a worker's process."""
        with suppress(GetTimeoutError, RayError):  # then its first group says so
            ray.get([worker.wait_ready.remote() for worker in self._starting], timeout=START_S)
        self._starting.clear()

    def _finish(self, number: int, stream: Any, share: Sequence[Group]) -> list[dict[str, Values]]:
        """What a worker returns for its share. One that fails is replaced, and continues with the group it failed at;
        where a group fails again it has no values."""
        done: list[dict[str, Values]] = []
        failures = 0  # of the next group
        while len(done) < len(share):
            try:
                if not ray.wait([stream], timeout=self._timeout_s)[0]:
                    raise TimeoutError(f"no values within deadlines.reward_s={self._timeout_s:g}")
                done.append(ray.get(next(stream)))
                failures = 0
            except (TimeoutError, RayError) as e:
                failures += 1
                cause = getattr(e, "cause", None) or e
                reason = f"reward worker: {type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
                group = share[len(done)]
                logger.warning("sample %s: %s", group.sample.id, reason)
                if failures == TRIES:
                    names = [part.name for part in self._parts if part.kind.score and part.covers(group.sample)]
                    done.append({name: [NoReward(reason)] * len(group.responses) for name in names})
                    failures = 0
                ray.kill(self._workers[number])
                self._workers[number] = self._start()
                self._wait_ready()
                stream = self._workers[number].score.remote(share[len(done) :])
        return done
