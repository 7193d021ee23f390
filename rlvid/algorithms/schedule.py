"""Learning-rate schedules as pure functions of the step: a resumed run has nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def lr_multiplier(
    step: int, total_steps: int, warmup_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Return the factor by which the peak learning rate is multiplied at optimizer step `step`.

    During warm-up the factor is (step + 1) / (warmup_steps + 1), as in nanoGPT, and reaches 1 at step `warmup_steps`.
    Hugging Face's step / warmup_steps would spend the first step, a whole rollout batch, at learning rate 0. After the
    warm-up it is 1, or falls to 0 at `total_steps` along a line or half a cosine.

    Args:
        step: Number of the optimizer step, from 0.
        total_steps: Optimizer steps of the phase.
        warmup_steps: Steps of warm-up, part of `total_steps`.
        schedule: What follows the warm-up.

    Returns:
        Between 0 and 1. 0 for linear and cosine at and after `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
