"""The order in which samples are drawn, as a function of seed and position.

There is no sampler state to save: a checkpoint's data cursor is one number, and a resumed run draws the samples that
the interrupted one would have drawn.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt


def batch_indices(n: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start .. start + count of the endless stream of epochs, each epoch a permutation of range(n).

    Args:
        n: Samples in an epoch.
        seed: Of the run.
        start: The data cursor: samples drawn so far.
        count: Samples to draw. A batch may reach over the end of an epoch.

    Returns:
        `count` indices below n.

    Raises:
        ValueError: n below 1, or a negative number.
    """
    if n < 1 or min(seed, start, count) < 0:
        raise ValueError(f"expected n >= 1 and nothing negative: n={n} seed={seed} start={start} count={count}")
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), n)
        indices.extend(_permutation(n, seed, epoch)[offset : offset + count - len(indices)].tolist())
    return indices


@lru_cache(maxsize=4)  # drawn from batch by batch: that of a million samples takes 0.2 s
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """[n], the order of one epoch."""
    # Not Generator.permutation: numpy keeps the stream of a bit generator for ever, that of Generator's methods not
    # (NEP 19), and a run may be resumed under another numpy.
    keys = np.random.PCG64([seed, epoch]).random_raw(n)
    return np.argsort(keys, kind="stable")
