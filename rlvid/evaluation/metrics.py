"""Accuracy and rank correlation, as flat names and numbers for metrics.jsonl.

Each kind of average has a name of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

NO_TYPE = "no type"  # row of samples without a problem type


def accuracy_metrics(verdicts: Sequence[bool | None], problem_types: Sequence[str | None]) -> dict[str, float]:
    """Accuracy over all samples and by problem type, between 0 and 1, each with its `n`; nan without samples.

    `accuracy` is sample-weighted and has a 95 % interval (Wilson 1927). `accuracy_macro_types` is the mean of the
    problem types' accuracies, whatever their numbers of samples.

    Args:
        verdicts: [n] right or wrong. None where the sample could not be scored (invalid reward, bad clip): counted in
            `n_invalid` and left out of all other numbers.
        problem_types: [n] of the same samples; None goes to the type "no type".

    Raises:
        ValueError: The lengths differ.
    """
    from scipy.stats import binomtest  # takes a second

    by_type: dict[str, list[bool]] = defaultdict(list)
    for verdict, problem_type in zip(verdicts, problem_types, strict=True):
        if verdict is not None:
            by_type[problem_type or NO_TYPE].append(bool(verdict))
    by_type = dict(sorted(by_type.items()))
    scored = [verdict for own in by_type.values() for verdict in own]
    low, high = binomtest(sum(scored), len(scored)).proportion_ci(method="wilson") if scored else (0.0, 1.0)
    return {
        "accuracy": mean(scored),
        "accuracy_low95": float(low),
        "accuracy_high95": float(high),
        "accuracy_macro_types": mean(mean(own) for own in by_type.values()),
        "n": len(scored),
        "n_invalid": len(verdicts) - len(scored),
        "n_types": len(by_type),
        **{f"accuracy/{name}": mean(own) for name, own in by_type.items()},
        **{f"n/{name}": len(own) for name, own in by_type.items()},
    }


def rank_metrics(
    predicted: Sequence[Mapping[str, float]], true: Sequence[Mapping[str, float]], dims: Sequence[str]
) -> dict[str, float]:
    """Spearman correlation of predicted with human scores, of each dimension and their mean, over `n` videos.

    The scores are [n] mappings from dimension to score. A dimension without a correlation is nan and left out of the
    mean.
    """
    by_dim = {name: spearman([p[name] for p in predicted], [t[name] for t in true]) for name in dims}
    average = mean(value for value in by_dim.values() if not math.isnan(value))
    return {"spearman": average, "n": len(predicted), **{f"spearman/{name}": v for name, v in by_dim.items()}}


def spearman(predicted: Sequence[float], true: Sequence[float]) -> float:
    """Spearman's rank correlation of two columns [n], times 100 and rounded to 4 digits as in VideoScore.

    Where a column is constant the correlation is not defined: nan.
    """
    from scipy.stats import spearmanr

    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} references")
    if len(set(predicted)) < 2 or len(set(true)) < 2:
        return math.nan
    return round(float(spearmanr(predicted, true).statistic) * 100, 4)


def mean(values: Iterable[float]) -> float:
    """nan without values."""
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan
