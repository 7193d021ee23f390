"""Models whose weights do not change: the reference, in ranks of its own, and reward models, each in an actor.

The reference is the policy at one moment: it is loaded from a checkpoint folder, so its weights do not travel through
the object store. A reward model (`rewards: [{kind: model}]`) is of kind Bradley-Terry:
VideoScore's kinds judge generated videos against their prompts, and a policy that answers in text makes no video.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError

from actors.actor_process import enter_process
from actors.placement import Placement, Slot
from actors.ranks import GroupRef, LogProbs, Rank, RankGroup, RanksLost, fetch
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rewards.part import Group, NoReward, Values

TRIES = 2


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

    def __init__(self, folder: Path, placement: Placement):
        super().__init__("reference", ReferenceRank, folder, placement)
        self._restarts, self._max_restarts = 0, placement.cfg.train.max_failures
        self._reference: Path | None = None
        self._lock = threading.RLock()  # of the processes: two threads may find them lost

    def wait_ready(self) -> None:
        restarts = self._restarts
        try:
            super().wait_ready()
        except RanksLost as e:
            self._replace(restarts, e)
            self.wait_ready()

    def load(self, folder: Path) -> None:
        """Load a checkpoint folder, in the background: what is asked next waits for it."""
        with self._lock:
            self._reference = folder
            self._loaded = self._begin("load", [(folder,)] * len(self._ranks))

    def begin_reference_logprobs(self, groups: Sequence[GroupRef]) -> Callable[[], LogProbs]:
        """Log-probs, one array [sum R] per group, in the order given. The function that is returned waits for them;
        where a rank was lost it starts all of them again, with the same model."""
        with self._lock:
            restarts, loaded, wait = self._restarts, self._loaded, self._begin_scoring("logprobs", groups)

        def collect() -> LogProbs:
            try:
                loaded()  # raises what loading raised
                return wait()
            except RanksLost as e:
                self._replace(restarts, e)
                return self.begin_reference_logprobs(groups)()

        return collect

    def _replace(self, restarts: int, lost: RanksLost) -> None:
        """Start all ranks again, unless that was done since `restarts` was read.

        Raises:
            UserError: too often.
        """
        with self._lock:
            if restarts != self._restarts:
                return
            self._restarts += 1
            if self._restarts > self._max_restarts:
                most = f"train.max_failures={self._max_restarts}"
                raise UserError(f"{lost}, too often ({most}); see {self._log}") from lost
            self._placement.on_event(f"{lost}; all of them start again ({self._restarts} of {self._max_restarts})")
            self.restart()
            if self._reference is not None:
                self.load(self._reference)


class RewardModel:
    """Scores of responses. Clips come through the run's frame cache, with the frames that the model was trained on."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig) -> None:
        from rlvid.data.encoding import SampleEncoder, Source
        from rlvid.rewards.reward_model import HeadModel

        self._model = HeadModel(folder, on_gpu=cfg.placement.gpus > 0)
        source = replace(Source.of(cfg, folder), video=self._model.rubric.video, max_prompt_tokens=2**31)
        self._encoder = SampleEncoder(source)

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


class RewardModelProcess:
    """The actor of a reward model. One that dies, or does not answer in time, is replaced: a late call blocks no other.

    It starts in the background.
    """

    def __init__(self, folder: Path, slot: Slot, placement: Placement):
        self._folder, self._slot, self._placement = folder.resolve(), slot, placement
        self._start()

    def _start(self) -> None:
        self._actor = self._placement.start(RewardModel, self._slot)
        self._started = self._actor.start.remote(self._folder, self._placement.cfg)

    def wait_ready(self) -> None:
        """Wait until the model is loaded; raises what loading raised."""
        ray.get(self._started)

    def score(self, groups: Sequence[Group]) -> list[Values]:
        """As `RewardModel.score`; where the call fails or takes too long twice, the reason for every response."""
        reason, timeout_s = "", self._placement.cfg.deadlines.model_s
        for _ in range(TRIES):
            try:
                values: list[Values] = ray.get(self._actor.score.remote(groups), timeout=timeout_s)
                return values
            except RayTaskError as e:
                reason = f"{self._slot.name}: {e.cause}"  # it runs, and would say the same again
                break
            except RayError as e:
                reason = f"{self._slot.name}: {type(e).__name__}"
                log = self._placement.logs / f"{self._slot.name}.log"
                self._placement.on_event(f"{reason}; it starts again, its log: {log}")
                self.stop()
                self._start()
        return [[NoReward(reason)] * len(group.responses) for group in groups]

    def stop(self) -> None:
        ray.kill(self._actor)
