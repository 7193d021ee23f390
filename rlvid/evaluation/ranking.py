"""Rank correlation of predicted with human scores, per dimension, times 100 and rounded to 4 digits as in VideoScore.

Where either side is constant the correlation is not defined: it is None, and is left out of the average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from rlvid.errors import UserError


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two columns [n], times 100, rounded to 4 digits; None if one is constant."""
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} references")
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return None
    return round(float(spearmanr(predicted, true).statistic) * 100, 4)


@dataclass(frozen=True)
class Correlation:
    """Spearman correlation x 100 of each dimension, over `n` videos."""

    by_dim: Mapping[str, float | None]
    n: int

    @property
    def average(self) -> float:
        """Mean over the dimensions that have a correlation; nan if none has."""
        values = [value for value in self.by_dim.values() if value is not None]
        return sum(values) / len(values) if values else float("nan")

    def as_metrics(self) -> dict[str, float]:
        """Flat names and numbers for metrics.jsonl; a dimension without a correlation is nan."""
        each = {f"spearman/{name}": float("nan") if v is None else v for name, v in self.by_dim.items()}
        return {"spearman": self.average, "n": float(self.n), **each}


def correlate(
    predicted: Sequence[Mapping[str, float]], true: Sequence[Mapping[str, float]], dims: Sequence[str]
) -> Correlation:
    """Correlation of each dimension; scores are [n] mappings from dimension to score."""
    by_dim = {name: spearman([p[name] for p in predicted], [t[name] for t in true]) for name in dims}
    return Correlation(by_dim, len(predicted))


def read_results(path: Path, dims: Sequence[str]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Read answers and references from a result file of VideoScore's own benchmark.

    Its rows are `{"id", "ref": "[2, 3]", "ans": "[1.9, 3]"}`: lists as strings, in the order of `dims`. The strings are
    parsed as JSON, never evaluated as Python.

    Raises:
        UserError: a row has another form.
    """
    answers, references = [], []
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        try:
            pair = [dict(zip(dims, map(float, json.loads(row[key])), strict=True)) for key in ("ans", "ref")]
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{path}: row {number}: expected ans and ref, lists of {len(dims)} numbers: {e}") from e
        answers.append(pair[0])
        references.append(pair[1])
    return answers, references
