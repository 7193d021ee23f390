"""Losses compared with numbers computed by hand from the formulas of the papers."""

import math

import pytest
import torch
from torch import Tensor

from rlvid.algorithms.preference_loss import dpo, ipo, kto, orpo, robust_dpo, simpo

CHOSEN, REJECTED = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0])  # log-ratios


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def close(loss: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_dpo_is_the_negative_log_likelihood_of_the_preference() -> None:
    close(dpo(CHOSEN, REJECTED, beta=0.5), [-math.log(sigmoid(1.0)), -math.log(sigmoid(-1.0))])


def test_dpo_starts_at_log_2() -> None:
    close(dpo(torch.zeros(1), torch.zeros(1), beta=0.1), [math.log(2)])


def test_conservative_dpo_mixes_in_the_flipped_pair() -> None:
    as_given, flipped = -math.log(sigmoid(1.0)), -math.log(sigmoid(-1.0))
    close(dpo(CHOSEN, REJECTED, 0.5, 0.25), [0.75 * as_given + 0.25 * flipped, 0.75 * flipped + 0.25 * as_given])


def test_robust_dpo_is_unbiased_under_flips() -> None:
    clean = dpo(CHOSEN, REJECTED, 0.5)
    seen, flipped = robust_dpo(CHOSEN, REJECTED, 0.5, 0.2), robust_dpo(REJECTED, CHOSEN, 0.5, 0.2)
    torch.testing.assert_close(0.8 * seen + 0.2 * flipped, clean)


def test_ipo_is_a_square_around_half_of_one_over_beta() -> None:
    close(ipo(CHOSEN, REJECTED, beta=0.25), [(2.0 - 2.0) ** 2, (-2.0 - 2.0) ** 2])


def test_kto_weighs_both_sides_around_the_reference_point() -> None:
    loss = kto(CHOSEN, REJECTED, beta=0.5, kl=1.0, chosen_weight=1.0, rejected_weight=2.0)
    first = (1 - sigmoid(0.5 * 1.0)) + 2 * (1 - sigmoid(0.5 * 1.0))
    second = (1 - sigmoid(0.5 * -2.0)) + 2 * (1 - sigmoid(0.0))
    close(loss, [first / 2, second / 2])


def test_simpo_has_a_target_margin() -> None:
    chosen, rejected = torch.tensor([-0.5]), torch.tensor([-1.0])  # mean log-probs
    close(simpo(chosen, rejected, beta=2.0, margin=0.3), [-math.log(sigmoid(2.0 * 0.5 - 0.3))])


def test_orpo_compares_odds() -> None:
    p, q = 0.6, 0.2
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    chosen, rejected = torch.tensor([math.log(p)]), torch.tensor([math.log(q)])
    close(orpo(chosen, rejected, beta=0.1), [-0.1 * math.log(sigmoid(odds))])


@pytest.mark.parametrize("log_prob", [-1e-12, -1e-4, -0.6931, -5.0, -80.0])
def test_orpo_stays_finite_with_its_gradient(log_prob: float) -> None:
    chosen = torch.tensor([log_prob], requires_grad=True)
    loss = orpo(chosen, torch.tensor([-1.0]), beta=1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize(
    "loss",
    [
        lambda c, r: dpo(c, r, 0.1),
        lambda c, r: robust_dpo(c, r, 0.1, 0.1),
        lambda c, r: ipo(c, r, 0.1),
        lambda c, r: kto(c, r, 0.1, 0.0, 1.0, 1.0),
        lambda c, r: simpo(c, r, 2.0, 0.5),
        lambda c, r: orpo(c - 3, r - 3, 0.1),
    ],
)
def test_every_loss_pushes_chosen_up_and_rejected_down(loss) -> None:  # type: ignore[no-untyped-def]
    chosen, rejected = (torch.zeros(1, requires_grad=True) for _ in range(2))
    loss(chosen, rejected).sum().backward()
    assert chosen.grad.item() < 0 < rejected.grad.item()
