import math

import numpy as np
import pytest
import torch

from rlvid.algorithms.advantages import (
    gae,
    group_advantages,
    leave_one_out,
    relative_to,
    returns_to_go,
    whitened,
    zero_variance_share,
)

NAN = float("nan")


def test_advantage_is_reward_minus_mean_over_sample_std_plus_eps() -> None:
    # mean 1/2, squares 4 * 1/4 = 1, sample variance 1 / (4 - 1)
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    advantages = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), normalise_std=True)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, [[expected, -expected, -expected, expected]], rtol=1e-6)


def test_without_normalisation_it_is_reward_minus_mean() -> None:
    advantages = group_advantages(np.array([[4.0, 1.0, 1.0], [0.0, 0.5, 1.0]]), normalise_std=False)
    np.testing.assert_allclose(advantages, [[2.0, -1.0, -1.0], [-0.5, 0.0, 0.5]])


def test_invalid_reward_is_left_out_and_gets_advantage_zero() -> None:
    # valid 1 and 3: mean 2, variance 2 / 1. Counted as 0, the two nans would make the mean 1.
    advantages = group_advantages(np.array([[1.0, NAN, 3.0, NAN]]), normalise_std=True)
    step = 1 / (math.sqrt(2) + 1e-4)
    np.testing.assert_allclose(advantages, [[-step, 0.0, step, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("group", [[5.0, NAN, NAN], [NAN, NAN, NAN]])
@pytest.mark.parametrize("normalise_std", [True, False])
def test_fewer_than_two_valid_rewards_give_zero_advantages(group: list[float], normalise_std: bool) -> None:
    advantages = group_advantages(np.array([group, [1.0, 1.0, 2.5]]), normalise_std)
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1].all()


def test_equal_rewards_give_exactly_zero_although_their_mean_is_rounded() -> None:
    rewards = np.array([[0.1, 0.1, 0.1], [0.7, 0.7, NAN]])
    assert rewards[0].mean() != 0.1  # the rounding that this is about
    for normalise_std in (True, False):
        assert not group_advantages(rewards, normalise_std).any()


def test_same_as_trl_when_all_rewards_are_valid() -> None:
    rewards = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    trl = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards.numpy(), normalise_std=True), trl.numpy(), atol=1e-5)


def test_zero_variance_share_counts_all_groups_without_gradient() -> None:
    rewards = np.array([[1.0, 1.0], [0.0, 1.0], [NAN, 1.0], [NAN, NAN], [2.0, 3.0]])
    assert zero_variance_share(rewards) == pytest.approx(3 / 5)


def test_no_groups_give_no_advantages() -> None:
    empty = np.zeros((0, 4))
    assert group_advantages(empty, normalise_std=True).shape == (0, 4)
    assert math.isnan(zero_variance_share(empty))


def test_infinite_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        group_advantages(np.array([[1.0, float("inf")]]), normalise_std=True)


def test_leave_one_out_compares_with_the_others() -> None:
    rewards = np.array([[1.0, 0.0, 0.5], [2.0, np.nan, 1.0], [1.0, 1.0, 1.0]])
    # 1 - 0.25, 0 - 0.75, 0.5 - 0.5; of two valid ones each is compared with the other
    assert np.allclose(leave_one_out(rewards), [[0.75, -0.75, 0.0], [1.0, 0.0, -1.0], [0.0, 0.0, 0.0]])


def test_relative_to_the_greedy_response() -> None:
    rewards = np.array([[1.0, np.nan], [0.0, 1.0]])
    assert relative_to(rewards, np.array([0.5, np.nan])).tolist() == [[0.5, 0.0], [0.0, 0.0]]


def test_whitened_over_all_tokens_of_the_batch() -> None:
    values = [np.array([1.0, 2.0], np.float32), np.array([3.0, np.nan, 6.0], np.float32)]
    mean, std = 3.0, math.sqrt((4 + 1 + 0 + 9) / 4)
    first, second = whitened(values)
    assert np.allclose(first, [(1 - mean) / std, (2 - mean) / std])
    assert np.isnan(second[1]) and np.allclose(second[[0, 2]], [0, 3 / std])
    scaled = whitened(values, shift=False)[0]
    assert np.allclose(scaled, [1 / std, 2 / std])
    nothing = whitened([np.array([np.nan], np.float32)])[0]
    assert np.isnan(nothing).all()


def test_returns_to_go() -> None:
    assert returns_to_go(np.array([1.0, 2.0, 4.0], np.float32)).tolist() == [7.0, 6.0, 4.0]


def test_gae_by_hand() -> None:
    rewards, values = np.array([0.0, 0.0, 1.0], np.float32), np.array([0.5, 0.2, 0.4], np.float32)
    # deltas: 0.9 * 0.2 - 0.5, 0.9 * 0.4 - 0.2, 1 - 0.4; each advantage is its delta + 0.9 * 0.5 * the next one
    last = 0.6
    middle = 0.16 + 0.45 * last
    first = -0.32 + 0.45 * middle
    assert np.allclose(gae(rewards, values, gamma=0.9, lam=0.5), [first, middle, last])
    # lambda 1: the return minus the value; lambda 0: the delta
    assert np.allclose(gae(rewards, values, 1.0, 1.0), returns_to_go(rewards) - values)
    assert np.allclose(gae(rewards, values, 1.0, 0.0), [-0.3, 0.2, 0.6])
