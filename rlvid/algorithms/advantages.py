"""Group-relative advantages (GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

An invalid reward is nan here. It is left out of its group's mean and std, and its response gets advantage 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

EPS = 1e-4  # as in TRL, R1-V and Video-R1 (`rewards.std(dim=1) + 1e-4`)


def group_advantages(rewards: npt.NDArray[np.floating], normalise_std: bool) -> npt.NDArray[np.float32]:
    """Return (reward - mean) / (std + EPS) over the valid rewards of each group.

    The std is the sample standard deviation (divided by n_valid - 1). Without `normalise_std` the result is
    reward - mean (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783).

    Args:
        rewards: [n_groups, group_size] float, nan where a response has no valid reward.
        normalise_std: Divide by the group's std.

    Returns:
        [n_groups, group_size] float32. 0 for invalid responses and for every response of a group with fewer than two
        valid rewards or whose valid rewards are equal.

    Raises:
        ValueError: An infinite reward.
    """
    valid, has_signal = _valid_and_signal(rewards)
    values = np.where(valid, rewards, 0.0).astype(np.float64)
    n_valid = valid.sum(axis=1, keepdims=True)
    mean = values.sum(axis=1, keepdims=True) / np.maximum(n_valid, 1)
    centred = np.where(valid, values - mean, 0.0)
    if normalise_std:
        variance = np.square(centred).sum(axis=1, keepdims=True) / np.maximum(n_valid - 1, 1)
        centred = centred / (np.sqrt(variance) + EPS)
    # Rounding of the mean leaves 1e-17 in a group of equal rewards. Such a group must have no gradient at all.
    return np.where(has_signal[:, None], centred, 0.0).astype(np.float32)


def zero_variance_share(rewards: npt.NDArray[np.floating]) -> float:
    """Share of groups without a gradient: their valid rewards are equal, or there are fewer than two.

    Args:
        rewards: [n_groups, group_size] float, nan where a response has no valid reward.

    Returns:
        Between 0 and 1; nan when there are no groups.

    Raises:
        ValueError: An infinite reward.
    """
    _, has_signal = _valid_and_signal(rewards)
    return float(1.0 - has_signal.mean()) if has_signal.size else float("nan")


def _valid_and_signal(rewards: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Masks: which rewards are valid [n_groups, group_size]; which groups have two different rewards [n_groups]."""
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite; use nan for a reward that is invalid")
    valid = ~np.isnan(rewards)
    highest = np.where(valid, rewards, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(valid, rewards, np.inf).min(axis=1, initial=np.inf)
    return valid, highest > lowest
