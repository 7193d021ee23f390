"""Rank correlation of predicted scores with human ones, as VideoScore reports it: x100, four digits, per dimension.

A dimension in which either side is constant has no correlation: None, never 0, and no part of the average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr

from rlvid.errors import UserError


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two columns [n], x100 rounded to 4; None where one is constant."""
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} references")
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return None
    return round(float(spearmanr(predicted, true).statistic) * 100, 4)


@dataclass(frozen=True)
class Correlation:
    """Spearman x100 of each dimension over `n` videos."""

    by_dim: Mapping[str, float | None]
    n: int

    @property
    def average(self) -> float:
        """Mean over the dimensions that have one; nan without any."""
        values = [value for value in self.by_dim.values() if value is not None]
        return sum(values) / len(values) if values else float("nan")

    def as_metrics(self) -> dict[str, float]:
        """Flat names for metrics.jsonl; a dimension without correlation is nan there."""
        each = {f"spearman/{name}": float("nan") if v is None else v for name, v in self.by_dim.items()}
        return {"spearman": self.average, "n": float(self.n), **each}


def correlate(
    predicted: Sequence[Mapping[str, float]], true: Sequence[Mapping[str, float]], dims: Sequence[str]
) -> Correlation:
    """Correlation per dimension of scores [n] by name."""
    by_dim = {name: spearman([p[name] for p in predicted], [t[name] for t in true]) for name in dims}
    return Correlation(by_dim, len(predicted))


def read_results(path: Path, dims: Sequence[str]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Answers and references of a result file of upstream's benchmark.

    Its rows are `{"id", "ref": "[2, 3]", "ans": "[1.9, 3]"}`: lists as texts, in the order of `dims`. The texts are
    parsed as JSON, never evaluated.

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
