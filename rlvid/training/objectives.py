"""What a step minimises, on the flat response tokens of one micro-batch.

Each objective returns a loss that is summed over micro-batches (token weights make the sum the mini-batch's average)
and statistics that are summed too: `<name>` over tokens, with `tokens` to divide by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlvid.algorithms.kl import ESTIMATORS
from rlvid.algorithms.policy_loss import policy_loss
from rlvid.config import GrpoConfig
from rlvid.training.packing import Group

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Supervised:
    """Negative log-likelihood of the given responses."""

    def __call__(self, logprobs: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]:
        weights = _flat(groups, "weights", logprobs)
        loss = -(weights * logprobs).sum()
        return loss, {"loss": loss.detach(), "tokens": torch.tensor(float(len(logprobs)))}


@dataclass(frozen=True)
class Grpo:
    """Clipped policy loss plus the KL to the reference (DeepSeekMath, arXiv 2402.03300, eq. 3).

    `is_first`: the policy has not moved since the rollouts, and the ratio is taken to its own log-probs: they are those
    of this very forward. `logprob_gap` is the distance to the log-probs given in any case.
    """

    cfg: GrpoConfig
    is_first: bool = False

    def __call__(self, logprobs: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Sums]:
        weights, advantages, given = (
            _flat(groups, name, logprobs) for name in ("weights", "advantages", "old_logprobs")
        )
        old = logprobs.detach() if self.is_first else given
        per_token, stats = policy_loss(logprobs, old, advantages, self.cfg.clip_low, self.cfg.clip_high)
        sums = {**stats, "logprob_gap": (logprobs.detach() - given).abs().sum()}
        if self.cfg.kl_coef:
            kl = ESTIMATORS[self.cfg.kl_estimator](logprobs, _flat(groups, "ref_logprobs", logprobs))
            per_token = per_token + self.cfg.kl_coef * kl
            sums["kl"] = kl.detach().sum()
        loss = (weights * per_token).sum()
        return loss, sums | {"loss": loss.detach()}


Objective = Supervised | Grpo


def _flat(groups: Sequence[Group], name: str, like: Tensor) -> Tensor:
    """The groups' arrays of one name as a tensor [M] on the device of `like`."""
    return torch.from_numpy(np.concatenate([getattr(g.responses, name) for g in groups])).to(like.device)
