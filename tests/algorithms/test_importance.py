import math

import torch

from rlvid.algorithms.importance import correction_weights, importance_ratio, per_response

LENGTHS = torch.tensor([2, 1])


def test_sums_of_responses() -> None:
    assert per_response(torch.tensor([1.0, 2.0, 4.0]), LENGTHS).tolist() == [3.0, 4.0]


def test_a_sequence_has_the_geometric_mean_of_its_ratios_and_every_token_its_gradient() -> None:
    log_ratio = torch.tensor([math.log(4.0), 0.0, math.log(3.0)], requires_grad=True)
    ratio = importance_ratio(log_ratio, LENGTHS)
    torch.testing.assert_close(ratio, torch.tensor([2.0, 2.0, 3.0]))
    ratio[0].backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([1.0, 1.0, 0.0]))  # 2 / 2 each


def test_weights_are_truncated_or_whole_responses_are_masked() -> None:
    trainer = torch.tensor([0.0, math.log(5.0), math.log(0.5)], requires_grad=True)
    rollout = torch.zeros(3)
    truncated = correction_weights(trainer, rollout, LENGTHS, "truncate", cap=2.0)
    torch.testing.assert_close(truncated, torch.tensor([1.0, 2.0, 0.5]))
    assert not truncated.requires_grad
    masked = correction_weights(trainer, rollout, LENGTHS, "mask", cap=2.0)  # products 5 and 0.5
    assert masked.tolist() == [0.0, 0.0, 1.0]
