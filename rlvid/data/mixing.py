"""How often samples are drawn: by the weights of the manifests they come from, and by how rare their answers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rlvid.data.order import Shares
from rlvid.types import Sample


def mixed(samples: Sequence[Sample], name: str, weight: float) -> list[Sample]:
    """The samples of one manifest of a mix: `name` is put before their ids, which are unique in their manifest only."""
    return [replace(sample, id=f"{name}/{sample.id}", weight=weight) for sample in samples]


def balanced(samples: Sequence[Sample], by: Literal["answer", "problem_type"]) -> list[Sample]:
    """The samples with other weights: equal sums for all answers (or problem types), and the same sum in all."""
    sums = Counter[str | None]()
    for sample in samples:
        sums[getattr(sample, by)] += sample.weight  # type: ignore[assignment]  # a Counter of floats
    share = sum(sums.values()) / len(sums)
    return [replace(sample, weight=sample.weight * share / sums[getattr(sample, by)]) for sample in samples]


def shares_of(samples: Sequence[Sample]) -> Shares | None:
    """None where all samples are drawn once an epoch."""
    weights = [sample.weight for sample in samples]
    return None if set(weights) <= {1.0} else Shares.of(weights)
