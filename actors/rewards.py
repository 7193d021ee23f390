"""Rewards of groups of rollouts: rules run in worker processes beside the driver, in batches, each with a deadline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from rlvid.rewards.part import Group, NoReward, Part, Response, Values, combine, score_rules
from rlvid.types import Reward, Rollout, Sample

logger = logging.getLogger(__name__)
TRIES = 2

Model = Callable[[Sequence[Group]], Sequence[Values]]


class RewardWorker:
    """Values of the parts that are rules."""

    def __init__(self, parts: Sequence[Part]):
        self._parts = parts

    def score(self, groups: Sequence[Group]) -> list[dict[str, Values]]:
        return [score_rules(self._parts, group) for group in groups]


class Rewards:
    """Scores groups of rollouts. What fails or takes too long twice is invalid, never 0.

    Args:
        opening: with which the policy's prompts begin the response (`ChatFamily.opening`).
        models: of the parts whose model has an actor of its own, by the part's name.
        timeout_s: of a worker's share.
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
        self._parts, self._cpus, self._opening, self._models = parts, cpus, opening, models or {}
        self._workers: list[ActorHandle[Any]] = [self._start() for _ in range(workers)]

    def __call__(self, samples: Sequence[Sample], rollouts: Sequence[Sequence[Rollout]]) -> list[list[Reward]]:
        """One reward per rollout, in the order given."""
        groups = [
            Group(sample, tuple(Response(r.text, len(r.token_ids)) for r in own), self._opening)
            for sample, own in zip(samples, rollouts, strict=True)
        ]
        values = self._score_rules(groups)
        for part in self._parts:
            if part.name in self._models:
                covered = [i for i, group in enumerate(groups) if part.covers(group.sample)]
                scored = self._models[part.name]([groups[i] for i in covered])
                for i, own_values in zip(covered, scored, strict=True):
                    values[i][part.name] = own_values
        return [combine(self._parts, group, own) for group, own in zip(groups, values, strict=True)]

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def _start(self) -> ActorHandle[Any]:
        return ray.remote(RewardWorker).options(num_cpus=self._cpus, max_restarts=-1).remote(self._parts)

    def _score_rules(self, groups: Sequence[Group]) -> list[dict[str, Values]]:
        n = len(self._workers)
        shares = [groups[i::n] for i in range(n)]
        calls = [worker.score.remote(share) for worker, share in zip(self._workers, shares, strict=True)]
        values: list[dict[str, Values]] = [{} for _ in groups]
        for i, (call, share) in enumerate(zip(calls, shares, strict=True)):
            values[i::n] = self._finish(i, call, share)
        return values

    def _finish(self, i: int, call: Any, share: Sequence[Group]) -> list[dict[str, Values]]:
        """What worker `i` returns for its share. A worker that fails is replaced, and its share tried again."""
        reason = ""
        for _ in range(TRIES):
            try:
                scored: list[dict[str, Values]] = ray.get(call, timeout=self._timeout_s)
            except (GetTimeoutError, RayError) as e:
                reason = f"reward worker: {type(e).__name__}"
                logger.warning("%s; %d samples are tried again", reason, len(share))
                ray.kill(self._workers[i])
                self._workers[i] = self._start()
                call = self._workers[i].score.remote(share)
            else:
                return scored
        return [{part.name: [NoReward(reason)] * len(g.responses) for part in self._parts} for g in share]
