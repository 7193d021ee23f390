"""Parameters in parts. ZeRO-3 gathers them with other ranks in test_learner.py."""

from __future__ import annotations

import torch

from rlvid.training.parameters import in_parts


def test_parts_keep_the_order_and_the_limit_and_the_last_one_says_so() -> None:
    named = [(str(i), torch.zeros(i + 1)) for i in range(5)]  # 4, 8, 12, 16, 20 bytes
    for limit, count in ((1, 5), (24, 3), (1000, 1)):
        parts = list(in_parts(named, limit))
        assert [name for part, _ in parts for name, _ in part] == list("01234")
        assert [is_last for _, is_last in parts] == [False] * (count - 1) + [True]
        assert all(len(part) == 1 or sum(t.nbytes for _, t in part) <= limit for part, _ in parts)
