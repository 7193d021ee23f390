"""The policy loss of PPO, GRPO and relatives, and token weights that average it exactly over any split into
micro-batches.

All tensors are flat: one axis over the tokens of all responses, in the order of the packed trainer. No function here
takes a mean: means of micro-batches of unequal size do not average to the mean of the mini-batch. Instead each token's
weight is computed once for the whole mini-batch (`token_weights`), and the micro-batches are summed.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlvid.algorithms.importance import importance_ratio
from rlvid.algorithms.kl import k3


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    lengths: Tensor | None = None,
    kind: Literal["clip", "cispo"] = "clip",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token; ratio = exp(logprob - old_logprob), clipped = clip(ratio, 1 - clip_low, 1 + clip_high).

    "clip": -min(ratio * A, clipped * A). PPO: Schulman et al. 2017, arXiv 1707.06347, eq. 7. Unequal clips
    ("clip-higher"): DAPO, arXiv 2503.14476, eq. 10. "cispo": -A * logprob * clipped, where `clipped` has no gradient
    (MiniMax-M1, arXiv 2506.13585, eq. 4).

    Args:
        logprobs: [n_tokens] of the policy being trained; the only input that gets a gradient.
        old_logprobs: [n_tokens] of the policy in the denominator of the ratio.
        advantages: [n_tokens], each response's advantage repeated for its tokens (PPO: one per token).
        clip_low: The ratio is clipped below at 1 - clip_low.
        clip_high: The ratio is clipped above at 1 + clip_high.
        lengths: [n_responses] tokens of each response. If given, the ratio is one per response (GSPO).

    Returns:
        The loss [n_tokens] float32, and sums over tokens (0-d float32, no gradient) that can be added over
        micro-batches and ranks: `clip_low` and `clip_high`, the number of tokens where the clip of
        "clip" takes effect; `ratio`; `kl_to_old`, the k3 estimate of KL(old || policy).

    Raises:
        ValueError: The shapes differ or have more than one axis.
    """
    if logprobs.ndim != 1 or not logprobs.shape == old_logprobs.shape == advantages.shape:
        raise ValueError(f"not of one shape [n_tokens]: {logprobs.shape}, {old_logprobs.shape}, {advantages.shape}")
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach().float()
    ratio = importance_ratio(logprobs.float() - old_logprobs.float(), lengths)
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if kind == "cispo":
        loss = -clipped_ratio.detach() * advantages * logprobs.float()
    else:
        loss = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    with torch.no_grad():
        sums = {
            "clip_low": ((ratio < 1.0 - clip_low) & (advantages < 0)).float().sum(),
            "clip_high": ((ratio > 1.0 + clip_high) & (advantages > 0)).float().sum(),
            "ratio": ratio.sum(),
            "kl_to_old": k3(old_logprobs, logprobs).sum(),
        }
    return loss, sums


def token_weights(
    response_lengths: npt.ArrayLike, mode: Literal["token", "sequence", "constant"], max_tokens: int = 1
) -> npt.NDArray[np.float32]:
    """Return the weight of each response's tokens, so that sum(weight * loss) over all tokens is the mini-batch's mean.

    "token": all tokens have equal weight, 1 / sum(lengths) (DAPO). "sequence": all responses have equal weight, and so
    have the tokens within one, 1 / (n_responses * length) (GRPO's paper, R1-V, Video-R1). "constant": all tokens have
    weight 1 / (n_responses * max_tokens), however long the responses are (Dr. GRPO). A response of length 0 is not
    counted: give length 0 to leave a response out.

    A trainer whose engine averages gradients over ranks (DeepSpeed, DDP) multiplies by the number of ranks.

    Args:
        response_lengths: [n_responses] int, tokens of each response of the whole mini-batch, over all ranks.
        mode: What has equal weight.

    Returns:
        [n_responses] float32; `numpy.repeat` it by the lengths for one weight per token.
    """
    lengths = np.asarray(response_lengths, dtype=np.int64)
    if mode == "token":
        weights = np.full(lengths.shape, 1.0 / max(int(lengths.sum()), 1))
    else:
        sizes = np.maximum(lengths, 1) if mode == "sequence" else np.full(lengths.shape, max_tokens)
        weights = 1.0 / (max(int((lengths > 0).sum()), 1) * sizes)
    return np.where(lengths > 0, weights, 0.0).astype(np.float32)
