"""Accuracy on the held-out manifest, by the reward parts that measure accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlvid.errors import UserError
from rlvid.evaluation.metrics import accuracy_metrics
from rlvid.evaluation.predictions import Prediction
from rlvid.rewards.part import Group, Part, Response, combine, score_rules
from rlvid.types import Sample


@dataclass(frozen=True)
class HeldOut:
    """Share of right answers (sample-weighted, with n), overall and by problem type.

    Args:
        parts: rules only; a sample without a valid reward has no verdict and counts as invalid.
        opening: the text with which prompts begin the response (`ChatFamily.opening`).
    """

    samples: Sequence[Sample]
    parts: Sequence[Part]
    opening: str = ""

    def prompt(self, sample: Sample) -> Sample:
        return sample

    def parse(self, sample: Sample, prediction: Prediction) -> bool | None:
        parts = [part for part in self.parts if part.covers(sample)]
        group = Group(sample, (Response(prediction.text, prediction.n_tokens),), self.opening)
        return combine(parts, group, score_rules(parts, group))[0].is_right

    def score(self, parsed: Mapping[str, bool | None]) -> dict[str, float]:
        """
        Raises:
            UserError: no sample has a verdict.
        """
        verdicts = [parsed.get(sample.id) for sample in self.samples]
        if all(verdict is None for verdict in verdicts):
            raise UserError(
                f"none of the {len(verdicts)} held-out samples could be scored; see bad_clips.jsonl and rewards"
            )
        return accuracy_metrics(verdicts, [sample.problem_type for sample in self.samples])
