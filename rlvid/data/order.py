"""The order in which samples are drawn, as a function of seed and position.

There is no sampler state to save: a checkpoint's data cursor is one number, and a resumed run draws the samples that
the interrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)  # hashed by identity, since it is part of a cache's key
class Strata:
    """Which samples are alike; an order spreads those of one stratum evenly over an epoch."""

    codes: npt.NDArray[np.int64]  # [n], number of each sample's stratum

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> Self:
        """From a label per sample; samples with equal labels are one stratum."""
        code_of = {label: code for code, label in enumerate(dict.fromkeys(labels))}
        return cls(np.array([code_of[label] for label in labels], dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Shares:
    """How often each sample is drawn in an epoch, on average: one with a share of 2.5 is drawn two or three times."""

    ends: npt.NDArray[np.float64]  # [n], running sum of the shares; the last one is whole: the epoch's length

    @classmethod
    def of(cls, weights: Sequence[float]) -> Self:
        """Shares in the ratio of positive weights, whose sum is that of the weights, rounded."""
        ends = np.cumsum(np.asarray(weights, dtype=np.float64))
        length = max(1.0, np.round(ends[-1]))
        ends *= length / ends[-1]
        ends[-1] = length
        return cls(ends)

    def drawn(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The samples of an epoch: those at equal steps along the running sum of the shares. Samples are in a random
        order there, so that a pattern of the manifest (each second row is of one kind) does not come back."""
        numbers = np.random.PCG64([seed, epoch, 2]).random_raw(len(self.ends) + 1)
        order = np.argsort(numbers[1:], kind="stable")
        ends = np.cumsum(np.diff(self.ends, prepend=0.0)[order])
        steps = np.arange(self.ends[-1]) + numbers[0] / 2**64
        return order[np.minimum(np.searchsorted(ends, steps, side="right"), len(order) - 1)]  # the sum is rounded


def batch_indices(
    n: int,
    seed: int,
    start: int,
    count: int,
    strata: Strata | None = None,
    together: Strata | None = None,
    shares: Shares | None = None,
) -> list[int]:
    """Positions start .. start + count of the endless stream of epochs, each epoch a permutation of range(n).

    Args:
        n: Samples in an epoch.
        seed: Of the run.
        start: The data cursor: samples drawn so far.
        count: Samples to draw. A batch may reach over the end of an epoch.
        strata: Each batch has its share of each stratum, give or take a sample. None: that is left to chance.
        together: Instead, the samples of a stratum follow each other, and the strata are shuffled.
        shares: How often each sample comes in an epoch, which then has as many as their sum. None: once.

    Returns:
        `count` indices below n.

    Raises:
        ValueError: n below 1, or a negative number.
    """
    if n < 1 or min(seed, start, count) < 0:
        raise ValueError(f"expected n >= 1 and nothing negative: n={n} seed={seed} start={start} count={count}")
    indices: list[int] = []
    length = n if shares is None else int(shares.ends[-1])
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), length)
        order = _permutation(n, seed, epoch, strata, together, shares)
        indices.extend(order[offset : offset + count - len(indices)].tolist())
    return indices


@lru_cache(maxsize=4)  # drawn from batch by batch: that of a million samples takes 0.2 s
def _permutation(
    n: int, seed: int, epoch: int, strata: Strata | None, together: Strata | None, shares: Shares | None
) -> npt.NDArray[np.int64]:
    """The order of one epoch."""
    # Not Generator.permutation: numpy may change the streams of Generator's methods, but not that of a bit generator
    # (NEP 19), and a run may be resumed under another numpy.
    drawn = np.arange(n) if shares is None else shares.drawn(seed, epoch)
    keys = np.random.PCG64([seed, epoch]).random_raw(max(n, len(drawn)))
    if together is not None:
        return drawn[np.argsort(keys[together.codes[drawn]], kind="stable")]
    order = drawn[np.argsort(keys[: len(drawn)], kind="stable")]
    return order if strata is None else order[_spread(strata.codes[order], seed, epoch)]


def _spread(codes: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """[n], positions in `codes` such that equal codes are evenly apart: the k-th of m is at (k + shift) / m of the
    epoch, with a random shift in [0, 1) for each code."""
    sizes = np.bincount(codes)
    k = np.empty(len(codes))
    k[np.argsort(codes, kind="stable")] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shift = np.random.PCG64([seed, epoch, 1]).random_raw(len(sizes)) / 2**64
    return np.argsort((k + shift[codes]) / sizes[codes], kind="stable")
