"""What a step minimises, on the flat response tokens of one micro-batch.

Each objective returns a loss that is summed over micro-batches (token weights make the sum the mini-batch's average)
and statistics that are summed too: `<name>` over tokens, `pair/<name>` over pairs, with `pairs` to divide by.
`Learner.step` adds the loss and the number of tokens, and checks that the arrays named in `needs` are there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rlvid.algorithms import preference_loss
from rlvid.algorithms.importance import correction_weights, per_response
from rlvid.algorithms.kl import ESTIMATORS
from rlvid.algorithms.policy_loss import policy_loss
from rlvid.algorithms.value_loss import value_loss
from rlvid.config import DpoConfig, PolicyGradientConfig
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
    """Negative log-likelihood of the given responses. A critic's values are not trained."""

    needs = ("weights",)

    def __call__(self, outputs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        logprobs = outputs if outputs.ndim == 1 else outputs[:, 0]
        return -(flat(groups, "weights", logprobs) * logprobs).sum(), {}


@dataclass(frozen=True)
class PolicyGradient:
    """The policy's loss of GRPO, its relatives and PPO (rlvid/algorithms/policy_loss.py), plus the KL to the reference.

    `old`: whose log-probs are the denominator of the ratio. "rollout": the engine's. "trainer": the trainer's before
    the first update. "own": the same, where there is a single update: those of this forward. `logprob_gap` is the
    distance to the engine's in any case.
    """

    cfg: PolicyGradientConfig
    old: Literal["rollout", "trainer", "own"] = "rollout"

    @property
    def needs(self) -> Collection[str]:
        names = ["weights", "advantages", "rollout_logprobs"]
        return names + ["old_logprobs"] * (self.old == "trainer") + ["ref_logprobs"] * self._has_kl

    @property
    def _has_kl(self) -> bool:
        return self.cfg.kl_coef > 0 and self.cfg.kl_in == "loss"

    def __call__(self, logprobs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        cfg, lengths = self.cfg, _lengths(groups, logprobs)
        weights, advantages, sampled = (
            flat(groups, name, logprobs) for name in ("weights", "advantages", "rollout_logprobs")
        )
        old = {"rollout": sampled, "own": logprobs.detach()}.get(self.old)
        old = flat(groups, "old_logprobs", logprobs) if old is None else old
        of_response = lengths if cfg.ratio == "sequence" else None
        per_token, stats = policy_loss(
            logprobs, old, advantages, cfg.clip_low, cfg.clip_high, of_response, kind=cfg.loss
        )
        sums = {**stats, "logprob_gap": (logprobs.detach() - sampled).abs().sum()}
        if cfg.correction != "none":
            correction = correction_weights(old, sampled, lengths, cfg.correction, cfg.correction_cap)
            per_token = per_token * correction
            sums["correction"] = correction.sum()
        if self._has_kl:
            kl = ESTIMATORS[cfg.kl_estimator](logprobs, flat(groups, "ref_logprobs", logprobs))
            per_token = per_token + cfg.kl_coef * kl
            sums["kl"] = kl.detach().sum()
        return (weights * per_token).sum(), sums


@dataclass(frozen=True)
class Values:
    """The loss of a critic, whose outputs are a value before each response token."""

    clip: float | None
    needs = ("weights", "values", "returns")

    def __call__(self, outputs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        values = outputs.flatten()
        weights, old, returns = (flat(groups, name, values) for name in self.needs)
        losses, is_clipped = value_loss(values, old, returns, self.clip)
        error = old - returns
        sums = {
            "value_loss": losses.detach().sum(),
            "value_clipped": is_clipped.float().sum(),
            "return": returns.sum(),
            "return_squared": returns.square().sum(),
            "value_error": error.sum(),
            "value_error_squared": error.square().sum(),
        }
        return (weights * losses).sum(), sums


@dataclass(frozen=True)
class ActorCritic:
    """Both losses on a network with a value head: outputs [M, 2] are log-probs and values."""

    policy: PolicyGradient
    values: Values
    value_coef: float

    @property
    def needs(self) -> Collection[str]:
        return (*self.policy.needs, *self.values.needs)

    def __call__(self, outputs: Tensor, groups: Sequence[Group[Any]]) -> tuple[Tensor, Sums]:
        policy, sums = self.policy(outputs[:, 0], groups)
        value, value_sums = self.values(outputs[:, 1], groups)
        return policy + self.value_coef * value, sums | value_sums


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
        lengths = _lengths(groups, logprobs)

        def of_pairs(values: Tensor) -> Tensor:
            sums = per_response(values, lengths)
            return (sums / lengths if self.cfg.is_mean else sums).view(-1, 2)

        own = of_pairs(logprobs)
        scores = own
        if self.cfg.needs_reference:
            scores = own - of_pairs(flat(groups, "ref_logprobs", logprobs))
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


def _lengths(groups: Sequence[Group[Any]], like: Tensor) -> Tensor:
    """Tokens [n_responses] of each response."""
    return torch.tensor([len(ids) for g in groups for ids in g.responses], device=like.device)


def _pair_sums(pairs: Mapping[str, Tensor]) -> Sums:
    """Sums of statistics [n] of n pairs."""
    sums = {f"pair/{name}": values.sum() for name, values in pairs.items()}
    return sums | {"pairs": torch.tensor(float(len(pairs["margin"])))}
