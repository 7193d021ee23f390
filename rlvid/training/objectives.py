"""What a step minimises, on the flat response tokens of one micro-batch.

Each objective returns a loss that is summed over micro-batches (token weights make the sum the mini-batch's average)
and statistics that are summed too: `<name>` over tokens, `pair/<name>` over pairs, with `pairs` to divide by.
`Learner.step` adds the loss and the number of tokens, and checks that the arrays named in `needs` are there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvid.algorithms import preference_loss
from rlvid.algorithms.kl import ESTIMATORS
from rlvid.algorithms.policy_loss import policy_loss
from rlvid.config import DpoConfig, GrpoConfig
from rlvid.training.batch import Group, flat

Sums = dict[str, Tensor]


class Objective(Protocol):
    """A loss on the outputs of one micro-batch."""

    @property
    def needs(self) -> Collection[str]:
        """Names of the arrays in `Group.tokens` or `Group.targets` that the loss reads."""

    def __call__(self, outputs: Tensor, groups: Sequence[Group[Any]], /) -> tuple[Tensor, Sums]:
        """The loss and the sums of its statistics.

        Args:
            outputs: log-probs [M] of the response tokens, or the scores [S, D] of a model with a head.
        """


@dataclass(frozen=True)
class Supervised:
    """Negative log-likelihood of the given responses."""

    needs = ("weights",)

    def __call__(self, logprobs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        return -(flat(groups, "weights", logprobs) * logprobs).sum(), {}


@dataclass(frozen=True)
class Grpo:
    """Clipped policy loss plus the KL to the reference (DeepSeekMath, arXiv 2402.03300, eq. 3).

    `is_first`: the policy has not changed since the rollouts and the ratio is taken to its own log-probs, which are
    those of this forward. `logprob_gap` is the distance to `old_logprobs` in any case.
    """

    cfg: GrpoConfig
    is_first: bool = False

    @property
    def needs(self) -> Collection[str]:
        return ("weights", "advantages", "old_logprobs", *(["ref_logprobs"] if self.cfg.kl_coef else []))

    def __call__(self, logprobs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        weights, advantages, given = (
            flat(groups, name, logprobs) for name in ("weights", "advantages", "old_logprobs")
        )
        old = logprobs.detach() if self.is_first else given
        per_token, stats = policy_loss(logprobs, old, advantages, self.cfg.clip_low, self.cfg.clip_high)
        sums = {**stats, "logprob_gap": (logprobs.detach() - given).abs().sum()}
        if self.cfg.kl_coef:
            kl = ESTIMATORS[self.cfg.kl_estimator](logprobs, flat(groups, "ref_logprobs", logprobs))
            per_token = per_token + self.cfg.kl_coef * kl
            sums["kl"] = kl.detach().sum()
        return (weights * per_token).sum(), sums


@dataclass(frozen=True)
class Preferred:
    """A preference loss on pairs plus the chosen responses' likelihood: each group's responses are chosen, rejected.

    `loss_weight * preference + sft_weight * SFT(chosen)` as in LLaVA-Hound (arXiv 2404.01258). Token weights are those
    of the likelihood: a share of each chosen token, 0 for the rejected ones.
    """

    cfg: DpoConfig
    n_pairs: int  # of the mini-batch, over all ranks
    kl: float = 0.0  # kto: the reference point

    @property
    def needs(self) -> Collection[str]:
        return ("weights", *(["ref_logprobs"] if self.cfg.needs_reference else []))

    def __call__(self, logprobs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        lengths = torch.tensor([len(ids) for g in groups for ids in g.responses], device=logprobs.device)
        which = torch.repeat_interleave(torch.arange(len(lengths), device=logprobs.device), lengths)

        def per_response(values: Tensor) -> Tensor:
            sums = torch.zeros(len(lengths), device=values.device, dtype=values.dtype).index_add(0, which, values)
            return (sums / lengths if self.cfg.is_mean else sums).view(-1, 2)

        own = per_response(logprobs)
        scores = own
        if self.cfg.needs_reference:
            scores = own - per_response(flat(groups, "ref_logprobs", logprobs))
        losses = self._losses(*scores.unbind(1))
        nll = -(flat(groups, "weights", logprobs) * logprobs).sum()
        loss = self.cfg.loss_weight * losses.sum() / self.n_pairs + self.cfg.sft_weight * nll
        # SimPO and ORPO have no reference: their implicit reward is the log-prob itself.
        chosen, rejected = (self.cfg.beta * scores.detach()).unbind(1)
        sizes = lengths.view(-1, 2).float()
        pairs = {
            "loss": losses.detach(),
            "chosen": chosen,
            "rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).float() + 0.5 * (chosen == rejected),  # at the start all are equal
            "logps_chosen": own.detach()[:, 0],
            "logps_rejected": own.detach()[:, 1],
            "length_chosen": sizes[:, 0],
            "length_rejected": sizes[:, 1],
        }
        return loss, _pair_sums(pairs)

    def _losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        cfg, both = self.cfg, (chosen, rejected, self.cfg.beta)
        losses = {
            "sigmoid": lambda: preference_loss.dpo(*both, cfg.label_smoothing),
            "robust": lambda: preference_loss.robust_dpo(*both, cfg.label_smoothing),
            "ipo": lambda: preference_loss.ipo(*both),
            "kto": lambda: preference_loss.kto(*both, self.kl, cfg.chosen_weight, cfg.rejected_weight),
            "simpo": lambda: preference_loss.simpo(*both, cfg.simpo_margin),
            "orpo": lambda: preference_loss.orpo(*both),
        }
        return losses[cfg.loss]()


@dataclass(frozen=True)
class Regression:
    """Mean squared error of a prompt's scores [S, D] to its labels, raw and float32, as VideoScore trains."""

    n_prompts: int  # of the mini-batch, over all ranks
    needs = ("labels",)

    def __call__(self, scores: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        error = scores - flat(groups, "labels", scores).view(scores.shape)
        return error.square().mean(1).sum() / self.n_prompts, {"error": error.detach().abs().mean(1).sum()}


@dataclass(frozen=True)
class BradleyTerry:
    """-log sigmoid(chosen - rejected) of the scores [2n, 1] of pairs."""

    n_pairs: int  # of the mini-batch, over all ranks
    needs = ()

    def __call__(self, scores: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margin = chosen - rejected
        pairs = {"margin": margin.detach(), "accuracy": (margin.detach() > 0).float()}
        return -F.logsigmoid(margin).sum() / self.n_pairs, _pair_sums(pairs)


def _pair_sums(pairs: Mapping[str, Tensor]) -> Sums:
    """Sums of statistics [n] of n pairs."""
    sums = {f"pair/{name}": values.sum() for name, values in pairs.items()}
    return sums | {"pairs": torch.tensor(float(len(pairs["margin"])))}
