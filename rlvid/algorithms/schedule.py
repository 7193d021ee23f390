"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore on resume."""

from __future__ import annotations

import math
from typing import Literal


def lr_multiplier(
    step: int, total_steps: int, warmup_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Factor of the peak learning rate for optimizer step `step`.

    Warm-up climbs from 0 just before the first step to 1 at step `warmup_steps`: (step + 1) / (warmup_steps + 1), as in
    nanoGPT. Hugging Face's step / warmup_steps would make the first step, a whole rollout batch, with learning rate 0.
    After it: constant 1, a straight line, or half a cosine, which would reach 0 at `total_steps`.

    Args:
        step: Optimizer steps made before this one, from 0.
        total_steps: Optimizer steps of the phase.
        warmup_steps: Steps of warm-up, part of `total_steps`.
        schedule: What follows the warm-up.

    Returns:
        Between 0 and 1. 0 for linear and cosine at and after `total_steps`.

    Raises:
        ValueError: A negative number or an unknown schedule.
    """
    if min(step, total_steps, warmup_steps) < 0:
        raise ValueError(f"steps must not be negative: step={step} total={total_steps} warm-up={warmup_steps}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"schedule must be 'constant', 'linear' or 'cosine', got {schedule!r}")
