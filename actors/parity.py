"""The check that opens every run: engine and trainer must see the same video in the same way.

Wrong positions, pixels normalised twice and a video that never arrives are silent in every library involved. Two
samples of the run are answered by the engine, one of them cut so that merged T > max(H, W); then (1) the trainer's
log-probs of the answers equal the engine's, and (2) both change when the frames do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.clips import ClipStore, Encoded
from actors.pool import GeneratorFleet
from actors.trainer import GroupRef, TrainerGroup
from rlvid.config import JobConfig
from rlvid.errors import UserError
from rlvid.rollout.vllm_engine import Sampling
from rlvid.training.packing import Responses
from rlvid.training.parity import TOLERANCE, Observation, verdict
from rlvid.types import Rollout, Sample

N_RESPONSES = 2
N_TOKENS = 8


@dataclass(frozen=True)
class _Probe:
    plain: Encoded
    altered: Encoded
    name: str


def check_parity(
    fleet: GeneratorFleet, trainer: TrainerGroup, clips: ClipStore, samples: Sequence[Sample], cfg: JobConfig
) -> float:
    """Run the check on the first two samples with readable video.

    Returns:
        The largest difference of log-probs seen.

    Raises:
        UserError: the check fails; the message says which side differs and how.
    """
    probes = _probes(clips, samples)
    if not probes:
        raise UserError(
            "the parity check needs a sample whose clips can be read; the first ones of data.train have none"
        )
    sampling = Sampling(N_RESPONSES, cfg.rollout.temperature, min(N_TOKENS, cfg.rollout.max_tokens))
    answers = fleet.generate([p.plain for p in probes], sampling)
    plain = trainer.logprobs([group_of(p.plain, r) for p, r in zip(probes, answers, strict=True)])
    altered = trainer.logprobs([group_of(p.altered, r) for p, r in zip(probes, answers, strict=True)])
    observations = []
    for p, rollouts, by_trainer, by_trainer_altered in zip(probes, answers, plain, altered, strict=True):
        first = int(rollouts[0].token_ids[0])
        seen_as_is, seen_altered = (
            fleet.first_logprob(e, first, cfg.rollout.temperature) for e in (p.plain, p.altered)
        )
        observations.append(
            Observation(
                name=p.name,
                engine=np.concatenate([r.logprobs for r in rollouts]),
                trainer=by_trainer,
                engine_change=abs(seen_altered - seen_as_is),
                trainer_change=float(np.abs(by_trainer_altered - by_trainer).max()),
            )
        )
    problems = verdict(observations, TOLERANCE[cfg.model.dtype])
    if problems:
        raise UserError("the parity check failed, the run does not start:\n  " + "\n  ".join(problems))
    return max(o.gap for o in observations)


def group_of(prompt: Encoded, rollouts: Sequence[Rollout]) -> GroupRef:
    """Rollouts to be scored, nothing to be learned."""
    n = sum(len(r.token_ids) for r in rollouts)
    weights = np.zeros(n, dtype=np.float32)
    return GroupRef(
        prompt.prompt, prompt.cost, Responses(token_ids=tuple(r.token_ids for r in rollouts), weights=weights)
    )


def _probes(clips: ClipStore, samples: Sequence[Sample]) -> list[_Probe]:
    """The first two samples whose clips can be read: one as it is, one cut tall."""
    probes: list[_Probe] = []
    for sample in (s for s in samples if s.videos):
        variants = ("as_is", "altered") if not probes else ("tall", "tall_altered")
        encoded = [e for variant in variants for e in clips.encode([sample], variant)]  # type: ignore[arg-type]
        if len(encoded) == 2:
            probes.append(_Probe(encoded[0], encoded[1], f"{sample.id} ({variants[0].replace('_', ' ')})"))
        if len(probes) == 2:
            break
    return probes
