"""The check that opens every run: engine and trainer must see the same video in the same way.

Wrong positions, pixels normalised twice and a video that never arrives cause no error in any library involved. The
engine answers two samples of the run, one of them cut so that merged T > max(H, W). Then (1) the trainer's log-probs of
the answers equal the engine's, and (2) the log-probs of both change when the frames do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.clip_store import ClipStore
from actors.generator_fleet import GeneratorFleet
from actors.ranks import GroupRef
from actors.trainer import TrainerGroup
from rlvid.config import JobConfig, ParityConfig
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused, Sampling
from rlvid.training.batch import Group
from rlvid.training.policy_batch import sampled_group
from rlvid.types import Encoded, Sample

N_RESPONSES = 4
N_TOKENS = 16
# Arbitrary ordinary tokens. A confident model gives them little probability, whose logarithm still changes with the
# video; that of its preferred token does not.
FIRST_TOKENS = (40, 50, 60, 70)
LIMITS = {"float32": (1e-4, 1e-4), "bfloat16": (0.05, 0.2)}  # mean, and at the quantile; the reasons: ParityConfig
# A side that does not see the video computes the same numbers for other frames; this leaves room for rounding.
BLIND_BELOW = {"float32": 1e-5, "bfloat16": 1e-3}


@dataclass(frozen=True)
class Observation:
    """One prompt, answered by the engine and scored by both."""

    name: str
    engine: npt.NDArray[np.float32]  # [tokens] log-probs
    trainer: npt.NDArray[np.float32]  # [tokens]
    engine_change: float  # largest change of a first token's log-prob when the frames change
    trainer_change: float

    def gaps(self, quantile: float) -> tuple[float, float]:
        """Mean absolute difference, and that at the quantile."""
        difference = np.abs(self.engine - self.trainer)
        if not np.isfinite(difference).all():
            return math.nan, math.nan
        return float(difference.mean()), float(np.quantile(difference, quantile))


def verdict(observations: Sequence[Observation], dtype: str, temperature: float, cfg: ParityConfig) -> list[str]:
    """What is wrong, one line each, with its reason where one is known; empty if both agree and see the video."""
    problems = []
    limits = cfg.mean or LIMITS[dtype][0], cfg.at_quantile or LIMITS[dtype][1]
    for o in observations:
        for side, change in (("engine", o.engine_change), ("trainer", o.trainer_change)):
            if change < BLIND_BELOW[dtype]:
                problems.append(f"{o.name}: the {side} does not see the video: other frames, same log-probs")
        gaps = o.gaps(cfg.quantile)
        if not _are_within(gaps, limits):
            where = int(np.argmax(np.abs(o.engine - o.trainer)))
            problems.append(
                f"{o.name}: log-probs of engine and trainer differ by {gaps[0]:.2g} on average (parity.mean: at most "
                f"{limits[0]:g}) and by {gaps[1]:.2g} at the {cfg.quantile:g} quantile (parity.at_quantile: at most "
                f"{limits[1]:g}), most at response token {where}: {o.engine[where]:.5f} and {o.trainer[where]:.5f}"
                f"{_reason(o, gaps, limits, temperature)}"
            )
    return problems


def _are_within(gaps: tuple[float, float], limits: tuple[float, float]) -> bool:
    return all(gap <= limit for gap, limit in zip(gaps, limits, strict=True))  # not so for nan


def _reason(o: Observation, gaps: tuple[float, float], limits: tuple[float, float], temperature: float) -> str:
    for side, logprobs in (("engine", o.engine), ("trainer", o.trainer)):
        if not np.isfinite(logprobs).all():
            return f"; those of the {side} are not finite: look for NaN in the checkpoint's weights"
    if _are_within((gaps[0] * temperature, gaps[1] * temperature), limits):
        return (
            f"; they agree without rollout.temperature={temperature:g}, which log-probs are divided by and which "
            f"multiplies their rounding: raise the temperature"
        )
    return ""


@dataclass(frozen=True)
class Parity:
    """What a check found that engine and trainer passed."""

    gap: float  # mean difference of log-probs, the larger one of the samples
    saw_video: bool

    def __str__(self) -> str:
        also = " and see the video" if self.saw_video else ""
        return f"parity: log-probs of engine and trainer differ by {self.gap:.1e} on average{also}"


@dataclass(frozen=True)
class _Probe:
    plain: Encoded
    altered: Encoded | None  # None: a sample without video
    name: str


def check_parity(
    fleet: GeneratorFleet, trainer: TrainerGroup, clips: ClipStore, samples: Sequence[Sample], cfg: JobConfig
) -> Parity:
    """Run the check on the first two samples with readable video; where no sample has any, compare log-probs alone.

    Raises:
        UserError: the check fails; the message says which side differs and how.
    """
    probes = _probes(clips, samples)
    if not probes:
        raise UserError("the parity check needs a sample whose clips can be read; data.train has none")
    temperature = cfg.rollout.temperature
    answers = []
    asked = fleet.generate([p.plain for p in probes], Sampling(N_RESPONSES, temperature, N_TOKENS))
    for probe, found in zip(probes, asked, strict=True):
        if isinstance(found, Refused):
            raise UserError(f"the parity check failed: the engine refuses the prompt of {probe.name}: {found.reason}")
        answers.append(found)
    groups = [sampled_group(p.plain, r, temperature) for p, r in zip(probes, answers, strict=True)]
    by_engine = [np.concatenate([r.logprobs for r in rollouts]) for rollouts in answers]
    by_trainer = trainer.logprobs(groups)
    pairs = [e for p in probes if p.altered is not None for e in (p.plain, p.altered)]
    trainer_changes = engine_changes = [math.inf] * len(probes)  # no video that a side could be blind to
    if pairs:
        trainer_changes = _changes(trainer.logprobs([_first_tokens(e, temperature) for e in pairs]))
        engine_changes = _changes(fleet.first_logprobs(pairs, FIRST_TOKENS, temperature))
    names = [p.name for p in probes]
    found_by_both = zip(names, by_engine, by_trainer, engine_changes, trainer_changes, strict=True)
    observations = [Observation(*row) for row in found_by_both]
    problems = verdict(observations, cfg.model.dtype, temperature, cfg.parity)
    if problems:
        raise UserError("the parity check failed, the run does not start:\n  " + "\n  ".join(problems))
    return Parity(max(o.gaps(cfg.parity.quantile)[0] for o in observations), bool(pairs))


def _first_tokens(prompt: Encoded, temperature: float) -> GroupRef:
    """Each of `FIRST_TOKENS` as a response of its own."""
    ids = tuple(np.array([token], dtype=np.int32) for token in FIRST_TOKENS)
    return Group(prompt.prompt, prompt.cost, ids, temperature=temperature)


def _changes(logprobs: Sequence[npt.NDArray[np.float32]]) -> list[float]:
    """Largest difference between the members of each pair (plain, altered)."""
    return [float(np.abs(a - b).max()) for a, b in zip(logprobs[::2], logprobs[1::2], strict=True)]


def _probes(clips: ClipStore, samples: Sequence[Sample]) -> list[_Probe]:
    """The first two samples whose clips can be read: one as it is, one cut tall. Without any video: the first two."""
    if not any(s.media for s in samples):
        return [_Probe(e, None, e.sample.id) for e in clips.encode(samples[:2])]
    probes: list[_Probe] = []
    for sample in (s for s in samples if s.media):
        variants = ("as_is", "altered") if not probes else ("tall", "tall_altered")
        encoded = [e for variant in variants for e in clips.encode([sample], variant)]  # type: ignore[arg-type]
        if len(encoded) == 2:
            probes.append(_Probe(encoded[0], encoded[1], f"{sample.id} ({variants[0].replace('_', ' ')})"))
        if len(probes) == 2:
            break
    return probes
