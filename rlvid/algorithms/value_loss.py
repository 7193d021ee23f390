"""The critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error of each token's value, with PPO's clip (Schulman et al., openai/baselines, ppo2).

    Args:
        values: [n_tokens] predicted now.
        old_values: [n_tokens] predicted before the update.
        returns: [n_tokens] advantage + old value.
        clip: the larger of two errors counts: the value's, and that of the value clipped to old value +- clip. None: no
            clip.

    Returns:
        Loss [n_tokens], and whether the clip decided [n_tokens].
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error, torch.zeros_like(error, dtype=torch.bool)
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(error, clipped), (clipped > error).detach()
