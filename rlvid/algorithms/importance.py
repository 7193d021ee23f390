"""Importance weights between the policy that is trained and the one that sampled: ratios and corrections.

Tensors are flat over the tokens of all responses; `lengths` says where each response ends.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: finite in float32, so that an advantage of 0 times the ratio is 0 and not nan


def per_response(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums [n_responses] of the values [n_tokens] of each response."""
    which = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    return torch.zeros(len(lengths), device=values.device, dtype=values.dtype).index_add(0, which, values)


def importance_ratio(log_ratio: Tensor, lengths: Tensor | None = None) -> Tensor:
    """exp of log-prob differences [n_tokens], which are clamped to +-20.

    Args:
        lengths: [n_responses]. If given, each token has its response's ratio, the geometric mean over its tokens (GSPO:
            Zheng et al. 2025, arXiv 2507.18071, eq. 7), and its gradient.
    """
    if lengths is not None:
        mean = per_response(log_ratio, lengths) / lengths.clamp(min=1)
        log_ratio = torch.repeat_interleave(mean, lengths)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def correction_weights(
    logprobs: Tensor, rollout_logprobs: Tensor, lengths: Tensor, mode: Literal["truncate", "mask"], cap: float
) -> Tensor:
    """Weights [n_tokens] of the loss for tokens that another policy, or other kernels, sampled. No gradient.

    "truncate": min(pi / pi_rollout, cap) of each token (truncated importance sampling: Yao et al. 2025,
    fengyao.notion.site/off-policy-rl). "mask": 0 for the tokens of a response whose product of ratios is above the cap,
    else 1 (as TRL's `sequence_mask`, without its factor).
    """
    log_ratio = logprobs.detach().float() - rollout_logprobs.float()
    if mode == "truncate":
        return importance_ratio(log_ratio).clamp(max=cap)
    of_response = importance_ratio(per_response(log_ratio, lengths))
    return torch.repeat_interleave((of_response <= cap).float(), lengths)
