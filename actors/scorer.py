"""A trained reward model in an actor of its own: what it gives for a policy's answers (`rewards: [{kind: model}]`).

Bradley-Terry models only. VideoScore's kinds judge generated videos against their prompts, and a policy that answers in
text makes no video.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.actor_process import enter_process
from actors.placement import Placement, Slot
from rlvid.config import JobConfig, RewardPartConfig
from rlvid.errors import UserError
from rlvid.rewards.videoscore import RUBRIC_FOLDER, Rubric
from rlvid.types import Sample

TIMEOUT_S = 600.0  # of one batch

Answers = Sequence[tuple[Sample, Sequence[str]]]


class Scorer:
    """Scores of answers. Clips come through the run's frame cache, with the frames that the model was trained on."""

    def __init__(self, log_file: Path, threads: int | None):
        enter_process(log_file, threads)

    def start(self, folder: Path, cfg: JobConfig, on_gpu: bool) -> None:
        from rlvid.data.encoding import SampleEncoder, Source
        from rlvid.rewards.reward_model import HeadModel, video_config

        self._model = HeadModel(folder, on_gpu)
        cache = cfg.data.cache_dir.expanduser().resolve(), int(cfg.data.cache_gib * 2**30)
        self._encoder = SampleEncoder(Source(folder, video_config(self._model.rubric), *cache, 2**31))

    def score(self, batch: Answers) -> list[list[float] | str]:
        """One score per answer; of a sample whose clips cannot be read, the reason."""
        values: list[list[float] | str] = []
        for sample, answers in batch:
            prompt, outcome = self._encoder.encode(sample)
            if prompt is None:
                values.append(": ".join(outcome.bad or ()))
                continue
            (scored,) = self._model([prompt], [answers])
            values.append([s.scores["reward"] for s in scored if s.scores])
        return values


def check_model_part(part: RewardPartConfig, where: str) -> None:
    """
    Raises:
        UserError: no reward model of answers lies there.
    """
    if part.path is None:
        raise UserError(f"{where}: model needs path, the folder `policy` of a run of rlvid reward-model")
    kind = Rubric.load(part.path / RUBRIC_FOLDER).kind
    if kind != "bradley_terry":
        raise UserError(
            f"{where}: {part.path} is a {kind} model, which scores videos and not answers; give one of kind "
            f"bradley_terry"
        )


class ScorerHandle:
    """The driver's handle on one scorer. It starts in the background."""

    def __init__(self, folder: Path, cfg: JobConfig, slot: Slot, placement: Placement, logs: Path):
        self._actor: ActorHandle[Scorer] = (
            ray.remote(Scorer)
            .options(**placement.options(slot))
            .remote(logs / f"{slot.name}.log", cfg.placement.threads)
        )
        self._started = self._actor.start.remote(folder.resolve(), cfg, slot.gpus > 0)

    def wait_ready(self) -> None:
        try:
            ray.get(self._started)
        except ray.exceptions.RayTaskError as e:
            raise e.as_instanceof_cause() from e

    def __call__(self, batch: Answers) -> list[list[float] | str]:
        """As `Scorer.score`; where the call fails, its reason for every sample."""
        try:
            values: list[list[float] | str] = ray.get(self._actor.score.remote(batch), timeout=TIMEOUT_S)
        except RayError as e:
            return [f"scorer: {type(e).__name__}"] * len(batch)
        return values

    def stop(self) -> None:
        ray.kill(self._actor)
