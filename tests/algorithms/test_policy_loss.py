import math
from typing import Literal

import numpy as np
import pytest
import torch

from rlvid.algorithms.policy_loss import policy_loss, token_weights


def test_clipped_loss_in_the_four_corners() -> None:
    ratios = torch.tensor([1.5, 0.5, 0.5, 1.5])
    advantages = torch.tensor([2.0, -1.0, 1.0, -1.0])
    old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    logprobs = (old + ratios.log()).requires_grad_()

    loss, sums = policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.3)

    # A > 0, ratio above: -min(3, 1.3 * 2); A < 0, ratio below: -min(-0.5, -0.8); the other two are not clipped
    torch.testing.assert_close(loss, torch.tensor([-2.6, 0.8, -0.5, 1.5]))
    loss.sum().backward()
    # -A * ratio where the clip has no effect, 0 where it has
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, -0.5, 1.5]))

    means = {name: value.item() / 4 for name, value in sums.items()}
    # ratio - 1 - log(ratio) is 0.5 - log 1.5 twice and -0.5 + log 2 twice
    kl_to_old = ((0.5 - math.log(1.5)) + (-0.5 + math.log(2))) / 2
    assert means == pytest.approx(
        {"clip_low": 1 / 4, "clip_high": 1 / 4, "ratio": 1.0, "kl_to_old": kl_to_old}, rel=1e-5
    )


def test_first_update_on_policy_is_the_plain_policy_gradient() -> None:
    logprobs = torch.tensor([-0.5, -1.5], requires_grad=True)
    advantages = torch.tensor([2.0, -3.0])
    loss, sums = policy_loss(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2)
    assert loss.tolist() == [-2.0, 3.0]
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2.0, 3.0]
    assert sums["clip_low"] == sums["clip_high"] == sums["kl_to_old"] == 0


def test_only_logprobs_get_a_gradient() -> None:
    logprobs, old, advantages = (torch.tensor([-1.0], requires_grad=True) for _ in range(3))
    loss, sums = policy_loss(logprobs, old, advantages, clip_low=0.2, clip_high=0.2)
    loss.sum().backward()
    assert logprobs.grad is not None and old.grad is None and advantages.grad is None
    assert not any(value.requires_grad for value in sums.values())


def test_a_ratio_beyond_float_range_neither_overflows_nor_turns_advantage_zero_into_nan() -> None:
    logprobs = torch.tensor([0.0, 0.0, -500.0], requires_grad=True)
    loss, sums = policy_loss(logprobs, torch.tensor([-500.0, -500.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]), 0.2, 0.2)
    assert loss.tolist() == pytest.approx([0.0, -1.2, 0.0], abs=1e-6)
    loss.sum().backward()
    assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()
    assert all(torch.isfinite(value) for value in sums.values())


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="n_tokens"):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), 0.2, 0.2)
    with pytest.raises(ValueError, match="n_tokens"):
        policy_loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1), 0.2, 0.2)


# Three responses of 1, 3 and 2 tokens.
LENGTHS = np.array([1, 3, 2])
LOSSES = [[6.0], [1.0, 2.0, 3.0], [4.0, 8.0]]
MEAN = {
    "token": (6 + 1 + 2 + 3 + 4 + 8) / 6,
    "sequence": (6 + (1 + 2 + 3) / 3 + (4 + 8) / 2) / 3,
}


@pytest.mark.parametrize("mode", ["token", "sequence"])
@pytest.mark.parametrize("micro_batches", [[[0, 1, 2]], [[0], [1, 2]], [[2, 0], [1]], [[0], [1], [2]]])
def test_sums_over_any_split_into_micro_batches_are_the_mean_of_the_mini_batch(
    mode: Literal["token", "sequence"], micro_batches: list[list[int]]
) -> None:
    weights = token_weights(LENGTHS, mode)
    total = 0.0
    for micro_batch in micro_batches:
        losses = np.concatenate([LOSSES[i] for i in micro_batch])
        total += float((np.repeat(weights[micro_batch], LENGTHS[micro_batch]) * losses).sum())
    assert total == pytest.approx(MEAN[mode], rel=1e-6)


def test_weights_by_hand() -> None:
    np.testing.assert_allclose(token_weights(LENGTHS, "token"), [1 / 6, 1 / 6, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(token_weights(LENGTHS, "sequence"), [1 / 3, 1 / 9, 1 / 6], rtol=1e-6)
    assert token_weights(LENGTHS, "token").dtype == np.float32


def test_a_response_of_length_zero_is_left_out() -> None:
    np.testing.assert_allclose(token_weights([2, 0, 4], "token"), [1 / 6, 0, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(token_weights([2, 0, 4], "sequence"), [1 / 4, 0, 1 / 8], rtol=1e-6)
    assert token_weights([0, 0], "sequence").tolist() == [0.0, 0.0]
    assert token_weights([], "token").shape == (0,)


def test_a_sequence_ratio_clips_whole_responses() -> None:
    """GSPO: -min(s A, clip(s) A), s the geometric mean of a response's ratios."""
    old = torch.zeros(3)
    logprobs = torch.tensor([math.log(4.0), 0.0, math.log(0.5)], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, 2.0])
    lengths = torch.tensor([2, 1])
    loss, sums = policy_loss(logprobs, old, advantages, 0.2, 0.2, lengths)
    torch.testing.assert_close(loss, torch.tensor([-1.2, -1.2, -1.0]))  # 2 is clipped to 1.2, 0.5 is not: A > 0
    loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.0, -1.0]))
    assert sums["clip_high"] == 2


def test_cispo_weighs_log_probs_by_clipped_ratios_without_a_gradient() -> None:
    old = torch.tensor([-1.0, -1.0])
    logprobs = (old + torch.tensor([8.0, 0.5]).log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0])
    loss, _ = policy_loss(logprobs, old, advantages, clip_low=1.0, clip_high=4.0, kind="cispo")
    torch.testing.assert_close(loss, -torch.tensor([5.0, 0.5]) * advantages * logprobs.detach())
    loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([-5.0, 1.0]))  # the clipped token learns


def test_constant_weights_do_not_know_the_lengths() -> None:
    """Dr. GRPO: the sum over tokens, over the number of responses and the longest response possible."""
    assert token_weights([1, 3, 0], "constant", max_tokens=10).tolist() == pytest.approx([0.05, 0.05, 0.0])
