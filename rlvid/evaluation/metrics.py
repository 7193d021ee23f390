"""Accuracy with its number of samples, where each kind of average has a name of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NO_TYPE = "no type"  # row of samples without a problem type
Z_95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` samples, each counted once."""

    n: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.n:
            raise ValueError(f"correct must be between 0 and n={self.n}, got {self.correct}")

    @property
    def value(self) -> float:
        """Between 0 and 1, nan without samples."""
        return self.correct / self.n if self.n else float("nan")

    def interval(self, z: float = Z_95) -> tuple[float, float]:
        """Wilson score interval, 95 % by default; (0, 1) without samples (Wilson 1927; Brown, Cai, DasGupta 2001)."""
        if not self.n:
            return 0.0, 1.0
        scale = 1.0 + z * z / self.n
        centre = (self.value + z * z / (2 * self.n)) / scale
        half = z / scale * math.sqrt(self.value * (1.0 - self.value) / self.n + z * z / (4 * self.n * self.n))
        # At 0 and n correct the bound is exact; rounding would leave -1e-17.
        low = 0.0 if self.correct == 0 else centre - half
        high = 1.0 if self.correct == self.n else centre + half
        return low, high


@dataclass(frozen=True)
class AccuracyReport:
    """Accuracy of one evaluation, over all samples and per problem type."""

    sample_weighted: Accuracy  # all samples have equal weight
    by_type: Mapping[str, Accuracy]  # in alphabetical order
    n_invalid: int  # samples without a verdict (invalid reward, bad clip), left out of all other numbers

    @property
    def macro(self) -> float:
        """Mean of the problem types' accuracies, whatever their numbers of samples."""
        values = [accuracy.value for accuracy in self.by_type.values()]
        return sum(values) / len(values) if values else float("nan")

    def as_metrics(self) -> dict[str, float]:
        """Flat names and numbers for metrics.jsonl. `accuracy` is sample-weighted; every other average says in its
        name what it is."""
        low, high = self.sample_weighted.interval()
        metrics: dict[str, float] = {
            "accuracy": self.sample_weighted.value,
            "accuracy_low95": low,
            "accuracy_high95": high,
            "accuracy_macro_types": self.macro,
            "n": self.sample_weighted.n,
            "n_invalid": self.n_invalid,
            "n_types": len(self.by_type),
        }
        for name, accuracy in self.by_type.items():
            metrics[f"accuracy/{name}"] = accuracy.value
            metrics[f"n/{name}"] = accuracy.n
        return metrics


def accuracy_report(verdicts: Sequence[bool | None], problem_types: Sequence[str | None]) -> AccuracyReport:
    """Count verdicts, overall and per problem type.

    Args:
        verdicts: [n] right or wrong, None where the sample could not be scored.
        problem_types: [n] of the same samples; None goes to the row "no type".

    Raises:
        ValueError: The lengths differ.
    """
    scored = [
        (verdict, problem_type or NO_TYPE)
        for verdict, problem_type in zip(verdicts, problem_types, strict=True)
        if verdict is not None
    ]

    def count(rows: Sequence[bool]) -> Accuracy:
        return Accuracy(n=len(rows), correct=sum(rows))

    return AccuracyReport(
        sample_weighted=count([bool(verdict) for verdict, _ in scored]),
        by_type={
            name: count([bool(verdict) for verdict, problem_type in scored if problem_type == name])
            for name in sorted({problem_type for _, problem_type in scored})
        },
        n_invalid=len(verdicts) - len(scored),
    )
