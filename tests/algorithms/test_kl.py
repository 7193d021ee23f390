import math

import pytest
import torch

from rlvid.algorithms.kl import ESTIMATORS, k1, k2, k3

# Probabilities of the sampled tokens: reference / policy is 2, 1/2 and 1.
POLICY = torch.tensor([0.25, 0.5, 0.5]).log()
REFERENCE = torch.tensor([0.5, 0.25, 0.5]).log()
LN2 = math.log(2)


def test_k1_is_the_log_ratio() -> None:
    torch.testing.assert_close(k1(POLICY, REFERENCE), torch.tensor([-LN2, LN2, 0.0]))


def test_k2_is_half_its_square() -> None:
    torch.testing.assert_close(k2(POLICY, REFERENCE), torch.tensor([LN2**2 / 2, LN2**2 / 2, 0.0]))


def test_k3_is_ratio_minus_one_minus_log_ratio() -> None:
    torch.testing.assert_close(k3(POLICY, REFERENCE), torch.tensor([2 - 1 - LN2, 0.5 - 1 + LN2, 0.0]))


def test_means_over_the_policy_are_the_kl_divergence() -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    kl = 0.5 * math.log(0.5 / 0.2) + 0.2 * math.log(0.2 / 0.5)  # the middle token adds 0
    for estimator in (k1, k3):  # the unbiased ones
        assert float((policy * estimator(policy.log(), reference.log())).sum()) == pytest.approx(kl, rel=1e-6)


def test_gradients_are_those_of_the_docstring() -> None:
    """Expected under the policy (1/2, 1/2), with respect to the first logit; the reference is (1/4, 3/4)."""
    reference = torch.tensor([0.25, 0.75])
    gradients = {}
    for name, estimator in ESTIMATORS.items():
        logits = torch.zeros(2, requires_grad=True)
        logprobs = logits.log_softmax(0)
        (torch.tensor([0.5, 0.5]) * estimator(logprobs, reference.log())).sum().backward()
        assert logits.grad is not None
        gradients[name] = float(logits.grad[0])
    # d log p0 / d z0 = 1/2, d log p1 / d z0 = -1/2.
    assert gradients["k1"] == pytest.approx(0.0, abs=1e-7)  # 1/2 * 1/2 - 1/2 * 1/2
    # KL(policy || reference): sum p (1/2, -1/2) log(p/q) = 1/4 (log 2 - log 2/3) = 1/4 log 3
    assert gradients["k2"] == pytest.approx(math.log(3) / 4)
    # KL(reference || policy): -sum q (1/2, -1/2) = -1/8 + 3/8
    assert gradients["k3"] == pytest.approx(0.25)


def test_huge_log_ratios_stay_finite_with_a_finite_gradient() -> None:
    for gap in (200.0, -200.0):
        logprobs = torch.tensor([-1.0], requires_grad=True)
        value = k3(logprobs, torch.tensor([-1.0 + gap]))
        value.backward()
        assert torch.isfinite(value).all() and logprobs.grad is not None and torch.isfinite(logprobs.grad).all()
    # clamped to 10: e^10 - 1 - 10
    assert k3(torch.tensor([-200.0]), torch.tensor([0.0])).item() == pytest.approx(math.exp(10) - 11, rel=1e-6)


def test_tiny_log_ratios_never_give_a_negative_k3() -> None:
    gaps = torch.logspace(-12, -2, 500)
    for sign in (1, -1):
        assert (k3(torch.zeros(500), sign * gaps) >= 0).all()
    # x^2/2 + x^3/6 at x = 1e-3
    assert k3(torch.zeros(1), torch.tensor([1e-3])).item() == pytest.approx(5.001667e-7, rel=1e-3)


def test_bfloat16_is_computed_in_float32() -> None:
    policy, reference = torch.tensor([-8.0], dtype=torch.bfloat16), torch.tensor([-0.03125], dtype=torch.bfloat16)
    difference = k1(policy, reference)
    assert difference.dtype == torch.float32
    assert difference.item() == -8 + 0.03125  # bfloat16 would round to -8


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        k3(torch.zeros(3), torch.zeros(3, 1))
