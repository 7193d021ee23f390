import torch

from rlvid.algorithms.value_loss import value_loss


def test_the_larger_of_the_plain_and_the_clipped_error_counts() -> None:
    values = torch.tensor([0.5, -0.5, 0.1], requires_grad=True)
    old, returns = torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    loss, is_clipped = value_loss(values, old, returns, clip=0.2)
    # 0.5 is clipped to 0.2: (0.2 - 1)^2 > (0.5 - 1)^2; -0.5 to -0.2: (-0.2 - 1)^2 < (-0.5 - 1)^2
    torch.testing.assert_close(loss, 0.5 * torch.tensor([0.64, 2.25, 0.81]))
    assert is_clipped.tolist() == [True, False, False]
    loss.sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -1.5, -0.9]))


def test_without_a_clip_it_is_half_the_squared_error() -> None:
    loss, is_clipped = value_loss(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([1.0]), clip=None)
    assert loss.tolist() == [2.0] and not is_clipped.any()
