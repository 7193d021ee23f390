"""The held-out manifest, by the rules of `rewards`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlvid.errors import UserError
from rlvid.evaluation.metrics import accuracy_metrics, mean
from rlvid.evaluation.predictions import Confusion, Prediction
from rlvid.rewards.part import Group, NoReward, Part, Response, combine, score_rules
from rlvid.types import Sample


@dataclass(frozen=True)
class Scored:
    """Whether an answer is right (None without a verdict), and the values of the rules that do not measure that."""

    is_right: bool | None
    rules: Mapping[str, float]


@dataclass(frozen=True)
class HeldOut:
    """Share of right answers (sample-weighted, with n), overall and by problem type, and the mean of every other rule.

    Args:
        parts: rules only; a sample without a valid reward has no verdict and counts as invalid.
        opening: the text with which prompts begin the response (`ChatFamily.opening`).
    """

    samples: Sequence[Sample]
    parts: Sequence[Part]
    opening: str = ""
    headline = ("accuracy", "n")

    def prompt(self, sample: Sample) -> Sample:
        return sample

    def parse(self, sample: Sample, prediction: Prediction) -> Scored:
        group = Group(sample, (Response(prediction.text, prediction.n_tokens),), self.opening)
        covering = [part for part in self.parts if part.covers(sample)]
        measuring = [part for part in covering if part.measures_accuracy]
        values = {name: own[0] for name, own in score_rules(covering, group).items()}
        right = combine(measuring, group, {part.name: [values[part.name]] for part in measuring})[0].is_right
        others = {part.name: values[part.name] for part in covering if not part.measures_accuracy}
        return Scored(right, {name: value for name, value in others.items() if not isinstance(value, NoReward)})

    def value(self, sample: Sample, parsed: Scored | None) -> float | None:
        return None if parsed is None or parsed.is_right is None else float(parsed.is_right)

    def score(self, parsed: Mapping[str, Scored]) -> dict[str, float]:
        """
        Raises:
            UserError: no sample has a verdict.
        """
        verdicts = [parsed[sample.id].is_right if sample.id in parsed else None for sample in self.samples]
        if all(verdict is None for verdict in verdicts):
            raise UserError(
                f"none of the {len(verdicts)} held-out samples could be scored; see bad_clips.jsonl and rewards"
            )
        of_rules = defaultdict(list)
        for scored in parsed.values():
            for name, value in scored.rules.items():
                of_rules[f"rule/{name}"].append(value)
        metrics = accuracy_metrics(verdicts, [sample.problem_type for sample in self.samples])
        return metrics | {name: mean(values) for name, values in of_rules.items()}

    def confusions(self, parsed: Mapping[str, Scored]) -> list[Confusion]:
        return []
