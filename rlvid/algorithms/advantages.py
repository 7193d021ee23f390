"""Advantages: what a response, or a token, was worth beyond what was expected of it.

An invalid reward is nan here. It is left out of every mean and standard deviation, and its response gets advantage 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EPS = 1e-4  # as in TRL, R1-V and Video-R1 (`rewards.std(dim=1) + 1e-4`)
WHITEN_EPS = 1e-8

Floats = npt.NDArray[np.floating]


def group_advantages(rewards: Floats, normalise_std: bool) -> npt.NDArray[np.float32]:
    """Return (reward - mean) / (std + EPS) over the valid rewards of each group.

    GRPO: Shao et al. 2024, arXiv 2402.03300, section 4.1.2. The std is the sample standard deviation (divided by
    n_valid - 1). Without `normalise_std` the result is reward - mean (Dr. GRPO: Liu et al. 2025, arXiv 2503.20783).

    Args:
        rewards: [n_groups, group_size] float, nan where a response has no valid reward.
        normalise_std: Divide by the group's std.

    Returns:
        [n_groups, group_size] float32. 0 for invalid responses and for every response of a group with fewer than two
        valid rewards or whose valid rewards are equal.

    Raises:
        ValueError: An infinite reward.
    """
    valid, differ = _valid_and_signal(rewards)
    values = np.where(valid, rewards, 0.0).astype(np.float64)
    n_valid = valid.sum(axis=1, keepdims=True)
    mean = values.sum(axis=1, keepdims=True) / np.maximum(n_valid, 1)
    centred = np.where(valid, values - mean, 0.0)
    if normalise_std:
        variance = np.square(centred).sum(axis=1, keepdims=True) / np.maximum(n_valid - 1, 1)
        centred = centred / (np.sqrt(variance) + EPS)
    # Rounding of the mean leaves 1e-17 in a group of equal rewards. Such a group must have no gradient at all.
    return np.where(differ[:, None], centred, 0.0).astype(np.float32)


def leave_one_out(rewards: Floats, normalise_std: bool = False) -> npt.NDArray[np.float32]:
    """Return reward - mean of the other valid rewards of its group (RLOO: Ahmadian et al. 2024, arXiv 2402.14740).

    That is n / (n - 1) times reward - mean of all n. Arguments and errors as in `group_advantages`.
    """
    n_valid = (~np.isnan(rewards)).sum(axis=1, keepdims=True)
    factor = n_valid / np.maximum(n_valid - 1, 1)
    return (group_advantages(rewards, normalise_std) * factor).astype(np.float32)


def relative_to(rewards: Floats, baselines: Floats) -> npt.NDArray[np.float32]:
    """Return reward - baseline of its group, that of the greedy response (ReMax: Li et al. 2023, arXiv 2310.10505).

    Args:
        rewards: [n_groups, group_size], nan where invalid.
        baselines: [n_groups]; nan leaves the group out.
    """
    return np.nan_to_num(rewards - baselines[:, None], nan=0.0).astype(np.float32)


def whitened(values: Sequence[npt.NDArray[np.float32]], shift: bool = True) -> list[npt.NDArray[np.float32]]:
    """Values of all tokens with standard deviation 1 over the batch, and mean 0 unless `shift` is off.

    The global normalisation of REINFORCE++ (Hu et al. 2025, arXiv 2501.03262) and of PPO. nan stays nan.

    Args:
        values: arrays of any lengths, for example one per group.
    """
    flat = np.concatenate([np.zeros(0), *values]).astype(np.float64)
    valid = flat[~np.isnan(flat)]
    if not len(valid):
        return [own.copy() for own in values]
    mean = valid.mean() if shift else 0.0
    return [((own - mean) / (valid.std() + WHITEN_EPS)).astype(np.float32) for own in values]


def returns_to_go(rewards: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sum of this and all later rewards [R] of a response."""
    return np.flip(np.cumsum(np.flip(rewards.astype(np.float64)))).astype(np.float32)


def gae(
    rewards: npt.NDArray[np.float32], values: npt.NDArray[np.float32], gamma: float, lam: float
) -> npt.NDArray[np.float32]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16) of one response.

    Args:
        rewards: [R] of the tokens.
        values: [R] predicted before each token; after the last the value is 0.

    Returns:
        [R]; advantages + values are the returns.
    """
    advantages = np.zeros(len(rewards), dtype=np.float64)
    following, following_value = 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = float(rewards[t]) + gamma * following_value - float(values[t])
        following = advantages[t] = delta + gamma * lam * following
        following_value = float(values[t])
    return advantages.astype(np.float32)


def has_signal(rewards: Floats) -> npt.NDArray[np.bool_]:
    """Whether each group [n_groups] has two different valid rewards.

    Raises:
        ValueError: An infinite reward.
    """
    return _valid_and_signal(rewards)[1]


def zero_variance_share(rewards: Floats) -> float:
    """Share of groups whose valid rewards are equal, or that have fewer than two.

    Args:
        rewards: [n_groups, group_size] float, nan where a response has no valid reward.

    Returns:
        Between 0 and 1; nan when there are no groups.

    Raises:
        ValueError: An infinite reward.
    """
    with_signal = has_signal(rewards)
    return float(1.0 - with_signal.mean()) if with_signal.size else float("nan")


def _valid_and_signal(rewards: Floats) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Masks: which rewards are valid [n_groups, group_size]; which groups have two different rewards [n_groups]."""
    if np.isinf(rewards).any():
        raise ValueError("a reward is infinite; use nan for a reward that is invalid")
    valid = ~np.isnan(rewards)
    highest = np.where(valid, rewards, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(valid, rewards, np.inf).min(axis=1, initial=np.inf)
    return valid, highest > lowest
