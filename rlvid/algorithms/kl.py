"""Estimators of KL(policy || reference) from tokens sampled by the policy (Schulman, joschu.net/blog/kl-approx.html).

All take log-probs of the same sampled tokens, any one shape, and return float32 of that shape. With
x = log(reference / policy): k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. k1 and k3 are unbiased values, k2 and k3 are
never negative. As a loss they differ: the gradient of k1 is zero on average, that of k2 is the true one on policy,
that of k3 is the one of KL(reference || policy).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

MAX_LOG_RATIO = 10.0  # Video-R1 clamps the log-ratio of k3 here; exp overflows float32 at 88


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference)."""
    return -_log_ratio(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(policy / reference)^2 / 2."""
    return 0.5 * _log_ratio(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """reference / policy - 1 - log(reference / policy), the log-ratio clamped to +-10; no gradient outside."""
    log_ratio = _log_ratio(logprobs, ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses near 0; what rounding is left must not make a KL negative.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(reference / policy). In float32: two bfloat16 log-probs near -10 differ by steps of 1/16 only."""
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"log-probs of {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)} do not go together")
    return ref_logprobs.float() - logprobs.float()
