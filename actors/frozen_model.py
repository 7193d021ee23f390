"""Models whose weights do not change: the reference, in ranks of its own, and reward models, each in an actor.

The reference is the policy at one moment: it is loaded from a checkpoint folder, so its weights do not travel through
the object store. A reward model (`rewards: [{kind: model}]`) is of kind Bradley-Terry:
VideoScore's kinds judge generated videos against their prompts, and a policy that answers in text makes no video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.actor_process import enter_process
from actors.placement import Placement, Slot
from actors.ranks import GroupRef, LogProbs, Rank, RankGroup, fetch
from rlvid.config import JobConfig
from rlvid.rewards.part import Group, NoReward, Values


class ReferenceRank(Rank):
    """One rank of the reference; `start` meets the others, `load` has a model to load."""

    def load(self, folder: Path) -> None:
        from rlvid.models.families import load_family
        from rlvid.training.frozen import FrozenPolicy

        self._policy = FrozenPolicy(folder, load_family(folder), self._cfg.model, self._cfg.train)

    def logprobs(self, groups: Sequence[GroupRef]) -> LogProbs:
        return self._policy.logprobs(fetch(groups))


class ReferenceGroup(RankGroup):
    """All ranks of the reference: as many as the trainer has, sharded as it is (ZeRO-3)."""

    def __init__(self, folder: Path, cfg: JobConfig, slots: Sequence[Slot], placement: Placement, logs: Path):
        super().__init__(ReferenceRank, folder, cfg, slots, placement, logs)

    def load(self, folder: Path) -> None:
        """Load a checkpoint folder, in the background: what is asked next waits for it."""
        self._loaded = self._begin("load", [(folder,)] * len(self._ranks))

    def begin_logprobs(self, groups: Sequence[GroupRef]) -> Callable[[], LogProbs]:
        """Log-probs, one array [sum R] per group, in the order given. The function that is returned waits for them."""
        wait = self._begin_scoring("logprobs", groups)

        def collect() -> LogProbs:
            self._loaded()  # raises what loading raised
            return wait()

        return collect


class RewardModel:
    """Scores of responses. Clips come through the run's frame cache, with the frames that the model was trained on."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool) -> None:
        from rlvid.data.encoding import SampleEncoder, Source
        from rlvid.rewards.reward_model import HeadModel

        self._model = HeadModel(folder, on_gpu)
        cache = cfg.data.cache_dir.expanduser().resolve(), int(cfg.data.cache_gib * 2**30)
        self._encoder = SampleEncoder(Source(folder, self._model.rubric.video, *cache, 2**31))

    def score(self, groups: Sequence[Group]) -> list[Values]:
        """One value per response; the reason where a sample's clips cannot be read."""
        values: list[Values] = []
        for group in groups:
            prompt, outcome = self._encoder.encode(group.sample)
            if prompt is None:
                values.append([NoReward(": ".join(outcome.bad or ()))] * len(group.responses))
                continue
            (scored,) = self._model([prompt], [[r.text for r in group.responses]])
            values.append([s.scores["reward"] if s.scores else NoReward(s.reason) for s in scored])
        return values


def start_reward_model(
    folder: Path, cfg: JobConfig, slot: Slot, placement: Placement, logs: Path
) -> tuple[ActorHandle[Any], Callable[[], object]]:
    """Start the actor in the background.

    Returns:
        Its handle, and a function that waits until it is ready and raises what it raised.
    """
    actor = (
        ray.remote(RewardModel)
        .options(**placement.options(slot))
        .remote(logs / f"{slot.name}.log", cfg.placement.threads)
    )
    return actor, partial(ray.get, actor.start.remote(folder.resolve(), cfg, slot.gpus > 0))


def ask_reward_model(actor: ActorHandle[Any], timeout_s: float, groups: Sequence[Group]) -> list[Values]:
    """As `RewardModel.score`; where the call fails or takes too long, the reason for every response."""
    try:
        values: list[Values] = ray.get(actor.score.remote(groups), timeout=timeout_s)
    except RayError as e:
        return [[NoReward(f"reward model: {type(e).__name__}")] * len(group.responses) for group in groups]
    return values
