"""Estimators of KL(policy || reference) from tokens sampled by the policy (Schulman, joschu.net/blog/kl-approx.html).

All take two tensors of log-probs of the same sampled tokens, of equal shape, and return float32 of that shape. With
x = log(reference / policy): k1 = -x, k2 = x^2 / 2, k3 = exp(x) - 1 - x. As estimates, k1 and k3 are unbiased; k2 and k3
are never negative. As losses they differ: the gradient of k1 is zero on average, the gradient of k2 is that of
KL(policy || reference) when on policy, and the gradient of k3 is that of KL(reference || policy).
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
    # expm1 is exact near 0, where exp(x) - 1 loses digits. The clamp keeps rounding from making a KL negative.
    return (torch.expm1(log_ratio) - log_ratio).clamp(min=0.0)


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(reference / policy), in float32: near -10, neighbouring bfloat16 numbers are 1/16 apart."""
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(f"log-probs of {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)} must have one shape")
    return ref_logprobs.float() - logprobs.float()
