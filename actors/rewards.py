"""Reward workers: rewards are computed beside the driver, in batches, each with a deadline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from actors.scorer import ScorerHandle, check_model_part
from rlvid.config import RewardPartConfig
from rlvid.rewards.rules import RuleRewards
from rlvid.types import Reward, Rollout, Sample

logger = logging.getLogger(__name__)
TIMEOUT_S = 120.0  # of one batch
TRIES = 2


def check_parts(parts: Sequence[RewardPartConfig]) -> None:
    """
    Raises:
        UserError: no parts, two parts of one name, or a part that could never be given.
    """
    for index, part in enumerate(parts):
        if part.kind == "model":
            check_model_part(part, where=f"rewards[{index}] ({part.name or part.kind})")
    # As rules of some kind: what is left to check is the same for all.
    RuleRewards([p if p.kind != "model" else RewardPartConfig(kind="exact", name=p.name or "model") for p in parts])


def _with(part: RewardPartConfig, marks: Sequence[Reward], scores: Sequence[float] | str) -> list[Reward]:
    """One sample's rewards with a reward model's part added; invalid where the model has no score."""
    name = part.name or part.kind
    if isinstance(scores, str):
        return [Reward.invalid(f"{name}: {scores}") if m.is_valid else m for m in marks]
    return [
        Reward({**m.parts, name: value}, m.total + part.weight * value) if m.is_valid else m
        for m, value in zip(marks, scores, strict=True)
    ]


class RewardWorker:
    """Marks by rules; without any, every response begins at 0."""

    def __init__(self, parts: Sequence[RewardPartConfig]):
        self._rewards = RuleRewards(parts) if parts else lambda *_: Reward({}, 0.0)

    def mark(self, batch: Sequence[tuple[Sample, Sequence[tuple[str, int]]]]) -> list[list[Reward]]:
        """Rewards of (response text, number of tokens), by sample."""
        return [[self._rewards(text, n, sample) for text, n in responses] for sample, responses in batch]


class Rewards:
    """Marks groups of rollouts. A batch that fails or takes too long twice is invalid, never 0."""

    def __init__(
        self,
        parts: Sequence[RewardPartConfig],
        workers: int,
        cpus: float,
        scorers: Sequence[ScorerHandle] = (),
    ):
        check_parts(parts)  # a wrong configuration is an error here, not in a worker
        self._parts = [p for p in parts if p.kind != "model"]
        self._models = list(zip((p for p in parts if p.kind == "model"), scorers, strict=True))
        self._cpus = cpus
        self._workers: list[ActorHandle[Any]] = [self._start() for _ in range(workers)]

    def _start(self) -> ActorHandle[Any]:
        return ray.remote(RewardWorker).options(num_cpus=self._cpus, max_restarts=-1).remote(self._parts)

    def __call__(self, samples: Sequence[Sample], groups: Sequence[Sequence[Rollout]]) -> list[list[Reward]]:
        """One reward per rollout, in the order given."""
        batch = [
            (s, [(r.text, len(r.token_ids)) for r in rollouts]) for s, rollouts in zip(samples, groups, strict=True)
        ]
        n = len(self._workers)
        shares = [batch[i::n] for i in range(n)]
        marked: list[list[Reward]] = [[] for _ in batch]
        for i, share in enumerate(self._mark(shares)):
            marked[i::n] = share
        answers = [(s, [text for text, _ in responses]) for s, responses in batch]
        for part, scorer in self._models:
            marked = [_with(part, marks, scores) for marks, scores in zip(marked, scorer(answers), strict=True)]
        return marked

    def _mark(self, shares: Sequence[Sequence[Any]]) -> list[list[list[Reward]]]:
        calls = [worker.mark.remote(share) for worker, share in zip(self._workers, shares, strict=True)]
        results = []
        for i, (call, share) in enumerate(zip(calls, shares, strict=True)):
            reason = ""
            for _ in range(TRIES):
                try:
                    results.append(ray.get(call, timeout=TIMEOUT_S))
                    break
                except (GetTimeoutError, RayError) as e:
                    reason = f"reward worker: {type(e).__name__}"
                    logger.warning("%s; %d samples are tried again", reason, len(share))
                    ray.kill(self._workers[i])
                    self._workers[i] = self._start()
                    call = self._workers[i].mark.remote(share)
            else:
                results.append([[Reward.invalid(reason) for _ in responses] for _, responses in share])
        return results

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
