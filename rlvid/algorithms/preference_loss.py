"""Losses on pairs of responses, one preferred.

Pure functions of log-probs per response: tensors [P], one entry per pair. `chosen` and `rejected` are log-ratios to the
reference, log pi(y|x) - log pi_ref(y|x), summed over tokens unless a loss says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Args:
        label_smoothing: expected share of pairs whose preference is flipped; above 0 this is conservative DPO
            (Mitchell 2023, ericmitchell.ai/cdpo.pdf).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust_dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss on clean pairs (Chowdhury et al. 2024, arXiv 2403.00409, eq. 12).

    Args:
        label_smoothing: share of pairs whose preference is flipped, below 1/2.
    """
    margin = beta * (chosen - rejected)
    as_given, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * as_given - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17). Log-ratios are means per token, as in its authors' results."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto(
    chosen: Tensor, rejected: Tensor, beta: float, kl: float, chosen_weight: float, rejected_weight: float
) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), the mean of a pair's desirable and undesirable response.

    Args:
        kl: reference point z0 >= 0, measured on responses that belong to other prompts; it has no gradient.
    """
    desirable = chosen_weight * (1 - torch.sigmoid(beta * (chosen - kl)))
    undesirable = rejected_weight * (1 - torch.sigmoid(beta * (kl - rejected)))
    return (desirable + undesirable) / 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, margin: float) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6). It has no reference: the inputs are mean log-probs per token.

    Args:
        margin: the paper's gamma, the target of the reward difference.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The odds-ratio term of ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 7), times its weight lambda.

    The inputs are mean log-probs per token. The other term of ORPO is the likelihood of the chosen response.
    """
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * F.logsigmoid(odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact near 0."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
